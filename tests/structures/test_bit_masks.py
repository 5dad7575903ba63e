import numpy as np
import pytest
import torch

from detkit.structures import (
    BitMasks,
    Boxes,
    Instances,
    PolygonMasks,
    ROIMasks,
    paste_masks_in_image,
)
from tests.helpers import slow_roi_align


def random_bits(count, height=12, width=9, seed=0):
    return torch.rand(count, height, width, generator=torch.Generator().manual_seed(seed)) < 0.3


def slow_box(bitmap):
    points = [
        (x, y) for y, row in enumerate(bitmap.tolist()) for x, pixel in enumerate(row) if pixel
    ]
    if not points:
        return [0, 0, 0, 0]
    x, y = zip(*points, strict=True)
    return [min(x), min(y), max(x) + 1, max(y) + 1]


def test_bool_tensor_is_kept_and_numbers_become_bool():
    bits = random_bits(2)
    assert BitMasks(bits).tensor is bits
    assert BitMasks(np.array([[[0, 3]]], dtype=np.uint8)).tensor.tolist() == [[[False, True]]]
    assert BitMasks(bits).image_size == (12, 9)


@pytest.mark.parametrize("shape", [(4,), (2, 5), (1, 2, 4, 4)])
def test_other_shapes_are_an_error(shape):
    with pytest.raises(ValueError, match=r"bit masks are \(M, H, W\): got"):
        BitMasks(torch.zeros(shape))


@pytest.mark.parametrize("count", [0, 1, 7])
def test_bounding_boxes_equal_the_slow_reference(count):
    bits = random_bits(count) & (torch.arange(9) > 2)
    bits[:1] = False
    boxes = BitMasks(bits).get_bounding_boxes()
    assert boxes.tensor.shape == (count, 4)
    assert boxes.tensor.tolist() == [slow_box(bitmap) for bitmap in bits]


def test_boxes_of_an_image_without_pixels_are_zeros():
    assert BitMasks(torch.zeros(2, 0, 5)).get_bounding_boxes().tensor.tolist() == [[0] * 4] * 2


def test_area_and_nonempty_count_pixels():
    masks = BitMasks(torch.tensor([[[1, 0], [1, 1]], [[0, 0], [0, 0]]]))
    assert masks.area().tolist() == [3, 0]
    assert masks.nonempty().tolist() == [True, False]
    assert BitMasks(torch.zeros(0, 2, 2)).nonempty().shape == (0,)


def test_polygons_are_rasterised_one_by_one():
    polygons = [[[1, 1, 4, 1, 4, 3, 1, 3]], []]
    masks = BitMasks.from_polygon_masks(polygons, 5, 6)
    assert torch.equal(
        masks.tensor, BitMasks.from_polygon_masks(PolygonMasks(polygons), 5, 6).tensor
    )
    assert masks.get_bounding_boxes().tensor.tolist() == [[1, 1, 4, 3], [0, 0, 0, 0]]
    assert masks.area().tolist() == [6, 0]


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        pytest.param(1, [1], id="int"),
        pytest.param(-1, [3], id="last"),
        pytest.param(slice(1, 3), [1, 2], id="slice"),
        pytest.param(torch.tensor([True, False, False, True]), [0, 3], id="mask"),
        pytest.param(torch.tensor([2, 0, 2]), [2, 0, 2], id="indices"),
        pytest.param([3, 1], [3, 1], id="list"),
        pytest.param([], [], id="empty list"),
        pytest.param(torch.zeros(4, dtype=torch.bool), [], id="nothing"),
    ],
)
def test_indexing_gives_bit_masks(item, expected):
    bits = random_bits(4)
    selected = BitMasks(bits)[item]
    assert isinstance(selected, BitMasks)
    assert torch.equal(selected.tensor, bits[expected])


def test_selected_masks_share_their_bitmaps_and_give_the_same_crops():
    bits = random_bits(3)
    boxes = torch.tensor(
        [[1.2, 0.7, 8.0, 9.0], [-2.0, -1.0, 4.0, 14.0], [3.0, 3.0, 5.5, 4.5], [0.0, 0, 9, 12]]
    )
    picked = torch.tensor([2, 0, 2, 2])
    selected = BitMasks(bits)[picked]
    assert len(selected) == 4
    assert torch.equal(
        selected.crop_and_resize(boxes, 5), BitMasks(bits[picked]).crop_and_resize(boxes, 5)
    )
    assert (
        selected.to("cpu")._bitmaps.data_ptr() == bits.data_ptr()
    )  # nothing has been copied so far
    again = selected[torch.tensor([False, True, True, False])]
    assert torch.equal(
        again.crop_and_resize(boxes[1:3], 5), BitMasks(bits[[0, 2]]).crop_and_resize(boxes[1:3], 5)
    )
    assert torch.equal(again.tensor, bits[[0, 2]])
    assert torch.equal(selected.tensor, bits[picked])
    assert torch.equal(selected[1:].tensor, bits[[0, 2, 2]])
    assert (
        BitMasks.cat([again, selected]).area().tolist()
        == bits[[0, 2, 2, 0, 2, 2]].sum(dim=(1, 2)).tolist()
    )


def test_no_masks_selected_from_some_have_no_crops():
    selected = BitMasks(random_bits(3))[torch.zeros(0, dtype=torch.int64)]
    assert selected.crop_and_resize(torch.empty(0, 4), 5).shape == (0, 5, 5)
    assert selected.tensor.shape == (0, 12, 9)


