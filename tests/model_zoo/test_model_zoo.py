import json
import re
from pathlib import Path

import pytest

from detkit.config import get_cfg
from detkit.model_zoo import find_config, get_config, get_config_file, list_configs

# Recorded from Detectron2 0.6: per file of its zoo, the settings that differ from the default.
ZOO = json.loads((Path(__file__).resolve().parents[1] / "golden" / "zoo_settings.json").read_text())
DEFAULT = get_cfg()


def changed_settings(cfg):
    values = {key: cfg.get_by_full_key(key) for key in cfg.keys_of_leaves()}
    return {k: json.loads(json.dumps(v)) for k, v in values.items() if v != DEFAULT.get_by_full_key(k)}


@pytest.mark.parametrize("name", ZOO)
def test_config_resolves_to_detectron2s_settings(name):
    assert changed_settings(get_config(name)) == ZOO[name]


def test_detectron2s_whole_zoo_and_our_own_are_there():
    ours = ["quick_start/faster_rcnn_R_18_FPN_shapes.yaml", "Examples/faster_rcnn_R_18_FPN_bccd.yaml"]
    assert len(ZOO) == 92
    assert {*ZOO, *ours} <= set(list_configs())


@pytest.mark.parametrize("name", list_configs())
def test_config_says_what_it_is_and_where_it_is_from_first(name):
    first, second, *_ = Path(get_config_file(name)).read_text().splitlines()
    assert first.startswith(("# Reproduces: ", "# The common part of ")), f"{name} begins with {first!r}"
    assert second.startswith("# Source: "), f"{name}: {second!r}"


@pytest.mark.parametrize("name", [name for name in list_configs() if "Base" not in name])
def test_config_says_its_score_and_whether_it_was_measured(name):
    head = "".join(line for line in Path(get_config_file(name)).read_text().splitlines() if line.startswith("# "))
    assert re.search(r"[Ss]core( and cost)?: .*(measured|none expected)", head), head


@pytest.mark.parametrize("name", ["rpn_R_50_FPN_1x", "rpn_R_50_FPN_1x.yaml", "COCO-Detection/rpn_R_50_FPN_1x"])
def test_short_names_are_enough(name):
    assert get_config_file(name).endswith("COCO-Detection/rpn_R_50_FPN_1x.yaml")


def test_users_own_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("Base-RCNN-FPN.yaml").write_text("SEED: 1\n")
    assert find_config("Base-RCNN-FPN.yaml") == "Base-RCNN-FPN.yaml"


def test_packaged_file_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(find_config("configs/Base-RCNN-FPN.yaml")).is_file()


def test_unknown_name_has_near_misses():
    with pytest.raises(FileNotFoundError, match=r"no config file faster_rcnn_R50_FPN_1x.*Did you mean .*R_50_FPN_1x"):
        find_config("faster_rcnn_R50_FPN_1x.yaml")
