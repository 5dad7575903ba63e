"""From annotations to ground truth: modes, transforms, clipping, what is dropped."""

import copy

import numpy as np
import pytest
import torch

from detkit.data import (
    annotations_to_instances,
    check_image_size,
    filter_empty_instances,
    transform_instance_annotations,
)
from detkit.data import transforms as T
from detkit.data.annotations import boxes_of, transformed_masks
from detkit.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks
from detkit.structures.mask_formats import bitmask_to_rle
from detkit.utils.image import BadImageError, SizeMismatchError


def annotation(box=(1, 2, 10, 8), mode=BoxMode.XYWH_ABS, category_id=0, **more):
    return {"bbox": list(box), "bbox_mode": mode, "category_id": category_id, **more}


def test_boxes_of_several_modes_come_out_as_corners():
    annotations = [
        annotation(),
        annotation((1, 2, 11, 10), BoxMode.XYXY_ABS),
        annotation((6, 6, 10, 8, 0), BoxMode.XYWHA_ABS),
    ]
    assert boxes_of(annotations).tolist() == [[1, 2, 11, 10], [1, 2, 11, 10], [1, 2, 11, 10]]
    assert boxes_of(annotations[:1]).tolist() == [[1, 2, 11, 10]]
    assert boxes_of([]).shape == (0, 4)


def test_boxes_do_not_change_the_annotations():
    record = annotation()
    boxes_of([record])[:] = 0
    assert record["bbox"] == [1, 2, 10, 8]


def test_relative_boxes_are_refused():
    with pytest.raises(ValueError, match="no conversion from XYWH_REL"):
        boxes_of([annotation((0.1, 0.1, 0.5, 0.5), BoxMode.XYWH_REL)])


def test_box_is_transformed_and_clipped():
    transformed = transform_instance_annotations(annotation(), T.HFlipTransform(8), (9, 8))
    assert transformed["bbox"] == [0, 2, 7, 9]
    assert transformed["bbox_mode"] == BoxMode.XYXY_ABS
    assert (
        transform_instance_annotations(annotation(), [T.HFlipTransform(8)], (9, 8)) == transformed
    )


def test_mask_and_keypoints_move_with_the_image():
    record = annotation(segmentation=[[0, 0, 4, 0, 4, 4]], keypoints=[1, 2, 2, 3, 4, 1], area=7.0)
    before = copy.deepcopy(record)
    moved = transform_instance_annotations(
        record, T.HFlipTransform(32), (24, 32), keypoint_hflip_indices=[1, 0]
    )
    assert [polygon.tolist() for polygon in moved["segmentation"]] == [[32, 0, 28, 0, 28, 4]]
    assert moved["keypoints"].tolist() == [29, 4, 1, 31, 2, 2]
    assert moved["area"] == 7.0
    assert record == before


def test_run_lengths_become_the_bitmap_of_the_transformed_image():
    mask = np.zeros((24, 32), dtype=bool)
    mask[2:9, 3:20] = True
    record = annotation(segmentation=bitmask_to_rle(mask))
    moved = transform_instance_annotations(record, T.HFlipTransform(32), (24, 32))
    assert np.array_equal(moved["segmentation"], mask[:, ::-1])


def test_transformed_annotations_become_masks_and_keypoints():
    record = annotation(segmentation=[[0, 0, 4, 0, 4, 4]], keypoints=[1, 2, 2, 3, 4, 1])
    flip = T.HFlipTransform(32)
    moved = [
        transform_instance_annotations(record, flip, (24, 32), keypoint_hflip_indices=[1, 0])
    ] * 2
    instances = annotations_to_instances(moved, (24, 32))
    assert isinstance(instances.gt_masks, PolygonMasks)
    assert instances.gt_keypoints.tensor.shape == (2, 2, 3)
    drawn = annotations_to_instances(moved, (24, 32), mask_format="bitmask")
    assert isinstance(drawn.gt_masks, BitMasks)
    assert drawn.gt_masks.tensor.shape == (2, 24, 32)


def test_bad_mask_is_named():
    with pytest.raises(
        ValueError, match=r"annotation 5 of a.jpg: a polygon needs at least 3 points: got 2"
    ):
        transformed_masks(
            [annotation(id=5, segmentation=[[1, 1, 4, 4]])], T.NoOpTransform(), "a.jpg"
        )
    with pytest.raises(
        ValueError, match=r"the object at \[1, 2, 10, 8\] of a.jpg: it has no segmentation"
    ):
        transformed_masks([annotation()], T.NoOpTransform(), "a.jpg")


def test_annotations_become_instances():
    instances = annotations_to_instances([annotation(), annotation(category_id=5)], (24, 32))
    assert instances.image_size == (24, 32)
    assert instances.gt_boxes.tensor.tolist() == [[1, 2, 11, 10]] * 2
    assert instances.gt_classes.tolist() == [0, 5]
    assert instances.gt_classes.dtype == torch.int64


def test_no_annotations_become_no_instances():
    instances = annotations_to_instances([], (24, 32))
    assert len(instances) == 0
    assert instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_classes.shape == (0,)


def test_empty_boxes_are_dropped():
    boxes = torch.tensor([[0, 0, 5, 5], [3, 3, 3, 9], [0, 0, 5, 1e-6], [0, 0, float("nan"), 5]])
    instances = Instances((10, 10), gt_boxes=Boxes(boxes), gt_classes=torch.arange(4))
    assert filter_empty_instances(instances).gt_classes.tolist() == [0]
    kept, mask = filter_empty_instances(instances, box_threshold=4.0, return_mask=True)
    assert mask.tolist() == [True, False, False, False]
    assert len(kept) == 1
    assert len(instances) == 4


def test_filter_needs_a_criterion():
    with pytest.raises(ValueError, match="choose what to filter by"):
        filter_empty_instances(annotations_to_instances([], (4, 4)), by_box=False, by_mask=False)


def test_size_is_taken_from_the_image_where_the_record_has_none():
    record = {"file_name": "a.jpg", "image_id": 1}
    check_image_size(record, np.zeros((24, 32, 3)))
    assert (record["height"], record["width"]) == (24, 32)


def test_other_size_names_file_expected_and_found():
    record = {"file_name": "a.jpg", "image_id": 1, "height": 30, "width": 32}
    with pytest.raises(
        SizeMismatchError,
        match=r"image a\.jpg is 32x24 \(width x height\), but its record says 32x30\.$",
    ):
        check_image_size(record, np.zeros((24, 32, 3)))
    assert issubclass(SizeMismatchError, BadImageError)


def test_exchanged_sides_are_explained():
    record = {"file_name": "a.jpg", "image_id": 1, "height": 32, "width": 24}
    with pytest.raises(SizeMismatchError, match="sides are exchanged.*EXIF orientation"):
        check_image_size(record, np.zeros((24, 32, 3)))
