import gzip
import json
import re
from pathlib import Path

import pytest
import torch

from detkit.checkpoint import CheckpointError
from detkit.config import get_cfg
from detkit.model_zoo import (
    find_config,
    get,
    get_checkpoint_url,
    get_config,
    get_config_file,
    list_configs,
)
from detkit.model_zoo.model_zoo import (
    PREFIX,
    PUBLISHED_BY_PROJECTS,
    PUBLISHED_WEIGHTS,
    UnknownConfigError,
)

# Recorded from Detectron2 0.6: per file of its zoo, the settings that differ from the default.
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ZOO = json.loads((GOLDEN / "zoo_settings.json").read_text())
DEFAULT = get_cfg()
# Detectron2's quick schedules name nine of these files in full: a second source for the same addresses.
NAMED_IN_CONFIGS = {
    s["MODEL.WEIGHTS"] for s in ZOO.values() if "model_final" in s.get("MODEL.WEIGHTS", "")
} - {"detectron2://semantic_R_50_FPN_1x/111802073/model_final_c18079783c55a94968edc28b7101c5f0.pkl"}


def changed_settings(cfg):
    values = {key: cfg.get_by_full_key(key) for key in cfg.keys_of_leaves()}
    return {
        k: json.loads(json.dumps(v)) for k, v in values.items() if v != DEFAULT.get_by_full_key(k)
    }


@pytest.mark.parametrize("name", ZOO)
def test_config_resolves_to_detectron2s_settings(name):
    assert changed_settings(get_config(name)) == ZOO[name]


def test_detectron2s_whole_zoo_and_our_own_are_there():
    ours = [
        "quick_start/faster_rcnn_R_18_FPN_shapes.yaml",
        "Examples/faster_rcnn_R_18_FPN_bccd.yaml",
    ]
    ours += [
        "Examples/faster_rcnn_mobilenet_v3_large_FPN_shapes.yaml",
        "Examples/faster_rcnn_swin_t_FPN.yaml",
    ]
    assert len(ZOO) == 92
    assert {*ZOO, *ours} <= set(list_configs())


@pytest.mark.parametrize("name", list_configs())
def test_config_says_what_it_is_and_where_it_is_from_first(name):
    first, second, *_ = Path(get_config_file(name)).read_text().splitlines()
    assert first.startswith(("# Reproduces: ", "# The common part of ")), (
        f"{name} begins with {first!r}"
    )
    assert second.startswith("# Source: "), f"{name}: {second!r}"


@pytest.mark.parametrize("name", [name for name in list_configs() if "Base" not in name])
def test_config_says_its_score_and_whether_it_was_measured(name):
    head = "".join(
        line
        for line in Path(get_config_file(name)).read_text().splitlines()
        if line.startswith("# ")
    )
    assert re.search(r"[Ss]core( and cost)?: .*(measured|none expected)", head), head


@pytest.mark.parametrize(
    "name", ["rpn_R_50_FPN_1x", "rpn_R_50_FPN_1x.yaml", "COCO-Detection/rpn_R_50_FPN_1x"]
)
def test_short_names_are_enough(name):
    assert get_config_file(name).endswith("COCO-Detection/rpn_R_50_FPN_1x.yaml")


def test_names_of_lazy_configs_give_the_yaml_with_a_warning(caplog):
    path = get_config_file("COCO-Detection/rpn_R_50_FPN_1x.py")
    assert path == get_config_file("COCO-Detection/rpn_R_50_FPN_1x.yaml")
    (record,) = caplog.records
    assert "LazyConfig is left out: COCO-Detection/rpn_R_50_FPN_1x.yaml is read" in record.message
    with pytest.raises(UnknownConfigError, match=r"'common/train.py'"):
        get_config_file("common/train.py")


def test_users_own_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("Base-RCNN-FPN.yaml").write_text("SEED: 1\n")
    assert find_config("Base-RCNN-FPN.yaml") == "Base-RCNN-FPN.yaml"


