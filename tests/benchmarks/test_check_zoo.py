import copy
import gzip
import json
from pathlib import Path

import pytest
import torch
from check_zoo import compare_with_recorded, main

from detkit.config import get_cfg
from detkit.modeling import META_ARCH_REGISTRY

RECORD = Path(__file__).resolve().parents[1] / "golden" / "state_dicts.json.gz"
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
    assert "no_such.yaml\n  MissingFileError: no packaged config" in out
    assert "1 of 2 models as recorded" in out


def test_name_that_is_not_recorded_is_an_error(capsys):
    assert main(["quick_start/faster_rcnn_R_18_FPN_shapes.yaml"]) == 2
    assert "faster_rcnn_R_18_FPN_shapes.yaml: not among the" in capsys.readouterr().err


def test_absent_record_is_an_error(tmp_path, capsys):
    assert main(["--recorded", str(tmp_path / "x.gz")]) == 2
    assert "--recorded" in capsys.readouterr().err


@pytest.mark.slow
def test_whole_zoo_is_as_recorded(capsys):
    assert main([]) == 0
    assert "92 of 92 models as recorded" in capsys.readouterr().out


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
