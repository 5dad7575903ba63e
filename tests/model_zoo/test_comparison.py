import copy

import pytest
import torch

from detkit.config import get_cfg
from detkit.model_zoo import compare_with_recorded
from detkit.modeling import META_ARCH_REGISTRY


@pytest.fixture(scope="module")
def cfg():
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    return cfg


@pytest.fixture
def recorded(cfg):
    with torch.device("meta"):
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    return {
        "keys": {name: list(t.shape) for name, t in model.state_dict().items()},
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
    }


WEIGHT = "proposal_generator.rpn_head.conv.weight"


def test_equal_models_do_not_differ(cfg, recorded):
    assert compare_with_recorded(cfg, recorded) == []


def test_comparison_changes_nothing(cfg, recorded):
    before = copy.deepcopy((cfg, recorded))
    compare_with_recorded(cfg, recorded)
    assert (cfg, recorded) == before


def test_missing_tensor_is_named(cfg, recorded):
    recorded["keys"]["head.weight"] = [1]
    assert compare_with_recorded(cfg, recorded) == ["missing: head.weight"]


def test_additional_tensor_is_named(cfg, recorded):
    del recorded["keys"][WEIGHT]
    assert compare_with_recorded(cfg, recorded) == [f"not recorded: {WEIGHT}"]


def test_other_shape_is_given_with_the_wanted_one(cfg, recorded):
    recorded["keys"][WEIGHT] = [1, 2]
    assert compare_with_recorded(cfg, recorded) == [
        f"of another shape: {WEIGHT}: [256, 256, 3, 3], not [1, 2]"
    ]


def test_trained_and_frozen_are_told_apart(cfg, recorded):
    recorded["trainable"].remove(WEIGHT)
    recorded["trainable"].append("backbone.stem.conv1.weight")
    assert compare_with_recorded(cfg, recorded) == [
        f"trained, but should not be: {WEIGHT}",
        "not trained, but should be: backbone.stem.conv1.weight",
    ]


def test_long_list_is_cut_and_counted(cfg, recorded):
    recorded["keys"].update({f"extra.{i}": [1] for i in range(9)})
    assert compare_with_recorded(cfg, recorded) == [
        "missing: extra.0, extra.1, extra.2, extra.3, ... (9)"
    ]
