"""Tests of detkit.modeling.initialization."""

import pytest
import torch
from torch import nn

from detkit.config import get_cfg
from detkit.modeling import build_model
from detkit.modeling.initialization import INITIALIZERS, initialize_matching


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Linear(64, 64))
    return model, {name: value.clone() for name, value in model.state_dict().items()}


def changed(model, before):
    return [name for name, value in model.state_dict().items() if not value.equal(before[name])]


@pytest.mark.parametrize("kind", INITIALIZERS)
def test_every_initializer_is_that_of_torch(kind):
    model, before = make()
    arguments = {"val": 0.5} if kind == "constant" else {}
    torch.manual_seed(3)
    initialize_matching(model, [{"names": "^0.weight$", "type": kind, **arguments}])
    torch.manual_seed(3)
    expected = torch.empty(64, 3, 3, 3)
    getattr(nn.init, f"{kind}_")(expected, **arguments)
    assert torch.equal(model[0].weight, expected)
    assert changed(model, before) == ["0.weight"]


def test_later_entries_override_earlier_ones():
    model, before = make()
    entries = [
        {"names": "bias", "type": "ones"},
        {"names": "^2.bias", "type": "constant", "val": 3.0},
    ]
    initialize_matching(model, entries)
    assert changed(model, before) == ["0.bias", "1.bias", "2.bias"]
    assert model[0].bias.unique().tolist() == [1.0]
    assert model[2].bias.unique().tolist() == [3.0]


def test_config_initializes_a_whole_model():
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE = "cpu", "ProposalNetwork"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.INIT = [{"names": r"res4.*conv\d\.weight", "type": "normal", "std": 0.25}]
    model = build_model(cfg)
    assert model.backbone.res4[1].conv2.weight.std().item() == pytest.approx(0.25, rel=0.02)
    assert model.backbone.res4[0].shortcut.weight.std().item() < 0.2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("conv", "entry 0 must be a mapping with names and type: got 'conv'"),
        ({"type": "ones"}, "entry 0 must be a mapping with names and type"),
        ({"names": "0", "type": "xavier"}, "type must be one of .*got 'xavier'. Did you mean"),
        ({"names": "0", "type": "normal", "stdev": 1}, r"normal has no argument \['stdev'\]"),
        ({"names": "wieght", "type": "ones"}, "'wieght' matches no parameter"),
        ({"names": "bias", "type": "xavier_normal"}, r"entry 0: 0.bias of shape \(64,\): "),
        ({"names": "0", "type": "constant"}, r"0.weight of shape .*missing .* 'val'"),
    ],
)
def test_bad_entry_is_an_error(entry, message):
    with pytest.raises(ValueError, match=message):
        initialize_matching(make()[0], [entry])


def test_error_names_the_key():
    cfg = get_cfg()
    cfg.MODEL.INIT = [{"names": "nowhere", "type": "ones"}]
    with pytest.raises(ValueError, match="MODEL.INIT: entry 0: 'nowhere' matches no parameter"):
        build_model(cfg)
