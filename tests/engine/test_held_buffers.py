import copy

import pytest
import torch
from torch import nn

from detkit.engine.held_buffers import HeldBuffers


@pytest.fixture
def model():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False))


def test_statistics_and_counters_come_back(model):
    model(torch.randn(2, 3, 4, 4))
    before = copy.deepcopy(model.state_dict())
    held = HeldBuffers(model)
    held.hold()
    for _ in range(2):
        model(torch.full((2, 3, 4, 4), torch.nan))
        assert model[1].running_mean.isnan().all()
        held.restore()
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_second_hold_replaces_the_first(model):
    held = HeldBuffers(model)
    held.hold()
    model(torch.randn(2, 3, 4, 4))
    after = copy.deepcopy(model.state_dict())
    held.hold()
    model(torch.randn(2, 3, 4, 4))
    held.restore()
    torch.testing.assert_close(model.state_dict(), after, rtol=0, atol=0)


def test_parameters_are_not_its_business(model):
    held = HeldBuffers(model)
    held.hold()
    nn.init.zeros_(model[0].weight)
    held.restore()
    assert not model[0].weight.any()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(None, torch.ones(1), id="filled"),
        pytest.param(torch.ones(1), None, id="emptied"),
        pytest.param(torch.ones(1), torch.zeros(1), id="changed"),
        pytest.param(torch.ones(3), torch.ones(3).double(), id="other-type-in-between"),
        pytest.param(torch.ones(3), torch.zeros(1), id="other-shape-in-between"),
    ],
)
def test_buffer_is_as_it_was_held(before, after):
    model = nn.Module()
    model.register_buffer("average", after)
    held = HeldBuffers(model)
    held.hold()
    model.average = before
    held.hold()
    model.average = after
    held.restore()
    if before is None:
        assert model.average is None
    else:
        torch.testing.assert_close(model.average, before)


def test_buffer_that_was_not_there_goes():
    model = nn.Module()
    held = HeldBuffers(model)
    held.hold()
    model.register_buffer("average", torch.ones(1))
    held.restore()
    assert list(model.buffers()) == []


def test_buffer_that_has_gone_in_between_is_forgotten():
    model = nn.Module()
    model.register_buffer("average", torch.ones(1))
    held = HeldBuffers(model)
    held.hold()
    del model.average
    held.hold()
    held.restore()
    assert list(model.buffers()) == []
