import numpy as np
import pytest
import torch

from detkit.model_zoo.testing import (
    assert_instances_allclose,
    get_model_no_weights,
    get_sample_coco_image,
    random_boxes,
)
from detkit.structures import Boxes, Instances


def test_random_boxes_have_room():
    boxes = random_boxes(50, max_coord=40)
    assert boxes.min() >= 1
    assert boxes.max() <= 40
    assert (boxes[:, 2:] - boxes[:, :2] >= 1 - 1e-4).all()


def test_picture_is_an_array_or_a_tensor():
    array, tensor = get_sample_coco_image(tensor=False), get_sample_coco_image()
    assert array.dtype == np.uint8
    assert tensor.shape == (3, *array.shape[:2])


def test_model_has_no_weights_to_load():
    model = get_model_no_weights("COCO-Detection/rpn_R_50_C4_1x.yaml")
    assert type(model).__name__ == "ProposalNetwork"


def test_differences_of_instances_are_named():
    first = Instances((4, 5), pred_boxes=Boxes([[0.0, 0, 1, 1]]), pred_classes=torch.tensor([1]))
    same = Instances((4, 5), pred_boxes=Boxes([[0.0, 0, 1, 1]]), pred_classes=torch.tensor([1]))
    assert_instances_allclose(first, same)
    same.pred_boxes = Boxes([[0.0, 0, 1, 2]])
    with pytest.raises(AssertionError, match="pred_boxes differs by 1"):
        assert_instances_allclose(first, same)
    same.remove("pred_boxes")
    with pytest.raises(AssertionError, match="fields"):
        assert_instances_allclose(first, same)