@pytest.mark.parametrize("prefix", ["", "configs/", "detkit://"])
def test_packaged_file_is_found_from_any_folder(tmp_path, monkeypatch, prefix):
    monkeypatch.chdir(tmp_path)
    assert Path(find_config(f"{prefix}Base-RCNN-FPN.yaml")).is_file()


def test_unknown_name_has_near_misses():
    with pytest.raises(
        FileNotFoundError,
        match=r"no config file faster_rcnn_R50_FPN_1x.*Did you mean .*R_50_FPN_1x",
    ):
        find_config("faster_rcnn_R50_FPN_1x.yaml")


def test_published_weights_have_an_address():
    url = get_checkpoint_url("faster_rcnn_R_50_FPN_1x")
    prefix = "https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/faster_rcnn_R_50_FPN_1x/"
    assert url == prefix + "137257794/model_final_b275ba.pkl"


def test_trained_config_differs_in_its_weights_only():
    cfg, trained = get_config("rpn_R_50_FPN_1x"), get_config("rpn_R_50_FPN_1x", trained=True)
    url = get_checkpoint_url("rpn_R_50_FPN_1x")
    assert url == trained.MODEL.WEIGHTS
    trained.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS
    assert trained == cfg


@pytest.mark.parametrize(
    "name", ["COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_giou.yaml", "Base-RCNN-FPN.yaml"]
)
def test_config_without_published_weights_is_an_error(name):
    with pytest.raises(ValueError, match=rf"published no weights for {name.removesuffix('.yaml')}"):
        get_config(name, trained=True)


def test_error_about_weights_names_a_config_that_has_some():
    with pytest.raises(
        ValueError, match=r"Did you mean 'COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x'"
    ):
        get_checkpoint_url("mask_rcnn_R_50_FPN_1x_giou")


@pytest.mark.parametrize("function", [get_checkpoint_url, get_config, get])
def test_unknown_config_has_near_misses_everywhere(function):
    with pytest.raises(
        FileNotFoundError, match=r"'faster_rcnn_R_50_FPN_5x'.*Did you mean .*R_50_FPN_[13]x"
    ):
        function("faster_rcnn_R_50_FPN_5x")


def test_name_that_several_configs_have_is_an_error_that_lists_them():
    with pytest.raises(
        FileNotFoundError,
        match=r"several .*COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml, LVIS",
    ):
        get_config("mask_rcnn_R_50_FPN_1x")


@pytest.fixture
def zoo_of_one(tmp_path, monkeypatch):
    """A tiny packaged config whose published weights are a file here."""
    (tmp_path / "tiny.yaml").write_text(
        "MODEL:\n  META_ARCHITECTURE: ProposalNetwork\n  DEVICE: cpu\n  WEIGHTS: ''\n"
        "  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, STEM_OUT_CHANNELS: 8}\n"
    )
    monkeypatch.setattr("detkit.model_zoo.model_zoo.packaged_configs", lambda: tmp_path)
    monkeypatch.setattr("detkit.model_zoo.model_zoo.PREFIX", f"{tmp_path}/")
    monkeypatch.setitem(PUBLISHED_WEIGHTS, "tiny", "1/model_final_aaaaaa.pth")
    return tmp_path


def test_trained_model_has_the_published_weights(zoo_of_one):
    untrained = get("tiny")
    path = zoo_of_one / "tiny" / "1"
    path.mkdir(parents=True)
    torch.save({"model": untrained.state_dict()}, path / "model_final_aaaaaa.pth")
    trained = get("tiny", trained=True, device="cpu")
    assert all(
        torch.equal(trained.state_dict()[name], value)
        for name, value in untrained.state_dict().items()
    )
    assert trained.training
    assert not torch.equal(
        get("tiny").state_dict()["proposal_generator.rpn_head.conv.weight"],
        untrained.state_dict()["proposal_generator.rpn_head.conv.weight"],
    )


