import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align

from detkit.layers.cpu import roi_align_rows as module
from detkit.layers.cpu.roi_align_rows import roi_align_rows
from tests.helpers import random_boxes


def _features() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 20, 24, generator=generator).to(memory_format=torch.channels_last)


def _rois(boxes: Tensor) -> Tensor:
    return torch.cat([torch.arange(len(boxes))[:, None] % 2, boxes], dim=1)


REGIONS = [
    pytest.param(random_boxes(40, size=110) - 8, id="random, some sticking out"),
    pytest.param(random_boxes(1, size=90), id="one"),
    pytest.param(torch.zeros(0, 4), id="none"),
    pytest.param(torch.tensor([[0.0, 0.0, 96.0, 4.0], [0.0, 0.0, 4.0, 80.0]]), id="long ones"),
    pytest.param(torch.tensor([[8.0, 8.0, 8.0, 8.0], [8.0, 8.0, 40.0, 8.0]]), id="without area"),
    pytest.param(torch.tensor([[40.0, 40.0, 8.0, 8.0]]), id="turned inside out"),
    pytest.param(
        torch.tensor([[500.0, 500.0, 600.0, 600.0], [-99.0, -99.0, -50.0, -50.0]]), id="outside"
    ),
    pytest.param(torch.tensor([[-4.0, -4.0, 100.0, 84.0]]), id="up to the border"),
]


@pytest.mark.parametrize("boxes", REGIONS)
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 3])
def test_values_and_gradients_equal_those_of_torchvision(boxes, aligned, sampling_ratio):
    arguments = (_rois(boxes), (3, 4), 0.25, sampling_ratio, aligned)
    ours, theirs = _features().requires_grad_(), _features().requires_grad_()
    got, want = roi_align_rows(ours, *arguments), roi_align(theirs, *arguments)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    factor = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    (got * factor).sum().backward()
    (want * factor).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)


def test_many_regions_are_done_in_parts(monkeypatch):
    arguments = (_rois(random_boxes(33, size=90)), (3, 4), 0.25, 0, True)
    whole = roi_align_rows(_features(), *arguments)
    monkeypatch.setattr(module, "_MAX_PIXELS", 100)
    assert torch.equal(roi_align_rows(_features(), *arguments), whole)


def test_result_is_channels_last():
    out = roi_align_rows(_features(), _rois(random_boxes(4)), (3, 4), 0.25, 0, True)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_regions_take_no_gradient():
    rois = _rois(random_boxes(4)).requires_grad_()
    assert not roi_align_rows(_features(), rois, (3, 4), 0.25, 0, True).requires_grad


@pytest.mark.parametrize(
    "box",
    [
        pytest.param([-1.5, -1.5, -0.5, -0.5], id="first"),
        pytest.param([23.5, 19.5, 24.5, 20.5], id="last"),
    ],
)
def test_sample_exactly_on_the_outer_border_counts(box):
    # The map has 20 x 24 pixels; the only sample lies at -1, or at (24, 20).
    arguments = (_rois(torch.tensor([box])), (1, 1), 1.0, 1, False)
    got = roi_align_rows(_features(), *arguments)
    assert got.abs().max() > 0
    torch.testing.assert_close(got, roi_align(_features(), *arguments))