def test_index_into_pixels_is_an_error():
    with pytest.raises(
        ValueError, match=r"4 masks are indexed by a row of indices: got shape \(4, 12\)"
    ):
        BitMasks(random_bits(4))[torch.zeros(4, 12, dtype=torch.bool)]


def test_iteration_gives_each_mask():
    bits = random_bits(3)
    assert torch.equal(torch.stack(list(BitMasks(bits))), bits)


def test_cat_joins_in_order():
    a, b = random_bits(2, seed=1), random_bits(3, seed=2)
    assert torch.equal(BitMasks.cat([BitMasks(a), BitMasks(b)]).tensor, torch.cat([a, b]))
    instances = Instances((12, 9), gt_masks=BitMasks(a))
    assert torch.equal(Instances.cat([instances, instances[:1]]).gt_masks.tensor, a[[0, 1, 0]])
    with pytest.raises(ValueError, match="at least one BitMasks"):
        BitMasks.cat([])
    with pytest.raises(TypeError, match="BitMasks.cat takes BitMasks: item 0 is Tensor"):
        BitMasks.cat([a])


def test_crop_equals_half_of_the_slow_roi_align():
    bits = random_bits(3)
    boxes = torch.tensor([[1.2, 0.7, 8.0, 9.0], [-2.0, -1.0, 4.0, 14.0], [3.0, 3.0, 5.5, 4.5]])
    crop = BitMasks(bits).crop_and_resize(boxes, 4)
    for i in range(3):
        roi = torch.cat([torch.zeros(1), boxes[i]])[None]
        covered = slow_roi_align(bits[i : i + 1, None].float(), roi, 4, 1.0, 0, aligned=True)[0, 0]
        assert torch.equal(crop[i], covered >= 0.5)


def test_crop_of_the_whole_image_is_the_mask():
    bits = random_bits(2, 8, 8)
    assert torch.equal(BitMasks(bits).crop_and_resize(torch.tensor([[0.0, 0, 8, 8]] * 2), 8), bits)


def test_crop_of_nothing_is_nothing():
    assert BitMasks(torch.zeros(0, 5, 6)).crop_and_resize(torch.empty(0, 4), 28).shape == (
        0,
        28,
        28,
    )


def test_crop_without_a_box_each_is_an_error():
    with pytest.raises(
        ValueError, match=r"need a box \(x1, y1, x2, y2\) per mask: got \(2, 4\) for 3 masks"
    ):
        BitMasks(random_bits(3)).crop_and_resize(torch.zeros(2, 4), 4)


def test_polygons_and_bitmaps_give_nearly_the_same_crops():
    circle = np.stack([np.cos(a := np.linspace(0, 2 * np.pi, 40)), np.sin(a)], axis=1) * 30 + 50
    polygons = PolygonMasks([[circle.reshape(-1)]])
    box = Boxes([[18, 22, 83, 76]]).tensor
    a, b = (
        polygons.crop_and_resize(box, 28),
        BitMasks.from_polygon_masks(polygons, 100, 100).crop_and_resize(box, 28),
    )
    assert (a != b).float().mean() < 0.02
    assert 0.5 < a.float().mean() < 1


def random_masks(count):
    return torch.rand(count, 6, 6, generator=torch.Generator().manual_seed(0))


def test_bitmasks_are_pasted_masks():
    masks, boxes = random_masks(2), Boxes([[1, 2, 9, 8], [0, 0, 5, 7]])
    pasted = paste_masks_in_image(masks, boxes, (10, 12), 0.4)
    bitmasks = ROIMasks(masks).to_bitmasks(boxes, 10, 12, 0.4)
    assert isinstance(bitmasks, BitMasks)
    assert torch.equal(bitmasks.tensor, pasted)
    assert torch.equal(
        BitMasks.from_roi_masks(ROIMasks(masks), boxes.tensor, 10, 12, 0.4).tensor, pasted
    )


def test_indexing_and_joining():
    masks = ROIMasks(random_masks(3))
    assert torch.equal(masks[1].tensor, masks.tensor[1:2])
    assert torch.equal(masks[torch.tensor([True, False, True])].tensor, masks.tensor[[0, 2]])
    instances = Instances((10, 12), pred_masks=masks)
    joined = Instances.cat([instances[1:], instances.to("cpu")]).pred_masks
    assert torch.equal(joined.tensor, masks.tensor[[1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match="at least one ROIMasks"):
        ROIMasks.cat([])


def test_roi_masks_of_other_shapes_are_an_error():
    with pytest.raises(
        ValueError, match=r"masks of regions are \(M, h, w\): got shape \(2, 1, 6, 6\)"
    ):
        ROIMasks(torch.zeros(2, 1, 6, 6))


def test_cell_that_is_half_covered_belongs_to_the_crop():
    mask = torch.zeros(1, 4, 4)
    mask[:, :, :3] = 1  # the second of two cells along x holds one covered column of two
    crop = BitMasks(mask).crop_and_resize(torch.tensor([[0.0, 0, 4, 4]]), 2)
    assert crop.tolist() == [[[True, True], [True, True]]]


def test_bitmaps_can_be_replaced():
    masks = BitMasks(torch.ones(3, 4, 5))[[0, 2]]
    masks.tensor = torch.zeros(1, 6, 7, dtype=torch.bool)
    assert (len(masks), masks.image_size) == (1, (6, 7))
    assert masks.nonempty().tolist() == [False]
