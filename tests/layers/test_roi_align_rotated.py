import sys

import pytest
import torch

from detkit.layers import ROIAlign, ROIAlignRotated
from tests.helpers import DEVICES, random_boxes, random_rotated_boxes, slow_roi_align_rotated
from tests.structures.test_rotated_boxes import as_rotated


def _features(dtype=torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, 20, 24, generator=torch.Generator().manual_seed(0)).to(dtype)


def _rois(count: int) -> torch.Tensor:
    # Some stick out of the 20 x 24 feature map at scale 1/4.
    boxes = random_rotated_boxes(count, size=110)
    return torch.cat([torch.arange(count)[:, None] % 2, boxes], dim=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_the_slow_reference(sampling_ratio, count, memory_format, device):
    features, rois = _features().to(memory_format=memory_format), _rois(count)
    if count:
        rois[0, 3] = 0  # no samples where one is taken per pixel
    found = ROIAlignRotated((3, 4), 0.25, sampling_ratio)(features.to(device), rois.to(device))
    want = slow_roi_align_rotated(features, rois, (3, 4), 0.25, sampling_ratio)
    torch.testing.assert_close(found.cpu(), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_upright_regions_give_the_features_of_roi_align(sampling_ratio):
    boxes = random_boxes(6, size=110) - 8
    image = torch.arange(6)[:, None] % 2
    want = ROIAlign(3, 0.25, sampling_ratio)(_features(), torch.cat([image, boxes], dim=1))
    rois = torch.cat([image, as_rotated(boxes)], dim=1)
    found = ROIAlignRotated(3, 0.25, sampling_ratio)(_features(), rois)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_region_turned_counter_clockwise_reads_the_image_turned_clockwise(turns):
    features = torch.arange(36.0).reshape(1, 1, 6, 6)
    found = ROIAlignRotated(6, 1.0, 1)(features, torch.tensor([[0, 3.0, 3, 6, 6, 90 * turns]]))
    torch.testing.assert_close(found[0, 0], features[0, 0].rot90(-turns), atol=1e-4, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sampling_ratio", [0, 1])
def test_gradient_of_the_features(sampling_ratio, device):
    features = torch.rand(1, 2, 8, 10, dtype=torch.float64, device=device, requires_grad=True)
    rois = torch.tensor(
        [[0, 9, 7, 8, 8, 0], [0, 4, 14, 8, 5, 30], [0, 4, 14, 8, 5, 30], [0, 5, 5, 40, 9, -45]],
        dtype=torch.float64,
        device=device,
    )
    layer = ROIAlignRotated((2, 3), 0.5, sampling_ratio)
    assert torch.autograd.gradcheck(lambda x: layer(x, rois), (features,))


def test_half_precision_features_are_pooled_in_float32():
    features = _features(torch.bfloat16)
    layer = ROIAlignRotated(3, 0.25, 0)
    found = layer(features, _rois(5))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, layer(features.float(), _rois(5)).bfloat16())


def test_small_steps_give_the_same(monkeypatch):
    layer = ROIAlignRotated(3, 0.25, 0)
    whole = layer(_features(), _rois(9))
    # Not by its name: the package has the function of this name.
    monkeypatch.setattr(sys.modules[ROIAlignRotated.__module__], "_MAX_SAMPLES", 30)
    assert torch.equal(layer(_features(), _rois(9)), whole)


def test_regions_that_are_no_numbers_give_zeros():
    rois = torch.tensor([[0, float("nan"), 3, 6, 6, 0], [0, 1e20, 3, 6, 6, 0]])
    assert not ROIAlignRotated(3, 0.25, 2)(_features(), rois).any()


def test_upright_regions_are_an_error():
    with pytest.raises(AssertionError, match=r"need regions \(R, 6\), image index and XYWHA: got"):
        ROIAlignRotated(3, 1.0, 0)(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5))
