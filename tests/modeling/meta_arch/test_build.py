"""Tests of detkit.modeling.meta_arch.build."""

from collections import UserDict, UserList

import pytest
import torch
import yaml
from torch import nn

from detkit.config import declare_architecture, get_cfg
from detkit.modeling.meta_arch.build import META_ARCH_REGISTRY, build_model


@META_ARCH_REGISTRY.register()
class OneConvolution(nn.Module):
    """A model that says nothing."""

    def __init__(self, cfg):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)


@META_ARCH_REGISTRY.register()
class ReadsDevice(OneConvolution):
    """Puts its parts on the device itself, as models written for Detectron2 do."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.device = torch.device(cfg.MODEL.DEVICE)
        self.is_frozen = cfg.is_frozen()


class DeclaredForTests(OneConvolution):
    pass


def config(**model):
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "OneConvolution"
    cfg.MODEL.DEVICE = "cpu"
    for key, value in model.items():
        cfg.MODEL[key] = value
    return cfg


@pytest.mark.parametrize(
    ("name", "memory_format"),
    [("channels_last", torch.channels_last), ("contiguous", torch.contiguous_format)],
)
def test_weights_are_in_the_memory_format(name, memory_format):
    model = build_model(config(MEMORY_FORMAT=name))
    assert model.conv.weight.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    ("module", "memory_format"),
    [("detkit.modeling.x", torch.channels_last), ("detkit_heads", torch.contiguous_format)],
    ids=["own", "of-the-user"],
)
def test_code_of_users_gets_contiguous_tensors(monkeypatch, caplog, module, memory_format):
    monkeypatch.setattr(OneConvolution, "__module__", module)
    with caplog.at_level("INFO"):
        model = build_model(config())
    assert model.conv.weight.is_contiguous(memory_format=memory_format)
    is_users = memory_format == torch.contiguous_format
    assert ("OneConvolution is a class of your own" in caplog.text) == is_users


def test_model_is_on_the_device():
    assert build_model(config()).conv.weight.device.type == "cpu"


def test_config_may_be_any_tree_of_mappings_and_sequences():
    class Tree(UserDict):
        """Like omegaconf's, no dict, and what it holds is none either."""

        def __getitem__(self, key):
            value = super().__getitem__(key)
            if isinstance(value, list):
                return UserList(value)
            return Tree(value) if isinstance(value, dict) else value

    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    torch.manual_seed(0)
    expected = build_model(cfg).state_dict()
    torch.manual_seed(0)
    found = build_model(Tree(yaml.safe_load(cfg.dump()))).state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    with pytest.raises(AttributeError, match="no config key 'MODEL'"):
        build_model({"SOLVER": {}})


@pytest.mark.parametrize("is_frozen", [False, True])
def test_model_of_ones_own_reads_a_device_that_torch_knows(is_frozen):
    cfg = config(META_ARCHITECTURE="ReadsDevice", DEVICE="auto")
    if is_frozen:
        cfg.freeze()
    model = build_model(cfg)
    assert model.conv.weight.device.type == model.device.type
    assert model.is_frozen == is_frozen
    # The config still says that the machine at hand decides.
    assert cfg.MODEL.DEVICE == "auto"


def test_device_that_is_none_names_the_key():
    with pytest.raises(ValueError, match="MODEL.DEVICE must be auto, cpu"):
        build_model(config(DEVICE="tpux"))


def test_unknown_model_offers_a_near_miss():
    with pytest.raises(
        KeyError, match="not registered as META_ARCH. Did you mean 'GeneralizedRCNN'"
    ):
        build_model(config(META_ARCHITECTURE="GeneralisedRCNN"))


@pytest.mark.parametrize(
    ("architecture", "key"),
    [
        ("ProposalNetwork", "MASK_ON"),
        ("ProposalNetwork", "KEYPOINT_ON"),
        ("RetinaNet", "MASK_ON"),
        ("RetinaNet", "KEYPOINT_ON"),
        ("RetinaNet", "LOAD_PROPOSALS"),
        ("SemanticSegmentor", "MASK_ON"),
        ("SemanticSegmentor", "KEYPOINT_ON"),
        ("SemanticSegmentor", "LOAD_PROPOSALS"),
    ],
)
def test_branch_that_the_model_lacks_is_an_error(architecture, key):
    with pytest.raises(
        ValueError,
        match=f"MODEL.{key} is True, but MODEL.META_ARCHITECTURE {architecture} does not use it",
    ):
        build_model(config(META_ARCHITECTURE=architecture, **{key: True}))


def test_branches_are_those_that_a_model_of_ones_own_declares():
    declare_architecture(branches=["MODEL.MASK_ON"])(META_ARCH_REGISTRY.register(DeclaredForTests))
    build_model(config(META_ARCHITECTURE="DeclaredForTests", MASK_ON=True))
    with pytest.raises(ValueError, match=r"MODEL\.KEYPOINT_ON is True"):
        build_model(config(META_ARCHITECTURE="DeclaredForTests", KEYPOINT_ON=True))


def test_branches_of_models_that_declare_nothing_are_not_checked():
    assert (
        build_model(config(MASK_ON=True, KEYPOINT_ON=True, LOAD_PROPOSALS=True)).conv.in_channels
        == 4
    )


def test_parts_that_solver_freeze_names_do_not_train():
    cfg = config()
    cfg.SOLVER.FREEZE = [r"conv\.w"]
    trained = {name for name, p in build_model(cfg).named_parameters() if p.requires_grad}
    assert trained == {"conv.bias"}


def test_solver_freeze_that_matches_nothing_is_an_error_that_names_the_key():
    cfg = config()
    cfg.SOLVER.FREEZE = ["cnov"]
    with pytest.raises(ValueError, match="SOLVER.FREEZE: 'cnov' matches .*Did you mean 'conv'"):
        build_model(cfg)
