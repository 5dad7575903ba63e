import importlib

import pytest
import torch

from detkit.layers import ROIAlign
from tests.helpers import random_boxes, slow_roi_align


def _rois(count: int) -> torch.Tensor:
    # Some stick out of the 20 x 24 feature map at scale 1/4.
    return torch.cat([torch.arange(count)[:, None] % 2, random_boxes(count, size=110) - 8], dim=1)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("count", [0, 1, 6])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_the_slow_reference(aligned, sampling_ratio, count, memory_format):
    features = torch.randn(2, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    features = features.to(memory_format=memory_format)
    layer = ROIAlign(3, 0.25, sampling_ratio, aligned)
    want = slow_roi_align(features, _rois(count), 3, 0.25, sampling_ratio, aligned)
    torch.testing.assert_close(layer(features, _rois(count)), want, atol=1e-5, rtol=1e-4)


def test_aligned_box_over_whole_pixels_gives_their_values():
    features = torch.arange(48.0).reshape(1, 1, 6, 8)
    out = ROIAlign((2, 3), 1.0, 1)(features, torch.tensor([[0.0, 2.0, 1.0, 5.0, 3.0]]))
    assert torch.equal(out[0, 0], features[0, 0, 1:3, 2:5])


def test_channels_last_features_give_the_same():
    features = torch.randn(2, 4, 20, 24)
    layer = ROIAlign(3, 0.25, 2)
    torch.testing.assert_close(
        layer(features.to(memory_format=torch.channels_last), _rois(5)), layer(features, _rois(5))
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_reach_the_features(memory_format):
    features = torch.randn(1, 2, 6, 6).to(memory_format=memory_format).requires_grad_()
    ROIAlign(2, 1.0, 1)(features, torch.tensor([[0.0, 1.0, 1.0, 3.0, 3.0]])).sum().backward()
    assert features.grad is not None
    assert features.grad[0, 0].sum().item() == pytest.approx(4)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        pytest.param(
            torch.zeros(1, 4, 6, 6).to(memory_format=torch.channels_last), True, id="channels last"
        ),
        pytest.param(torch.zeros(1, 4, 6, 6), False, id="contiguous"),
        pytest.param(
            torch.zeros(1, 4, 6, 6).half().to(memory_format=torch.channels_last), True, id="float16"
        ),
    ],
)
def test_fast_way_is_taken_where_it_applies(features, expected, monkeypatch):
    calls = []
    # `detkit.layers.roi_align` is the function, as in Detectron2.
    roi_align = importlib.import_module("detkit.layers.roi_align")
    rows = roi_align.roi_align_rows
    monkeypatch.setattr(
        roi_align, "roi_align_rows", lambda *args: calls.append(args) or rows(*args)
    )
    out = ROIAlign(2, 1.0, 1)(features, torch.tensor([[0.0, 1.0, 1.0, 3.0, 3.0]]))
    assert out.shape == (1, 4, 2, 2)
    assert out.dtype == features.dtype
    assert bool(calls) == expected


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_autocast_features_in_low_precision_are_resampled(memory_format):
    features = torch.ones(1, 4, 6, 6, dtype=torch.bfloat16).to(memory_format=memory_format)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ROIAlign(2, 1.0, 1)(features, torch.tensor([[0.0, 1.0, 1.0, 3.0, 3.0]]))
    assert torch.equal(out.float(), torch.ones(1, 4, 2, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_regions_keep_their_place_when_features_are_in_low_precision(dtype):
    distance = (torch.arange(1100) - 1001).abs().to(dtype).expand(1, 1, 2, 1100)
    out = ROIAlign(1, 1.0, 1)(distance, torch.tensor([[0.0, 1001.0, 0.0, 1002.0, 1.0]]))
    assert out.dtype == dtype
    assert out.item() == 0


def test_channels_last_features_can_be_exported():
    features = torch.randn(1, 4, 6, 6).to(memory_format=torch.channels_last)
    rois = torch.tensor([[0.0, 1.0, 1.0, 3.0, 3.0]])
    exported = torch.export.export(ROIAlign(2, 1.0, 1), (features, rois)).module()
    torch.testing.assert_close(exported(features, rois), ROIAlign(2, 1.0, 1)(features, rois))


def test_regions_without_image_index_are_an_error():
    with pytest.raises(AssertionError, match=r"need regions \(R, 5\).*got \(2, 4\)"):
        ROIAlign(2, 1.0, 1)(torch.zeros(1, 1, 4, 4), random_boxes(2))
