"""From annotations to ground truth: modes, transforms, clipping, what is dropped."""

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
from detkit.data.annotations import boxes_of
from detkit.structures import Boxes, BoxMode, Instances
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
    assert transform_instance_annotations(annotation(), [T.HFlipTransform(8)], (9, 8)) == transformed


def test_masks_and_keypoints_do_no_harm():
    record = annotation(segmentation=[[0, 0, 4, 0, 4, 4]], keypoints=[1, 2, 2], area=7.0)
    transformed = transform_instance_annotations(record, T.HFlipTransform(32), (24, 32))
    assert set(transformed) == {"bbox", "bbox_mode", "category_id", "area"}
    rle = annotation(segmentation={"size": [24, 32], "counts": "abc"})
    assert "segmentation" not in transform_instance_annotations(rle, T.NoOpTransform(), (24, 32))
    assert "segmentation" in record


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
        SizeMismatchError, match=r"image a\.jpg is 32x24 \(width x height\), but its record says 32x30\.$"
    ):
        check_image_size(record, np.zeros((24, 32, 3)))
    assert issubclass(SizeMismatchError, BadImageError)


def test_exchanged_sides_are_explained():
    record = {"file_name": "a.jpg", "image_id": 1, "height": 32, "width": 24}
    with pytest.raises(SizeMismatchError, match="sides are exchanged.*EXIF orientation"):
        check_image_size(record, np.zeros((24, 32, 3)))
