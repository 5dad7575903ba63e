import copy

import pytest
import torch
from torch import nn

from detkit.engine.buffer_snapshot import BufferSnapshot


@pytest.fixture
def model():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False))


def test_statistics_and_counters_come_back(model):
    model(torch.randn(2, 3, 4, 4))
    before = copy.deepcopy(model.state_dict())
    snapshot = BufferSnapshot(model)
    snapshot.take()
    for _ in range(2):
        model(torch.full((2, 3, 4, 4), torch.nan))
        assert model[1].running_mean.isnan().all()
        snapshot.restore()
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_second_snapshot_replaces_the_first(model):
    snapshot = BufferSnapshot(model)
    snapshot.take()
    model(torch.randn(2, 3, 4, 4))
    after = copy.deepcopy(model.state_dict())
    snapshot.take()
    model(torch.randn(2, 3, 4, 4))
    snapshot.restore()
    torch.testing.assert_close(model.state_dict(), after, rtol=0, atol=0)


def test_parameters_are_not_its_business(model):
    snapshot = BufferSnapshot(model)
    snapshot.take()
    nn.init.zeros_(model[0].weight)
    snapshot.restore()
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
def test_buffer_is_as_it_was(before, after):
    model = nn.Module()
    model.register_buffer("average", after)
    snapshot = BufferSnapshot(model)
    snapshot.take()
    model.average = before
    snapshot.take()
    model.average = after
    snapshot.restore()
    if before is None:
        assert model.average is None
    else:
        torch.testing.assert_close(model.average, before)


def test_buffer_that_was_not_there_goes():
    model = nn.Module()
    snapshot = BufferSnapshot(model)
    snapshot.take()
    model.register_buffer("average", torch.ones(1))
    snapshot.restore()
    assert list(model.buffers()) == []


def test_buffer_that_has_gone_in_between_is_forgotten():
    model = nn.Module()
    model.register_buffer("average", torch.ones(1))
    snapshot = BufferSnapshot(model)
    snapshot.take()
    del model.average
    snapshot.take()
    snapshot.restore()
    assert list(model.buffers()) == []
