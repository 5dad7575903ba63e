import numpy as np
import pytest
import torch

from detkit.structures import BitMasks, Boxes, Instances, PolygonMasks
from detkit.structures.polygon_masks import rasterize_polygons_within_box


def square(x, y, side):
    return np.array([x, y, x + side, y, x + side, y + side, x, y + side], dtype=np.float64)


def three():
    return PolygonMasks([[square(1, 2, 4)], [], [square(10, 0, 2), square(0, 10, 3).tolist()]])


def test_areas_and_boxes_by_hand():
    masks = three()
    assert masks.area().tolist() == [16, 0, 13]
    assert masks.get_bounding_boxes().tensor.tolist() == [
        [1, 2, 5, 6],
        [0, 0, 0, 0],
        [0, 0, 12, 13],
    ]
    assert masks.nonempty().tolist() == [True, False, True]
    assert len(masks) == 3
    assert [len(polygons) for polygons in masks] == [1, 0, 2]


def test_box_beside_the_origin_is_found():
    assert PolygonMasks([[square(-9, -8, 2)]]).get_bounding_boxes().tensor.tolist() == [
        [-9, -8, -7, -6]
    ]


def test_nothing_is_nothing():
    masks = PolygonMasks([])
    assert len(masks) == 0
    assert masks.area().shape == (0,)
    assert masks.nonempty().shape == (0,)
    assert masks.nonempty().dtype == torch.bool
    assert len(masks.get_bounding_boxes()) == 0
    assert masks.crop_and_resize(torch.empty(0, 4), 28).shape == (0, 28, 28)
    assert len(PolygonMasks.cat([])) == 0


def test_float64_arrays_are_kept_without_a_copy():
    polygon = square(0, 0, 3)
    assert PolygonMasks([[polygon]]).polygons[0][0] is polygon
    assert PolygonMasks([[torch.from_numpy(polygon)]]).polygons[0][0].tolist() == polygon.tolist()


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        pytest.param(0, [0], id="int"),
        pytest.param(-1, [2], id="last"),
        pytest.param(slice(1, 3), [1, 2], id="slice"),
        pytest.param(torch.tensor([True, False, True]), [0, 2], id="mask"),
        pytest.param(torch.tensor([2, 0, 2]), [2, 0, 2], id="indices"),
        pytest.param([1, 0], [1, 0], id="list"),
        pytest.param(torch.zeros(3, dtype=torch.bool), [], id="nothing"),
    ],
)
def test_indexing_gives_polygon_masks(item, expected):
    masks = three()
    selected = masks[item]
    assert isinstance(selected, PolygonMasks)
    assert selected.area().tolist() == masks.area()[expected].tolist()


def test_bool_mask_of_another_length_is_an_error():
    with pytest.raises(IndexError, match=r"a bool mask for 3 polygon masks has shape \(2,\)"):
        three()[torch.tensor([True, False])]


def test_cat_joins_in_order():
    joined = PolygonMasks.cat([three(), PolygonMasks([]), PolygonMasks([[square(0, 0, 1)]])])
    assert joined.area().tolist() == [16, 0, 13, 1]
    with pytest.raises(TypeError, match="PolygonMasks.cat takes PolygonMasks: item 1 is list"):
        PolygonMasks.cat([three(), []])


def test_instances_with_polygons_are_joined_and_moved():
    instances = Instances((20, 20), gt_masks=three(), gt_boxes=Boxes(torch.zeros(3, 4)))
    joined = Instances.cat([instances.to("cpu"), instances[1:]])
    assert joined.gt_masks.area().tolist() == [16, 0, 13, 0, 13]


@pytest.mark.parametrize(
    ("polygons", "kind", "message"),
    [
        pytest.param(
            [[[0, 0, 1, 1]]],
            ValueError,
            "polygon 0 of object 0: .* at least 3 points: got 2",
            id="2 points",
        ),
        pytest.param(
            [[], [[0] * 7]], ValueError, "polygon 0 of object 1: .* y for every x: got 7", id="odd"
        ),
        pytest.param(
            [[0, 0, 1, 1, 2, 2]],
            ValueError,
            "polygon 0 of object 0: .* flat list",
            id="a level missing",
        ),
        pytest.param(
            [np.zeros(6)],
            ValueError,
            "list of polygons per object: object 0 is ndarray",
            id="array",
        ),
        pytest.param(
            np.zeros((1, 1, 6)), ValueError, "takes a list .* got ndarray", id="all in one array"
        ),
    ],
)
def test_bad_polygons_are_an_error(polygons, kind, message):
    with pytest.raises(kind, match=message):
        PolygonMasks(polygons)


def test_crop_of_the_whole_image_is_the_bitmap():
    masks = three()
    expected = BitMasks.from_polygon_masks(masks, 16, 16).tensor
    assert torch.equal(masks.crop_and_resize(torch.tensor([[0.0, 0, 16, 16]] * 3), 16), expected)


def test_crop_moves_and_scales_with_the_box():
    masks = PolygonMasks([[square(10, 20, 8)]])
    crop = masks.crop_and_resize(torch.tensor([[10.0, 20, 26, 28]]), 8)[0]
    assert torch.equal(crop, (torch.arange(8) < 4).expand(8, 8))
    moved = PolygonMasks([[square(10, 20, 8) * 2 + 5]])
    again = moved.crop_and_resize(torch.tensor([[25.0, 45, 57, 61]]), 8)[0]
    assert torch.equal(again, crop)


def test_crop_to_a_box_without_extent_is_finite():
    crop = PolygonMasks([[square(0, 0, 8)]]).crop_and_resize(torch.tensor([[4.0, 4, 4, 4]]), 4)
    assert crop.shape == (1, 4, 4)
    assert crop.all()  # the smallest side is 0.1 pixels


def test_crop_without_a_box_each_is_an_error():
    with pytest.raises(
        ValueError, match=r"need a box \(x1, y1, x2, y2\) per mask: got \(2, 4\) for 3 masks"
    ):
        three().crop_and_resize(torch.zeros(2, 4), 4)


def test_box_smaller_than_a_pixel_is_enlarged_to_the_grid():
    # The polygon covers the left half of a box that is half a pixel wide and high.
    left_half = [[1.0, 1.0, 1.25, 1.0, 1.25, 1.5, 1.0, 1.5]]
    crop = PolygonMasks([left_half]).crop_and_resize(torch.tensor([[1.0, 1.0, 1.5, 1.5]]), 4)
    assert crop.tolist() == [[[True, True, False, False]] * 4]


def test_polygons_on_a_grid_over_a_box():
    square = np.array([2.0, 2, 6, 2, 6, 6, 2, 6])
    grid = rasterize_polygons_within_box([square], np.array([0.0, 0, 8, 8]), 4)
    assert grid.tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
