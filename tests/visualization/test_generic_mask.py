from types import SimpleNamespace

import numpy as np
import torch

from detkit.visualization import GenericMask
from detkit.visualization.generic_mask import PanopticPrediction


def test_polygons_bitmap_and_box_of_a_square():
    square = [np.array([2.0, 3, 6, 3, 6, 8, 2, 8])]
    from_polygons = GenericMask(square, 10, 12)
    assert from_polygons.area() == 20
    assert from_polygons.bbox().tolist() == [2, 3, 6, 8]
    assert not from_polygons.has_holes
    from_bitmap = GenericMask(from_polygons.mask, 10, 12)
    assert from_bitmap.bbox().tolist() == [2, 3, 6, 8]
    again = GenericMask(from_bitmap.polygons, 10, 12)
    np.testing.assert_array_equal(again.mask, from_polygons.mask)


def test_holes_are_seen_and_nothing_has_no_box():
    ring = np.zeros((9, 9), np.uint8)
    ring[1:8, 1:8] = 1
    ring[3:5, 3:5] = 0
    assert GenericMask(ring, 9, 9).has_holes
    nothing = GenericMask(np.zeros((9, 9)), 9, 9)
    assert nothing.area() == 0
    assert nothing.polygons == []
    assert nothing.bbox().tolist() == [0, 0, 0, 0]


def test_segments_of_a_panoptic_result_by_kind():
    ids = torch.tensor([[1, 1, 2], [3, 0, 2]])
    info = [
        {"id": 1, "category_id": 5, "isthing": True},
        {"id": 2, "category_id": 6, "isthing": False},
        {"id": 9, "category_id": 6, "isthing": False},
    ]
    found = PanopticPrediction(ids, info)
    assert found.non_empty_mask().tolist() == [[True, True, True], [False, False, True]]
    assert [(m.sum(), i["id"]) for m, i in found.instance_masks()] == [(2, 1)]
    assert [(m.sum(), i["id"]) for m, i in found.semantic_masks()] == [(2, 2)]
    metadata = SimpleNamespace(label_divisor=100, thing_dataset_id_to_contiguous_id={7: 3})
    coded = PanopticPrediction(torch.tensor([[301, 200], [-1, 302]]), None, metadata)
    assert [i["category_id"] for _, i in coded.instance_masks()] == [3, 3]
    assert [i["category_id"] for _, i in coded.semantic_masks()] == [2]
