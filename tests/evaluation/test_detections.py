import numpy as np
import pytest
import torch

from detkit.evaluation.detections import (
    ImageDetections,
    detections_from_instances,
    detections_from_proposals,
    encode_masks,
    exact_iou,
    image_id_of,
    take_instances,
)
from detkit.structures import Boxes, Instances, bitmask_to_rle, rle_to_bitmask
from tests.helpers import iou_of_two_boxes, random_boxes


def test_overlap_is_that_of_the_slow_reference():
    boxes1, boxes2 = random_boxes(30, seed=1).numpy(), random_boxes(20, seed=2).numpy()
    expected = [[iou_of_two_boxes(a, b) for b in boxes2.tolist()] for a in boxes1.tolist()]
    np.testing.assert_allclose(exact_iou(boxes1, boxes2), expected, atol=1e-12)


def test_overlap_of_no_boxes_and_of_empty_boxes():
    assert exact_iou(np.zeros((0, 4)), np.zeros((3, 4))).shape == (0, 3)
    assert exact_iou(np.ones((1, 4)), np.ones((1, 4))) == 0


def test_detections_keep_what_the_model_gave(make_instances):
    instances = make_instances(([1, 2, 3.5, 4], 1, 0.25))
    detections = detections_from_instances("a", instances, "data", ["cat", "dog"])
    assert detections.image_id == "a"
    assert detections.boxes.tolist() == [[1, 2, 3.5, 4]]
    assert (detections.scores.tolist(), detections.classes.tolist()) == ([0.25], [1])


def test_half_precision_scores_are_taken():
    fields = {
        "pred_boxes": Boxes([[0, 0, 1, 1]]),
        "scores": torch.tensor([0.5], dtype=torch.bfloat16),
    }
    instances = Instances((9, 9), **fields, pred_classes=torch.tensor([0]))
    assert detections_from_instances(1, instances, "data", ["cat"]).scores.tolist() == [0.5]


def test_proposals_are_detections_of_one_class():
    proposals = Instances(
        (9, 9), proposal_boxes=Boxes([[0, 0, 1, 1]]), objectness_logits=torch.tensor([-2.0])
    )
    detections = detections_from_proposals(1, proposals)
    assert (detections.scores.tolist(), detections.classes.tolist()) == ([-2.0], [0])


@pytest.mark.parametrize(
    "detection",
    [
        pytest.param(([0, 0, 1, 1], 0, float("nan")), id="nan score"),
        pytest.param(([0, 0, float("inf"), 1], 0, 0.5), id="infinite box"),
    ],
)
def test_number_that_is_not_finite_is_an_error(detection, make_instances):
    instances = make_instances(([0, 0, 1, 1], 0, 0.5), detection)
    with pytest.raises(ValueError, match=r"1 of 2 detections in image 7 .* not finite"):
        detections_from_instances(7, instances, "data", ["cat"])


def test_input_without_image_id_is_an_error():
    with pytest.raises(
        ValueError, match=r"needs 'image_id' in every input of the model, got the keys \['height'\]"
    ):
        image_id_of({"height": 3})


def test_detections_told_in_arrays_are_the_same():
    masks = encode_masks(torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(1)) > 0.5)
    boxes, scores, classes = np.zeros((2, 4), np.float32), np.array([0.5, 0.25]), np.array([1, 0])
    whole = ImageDetections(3, boxes, scores, classes, masks, np.ones((2, 4, 3)))
    told = ImageDetections.from_arrays(3, whole.to_arrays())
    assert told.masks == masks
    for name in ("boxes", "scores", "classes", "keypoints"):
        np.testing.assert_array_equal(getattr(told, name), getattr(whole, name), strict=True)
    only_boxes = ImageDetections(3, boxes, scores, classes)
    assert ImageDetections.from_arrays(3, only_boxes.to_arrays()).masks is None


@pytest.mark.parametrize("count", [0, 1, 100, 250])
def test_masks_are_encoded_in_order_however_many(count: int) -> None:
    masks = torch.rand(count, 5, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    decoded = [rle_to_bitmask(rle) for rle in encode_masks(masks)]
    assert len(decoded) == count
    for mask, again in zip(masks.numpy(), decoded, strict=True):
        assert np.array_equal(mask, again)


def test_run_lengths_are_taken_as_they_are() -> None:
    masks = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    fields = {
        "pred_boxes": Boxes(torch.tensor([[0.0, 0, 4, 5]]).repeat(3, 1)),
        "scores": torch.ones(3),
        "pred_classes": torch.zeros(3, dtype=torch.int64),
    }
    bitmaps = Instances((5, 4), **fields, pred_masks=masks)
    rles = Instances((5, 4), **fields, pred_masks=[bitmask_to_rle(m) for m in masks.numpy()])
    names = ["pred_masks"]
    assert take_instances(0, rles, names).masks == take_instances(0, bitmaps, names).masks