def test_published_weights_must_fill_the_model(zoo_of_one):
    path = zoo_of_one / "tiny" / "1"
    path.mkdir(parents=True)
    state = get("tiny").state_dict()
    del state["proposal_generator.rpn_head.conv.weight"]
    torch.save({"model": state}, path / "model_final_aaaaaa.pth")
    with pytest.raises(CheckpointError, match="does not fill the model"):
        get("tiny", trained=True)


def test_addresses_named_in_detectron2s_configs_are_the_same():
    ours = {f"detectron2://{name}/{rest}" for name, rest in PUBLISHED_WEIGHTS.items()}
    assert len(NAMED_IN_CONFIGS) == 9
    assert ours >= NAMED_IN_CONFIGS


def test_every_entry_is_a_config_of_the_zoo_and_a_run_of_its_own():
    in_python = json.loads(gzip.decompress((GOLDEN / "lazy_zoo.json.gz").read_bytes()))
    names = {name.removesuffix(".yaml") for name in ZOO}
    names |= {name.removeprefix("configs/").removesuffix(".py") for name in in_python}
    assert set(PUBLISHED_WEIGHTS) <= names
    assert len({rest.split("/")[0] for rest in PUBLISHED_WEIGHTS.values()}) == len(
        PUBLISHED_WEIGHTS
    )
    assert PREFIX.endswith("/")


@pytest.mark.parametrize("name", PUBLISHED_WEIGHTS)
def test_entry_looks_like_those_that_were_published(name):
    assert re.fullmatch(r"\d{8,9}/model_(final|0039999)_[0-9a-f]{6}\.pkl", PUBLISHED_WEIGHTS[name])


@pytest.mark.parametrize("name", PUBLISHED_WEIGHTS)
def test_config_names_the_same_run_in_its_head(name):
    config = Path(__file__).resolve().parents[2] / "configs" / f"{name}.yaml"
    assert f"{name} (id {PUBLISHED_WEIGHTS[name].split('/')[0]})" in config.read_text()


@pytest.mark.parametrize("name", [n for n in list_configs() if n.startswith("own_data/")])
def test_config_for_own_data_starts_from_a_published_detector_and_counts_in_epochs(name):
    cfg = get_config(name)
    address = cfg.MODEL.WEIGHTS.removeprefix("detectron2://")
    folder, number, file = address.rsplit("/", 2)
    assert PUBLISHED_WEIGHTS[folder] == f"{number}/{file}"
    published = get_config(folder)
    assert published.MODEL.MASK_ON == cfg.MODEL.MASK_ON
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == ((), ())
    assert cfg.SOLVER.MAX_EPOCH > 0
    # Another MAX_EPOCH is the only key to change for another length.
    assert (cfg.SOLVER.LR_SCHEDULER_NAME, cfg.SOLVER.STEPS) == ("WarmupCosineLR", ())
    # The linear rule, from the rate and batch of the published schedule.
    scale = cfg.SOLVER.IMS_PER_BATCH / published.SOLVER.IMS_PER_BATCH
    assert pytest.approx(published.SOLVER.BASE_LR * scale) == cfg.SOLVER.BASE_LR
    assert cfg.SOLVER.REFERENCE_BATCH == cfg.SOLVER.IMS_PER_BATCH


def test_every_config_of_detectron2s_projects_has_its_published_weights():
    in_python = json.loads(gzip.decompress((GOLDEN / "lazy_zoo.json.gz").read_bytes()))
    names = {
        name.removeprefix("projects/").replace("/configs/", "/").removesuffix(".py")
        for name in in_python
        if name.startswith("projects/")
    }
    assert set(PUBLISHED_BY_PROJECTS) == names
    assert len(set(PUBLISHED_BY_PROJECTS.values())) == len(names)
    for name, address in PUBLISHED_BY_PROJECTS.items():
        assert get_checkpoint_url(name) == PREFIX + address
        assert address.startswith(name.split("/")[0])
