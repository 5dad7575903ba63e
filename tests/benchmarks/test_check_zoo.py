import copy
import gzip
import json
from pathlib import Path

import pytest
import torch
from check_zoo import compare_recipe_with_recorded, compare_with_recorded, main

from detkit.config import get_cfg
from detkit.model_zoo import get_config_file
from detkit.modeling import META_ARCH_REGISTRY

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
RECORD = GOLDEN / "state_dicts.json.gz"
RPN = "COCO-Detection/rpn_R_50_FPN_1x.yaml"
FASTER = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"


@pytest.fixture
def record(tmp_path):
    """Writes a record and gives its path."""

    def write(models):
        path = tmp_path / "state_dicts.json.gz"
        path.write_bytes(gzip.compress(json.dumps(models).encode()))
        return str(path)

    return write


@pytest.fixture(scope="module")
def recorded():
    return json.loads(gzip.decompress(RECORD.read_bytes()))


def test_models_as_recorded_are_counted(capsys):
    assert main([RPN]) == 0
    assert capsys.readouterr().out.startswith("1 of 1 models as recorded")


def test_model_that_differs_is_named_and_fails_the_check(record, recorded, capsys):
    path = record({RPN: recorded[RPN], FASTER: recorded[RPN]})
    assert main(["--recorded", path]) == 1
    out = capsys.readouterr().out
    assert f"{FASTER}\n  not recorded: roi_heads." in out
    assert "1 of 2 models as recorded" in out


def test_config_that_cannot_be_built_does_not_hide_the_others(record, recorded, capsys):
    path = record({"no_such.yaml": recorded[RPN], RPN: recorded[RPN]})
    assert main(["--recorded", path]) == 1
    out = capsys.readouterr().out
    assert "no_such.yaml\n  UnknownConfigError: no packaged config" in out
    assert "1 of 2 models as recorded" in out


def test_name_that_is_not_recorded_is_an_error(capsys):
    assert main(["quick_start/faster_rcnn_R_18_FPN_shapes.yaml"]) == 2
    assert "faster_rcnn_R_18_FPN_shapes.yaml: not among the" in capsys.readouterr().err


def test_config_in_python_is_known_by_the_name_of_its_twin(record, recorded, capsys):
    path = record({"projects/ViTDet/configs/COCO/no_such.py": recorded[RPN]})
    assert main(["--recorded", path]) == 1
    assert "no packaged config is called 'ViTDet/COCO/no_such.yaml'" in capsys.readouterr().out


def test_absent_record_is_an_error(tmp_path, capsys):
    assert main(["--recorded", str(tmp_path / "x.gz")]) == 2
    assert "--recorded" in capsys.readouterr().err


@pytest.mark.slow
def test_whole_zoo_is_as_recorded(capsys):
    assert main([]) == 0
    assert "137 of 137 models as recorded" in capsys.readouterr().out


@pytest.fixture(scope="module")
def fcos():
    models = json.loads(gzip.decompress((GOLDEN / "lazy_zoo.json.gz").read_bytes()))
    return models["configs/COCO-Detection/fcos_R_50_FPN_1x.py"]


@pytest.fixture
def fcos_recipe(fcos):
    """A config with the recipe of FCOS; its model does not matter here."""
    cfg = get_cfg()
    cfg.merge_from_file(get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    cfg.TEST.EVAL_PERIOD = 5000
    return cfg


def test_recipe_as_recorded_does_not_differ(fcos_recipe, fcos):
    assert compare_recipe_with_recorded(fcos_recipe, fcos) == []


def test_model_without_recorded_recipe_has_no_difference(cfg, own_record):
    assert compare_recipe_with_recorded(cfg, own_record) == []


def test_other_batch_size_is_given_with_the_wanted_one(fcos_recipe, fcos):
    fcos_recipe.SOLVER.IMS_PER_BATCH = 8
    assert compare_recipe_with_recorded(fcos_recipe, fcos) == ["SOLVER.IMS_PER_BATCH: 8, not 16"]


def test_other_schedule_is_found_where_it_differs(fcos_recipe, fcos):
    fcos_recipe.SOLVER.STEPS = [60001, 80000]
    assert compare_recipe_with_recorded(fcos_recipe, fcos) == [
        "learning rate's factor: 1, not 0.1, at iteration 60000"
    ]


def test_layer_decay_of_a_vit_is_compared(fcos_recipe, fcos):
    recorded = copy.deepcopy(fcos)
    decay = "functools.partial(<function get_vit_lr_decay_rate>, lr_decay_rate=0.7, num_layers=12)"
    recorded["settings"]["optimizer"]["params.lr_factor_func"] = decay
    assert compare_recipe_with_recorded(fcos_recipe, recorded) == [
        "SOLVER.LAYER_DECAY: 1.0, not 0.7"
    ]


@pytest.fixture(scope="module")
def cfg():
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    return cfg


@pytest.fixture
def own_record(cfg):
    with torch.device("meta"):
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    return {
        "keys": {name: list(t.shape) for name, t in model.state_dict().items()},
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
    }


WEIGHT = "proposal_generator.rpn_head.conv.weight"


def test_equal_models_do_not_differ(cfg, own_record):
    assert compare_with_recorded(cfg, own_record) == []


def test_comparison_changes_nothing(cfg, own_record):
    before = copy.deepcopy((cfg, own_record))
    compare_with_recorded(cfg, own_record)
    assert (cfg, own_record) == before


def test_missing_tensor_is_named(cfg, own_record):
    own_record["keys"]["head.weight"] = [1]
    assert compare_with_recorded(cfg, own_record) == ["missing: head.weight"]


def test_additional_tensor_is_named(cfg, own_record):
    del own_record["keys"][WEIGHT]
    assert compare_with_recorded(cfg, own_record) == [f"not recorded: {WEIGHT}"]


def test_other_shape_is_given_with_the_wanted_one(cfg, own_record):
    own_record["keys"][WEIGHT] = [1, 2]
    assert compare_with_recorded(cfg, own_record) == [
        f"of another shape: {WEIGHT}: [256, 256, 3, 3], not [1, 2]"
    ]


def test_trained_and_frozen_are_told_apart(cfg, own_record):
    own_record["trainable"].remove(WEIGHT)
    own_record["trainable"].append("backbone.stem.conv1.weight")
    assert compare_with_recorded(cfg, own_record) == [
        f"trained, but should not be: {WEIGHT}",
        "not trained, but should be: backbone.stem.conv1.weight",
    ]


def test_long_list_is_cut_and_counted(cfg, own_record):
    own_record["keys"].update({f"extra.{i}": [1] for i in range(9)})
    assert compare_with_recorded(cfg, own_record) == [
        "missing: extra.0, extra.1, extra.2, extra.3, ... (9)"
    ]
