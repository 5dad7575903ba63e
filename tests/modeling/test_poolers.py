"""Tests of detkit.modeling.poolers."""

import pytest
import torch
from torchvision.ops import roi_align

from detkit.modeling.poolers import (
    ROIPooler,
    assign_boxes_to_levels,
    convert_boxes_to_pooler_format,
)
from detkit.structures import Boxes, RotatedBoxes
from tests.structures.test_rotated_boxes import as_rotated


def boxes_of_side(*sides):
    return Boxes(
        torch.tensor([[10.0, 20.0, 10.0 + side, 20.0 + side] for side in sides]).reshape(-1, 4)
    )


def make(scales=(1 / 4, 1 / 8, 1 / 16, 1 / 32), **kwargs):
    arguments = {"output_size": 3, "sampling_ratio": 2, "pooler_type": "ROIAlignV2", **kwargs}
    return ROIPooler(scales=scales, **arguments)


def pyramid(num_images=2, channels=3, strides=(4, 8, 16, 32), side=512):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(num_images, channels, side // s, side // s, generator=generator)
        for s in strides
    ]


@pytest.mark.parametrize(
    ("side", "level"),
    [(0, 0), (1, 0), (111, 0), (112, 1), (223, 1), (224, 2), (447, 2), (448, 3), (5000, 3)],
)
def test_level_follows_the_size_of_the_box(side, level):
    assert assign_boxes_to_levels([boxes_of_side(side)], 2, 5, 224, 4).tolist() == [level]


def test_level_goes_by_area_not_by_side():
    boxes = Boxes(torch.tensor([[0.0, 0, 448, 112], [0, 0, 112, 448]]))
    assert assign_boxes_to_levels([boxes], 2, 5, 224, 4).tolist() == [2, 2]


def test_pooler_format_prepends_the_image():
    boxes = [boxes_of_side(5), boxes_of_side(), boxes_of_side(6, 7)]
    rois = convert_boxes_to_pooler_format(boxes)
    assert rois[:, 0].tolist() == [0, 2, 2]
    torch.testing.assert_close(rois[:, 1:], Boxes.cat(boxes).tensor)


def test_regions_are_pooled_from_their_level_and_keep_their_order():
    x = pyramid()
    box_lists = [boxes_of_side(300, 20, 150), boxes_of_side(460, 30)]
    pooled = make()(x, box_lists)
    levels = assign_boxes_to_levels(box_lists, 2, 5, 224, 4).tolist()
    assert levels == [2, 0, 1, 3, 0]
    rois = convert_boxes_to_pooler_format(box_lists)
    for i, level in enumerate(levels):
        alone = roi_align(x[level], rois[i : i + 1], (3, 3), 1 / (4 * 2**level), 2, aligned=True)
        torch.testing.assert_close(pooled[i : i + 1], alone)


def test_single_level_takes_every_region():
    x = pyramid(strides=(16,))
    pooled = make(scales=(1 / 16,))(x, [boxes_of_side(300, 20), boxes_of_side(460)])
    assert pooled.shape == (3, 3, 3, 3)


def test_box_without_a_size_is_pooled_from_the_finest_level():
    boxes = Boxes([[9, 0, 3, 4], [0, 0, 100, 100]])
    assert assign_boxes_to_levels([boxes], 2, 3, 50, 3).tolist() == [0, 1]
    features = [torch.ones(1, 1, 32, 32), torch.ones(1, 1, 16, 16)]
    pooled = ROIPooler(2, (1 / 4, 1 / 8), 0, "ROIAlignV2", 50, 3)(features, [boxes])
    assert pooled.shape == (2, 1, 2, 2)
    torch.testing.assert_close(pooled[1], torch.ones(1, 2, 2))


def test_roialign_is_half_a_pixel_off():
    x = pyramid()
    boxes = [boxes_of_side(50), boxes_of_side(50)]
    shifted = [Boxes(b.tensor + 2) for b in boxes]  # half a pixel of p2
    torch.testing.assert_close(make(pooler_type="ROIAlign")(x, boxes), make()(x, shifted))


def test_no_regions_give_an_empty_tensor_in_the_graph():
    x = [f.requires_grad_() for f in pyramid()]
    pooled = make()(x, [boxes_of_side(), boxes_of_side()])
    assert pooled.shape == (0, 3, 3, 3)
    pooled.sum().backward()
    assert all(f.grad is not None and not f.grad.any() for f in x)


def test_gradient_reaches_the_level_of_the_region():
    x = [f.requires_grad_() for f in pyramid()]
    make()(x, [boxes_of_side(300), boxes_of_side()]).sum().backward()
    assert [bool(f.grad.any()) for f in x] == [False, False, True, False]


def test_levels_need_a_feature_each():
    with pytest.raises(ValueError, match="has 4 levels, got 1 features"):
        make()(pyramid(strides=(4,)), [boxes_of_side(3), boxes_of_side(3)])


def test_images_need_regions_each():
    with pytest.raises(ValueError, match="each of 2 images, got 1 sets"):
        make()(pyramid(), [boxes_of_side(3)])


@pytest.mark.parametrize("scales", [(1.0,), (1 / 4, 1 / 8)], ids=["one map", "two maps"])
def test_no_images_give_no_regions(scales):
    maps = [torch.zeros(0, 32, 8, 8)] * len(scales)
    assert make(scales=scales)(maps, []).shape == (0, 32, 3, 3)


@pytest.mark.parametrize("scales", [(1 / 4, 1 / 16), (1 / 3,), ()], ids=["gap", "no-power", "none"])
def test_scales_must_be_powers_without_a_gap(scales):
    with pytest.raises(ValueError, match="strides that double"):
        make(scales=scales)


def test_unknown_type_offers_a_near_miss():
    with pytest.raises(
        ValueError,
        match="pooler_type must be one of ROIAlign, ROIAlignV2.*Did you mean 'ROIAlignV2'",
    ):
        make(pooler_type="RoIAlignV2")


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("scales", [(1 / 16,), (1 / 4, 1 / 8, 1 / 16, 1 / 32)], ids=["one", "four"])
def test_rotated_regions_at_angle_0_are_pooled_as_upright_ones(scales, sampling_ratio):
    x = pyramid(strides=[round(1 / scale) for scale in scales])
    box_lists = [boxes_of_side(300, 20, 150), boxes_of_side(), boxes_of_side(460)]
    x = [torch.cat([x_l, x_l[:1]]) for x_l in x]
    rotated = [RotatedBoxes(as_rotated(boxes.tensor)) for boxes in box_lists]
    found = make(scales, pooler_type="ROIAlignRotated", sampling_ratio=sampling_ratio)(x, rotated)
    expected = make(scales, sampling_ratio=sampling_ratio)(x, box_lists)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_roipool_is_the_maximum_over_whole_pixels(dtype):
    x = torch.arange(64.0, dtype=dtype).reshape(1, 1, 8, 8)
    pooler = ROIPooler(2, (1 / 4,), 0, "ROIPool")
    found = pooler([x], [Boxes(torch.tensor([[0.0, 0, 15, 15]]))])  # pixels 0 to 4 of both sides
    assert found.dtype == dtype
    assert found.flatten().tolist() == [18.0, 20.0, 34.0, 36.0]
