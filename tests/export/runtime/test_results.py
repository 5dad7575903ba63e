import numpy as np
import pytest
import torch

from detkit.export.runtime.results import (
    Detections,
    merged_segments,
    paste_masks,
    rescaled_detections,
)
from detkit.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detkit.modeling.postprocessing import detector_postprocess
from detkit.structures import Boxes, Instances


def _outputs(seed, count, size):
    rng = np.random.default_rng(seed)
    height, width = size
    corners = rng.uniform(-0.1, 1.1, (count, 2, 2)) * [width, height]
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)
    if count > 2:
        boxes[1] = boxes[1, [0, 1, 0, 3]]  # empty
    keypoints = rng.uniform(0, 50, (count, 4, 3)).astype(np.float32)
    coarse = rng.normal(size=(count, 4, 4))
    masks = 1 / (1 + np.exp(-4 * np.kron(coarse, np.ones((7, 7)))))
    return {
        "boxes": boxes,
        "scores": np.sort(rng.random(count).astype(np.float32))[::-1].copy(),
        "classes": rng.integers(0, 5, count),
        "masks": masks.astype(np.float32),
        "keypoints": keypoints,
    }


def _rescaled(outputs, size, original_size, **changes):
    settings = {"score_threshold": -np.inf, "mask_threshold": 0.5, "mask_pasted": False}
    return rescaled_detections(outputs, size, original_size, **(settings | changes))


@pytest.mark.parametrize("count", [0, 1, 30])
@pytest.mark.parametrize("original_size", [(60, 80), (31, 133), (200, 90)])
def test_objects_are_those_of_the_eager_postprocessing(count, original_size):
    size = (60, 80)
    outputs = _outputs(3, count, size)
    eager = Instances(size)
    eager.pred_boxes = Boxes(torch.from_numpy(outputs["boxes"]).clone())
    eager.scores = torch.from_numpy(outputs["scores"])
    eager.pred_classes = torch.from_numpy(outputs["classes"])
    eager.pred_masks = torch.from_numpy(outputs["masks"])[:, None]
    eager.pred_keypoints = torch.from_numpy(outputs["keypoints"])
    expected = detector_postprocess(eager, *original_size)
    found = _rescaled(outputs, size, original_size)
    assert len(found) == len(expected) == (count - 1 if count > 2 else count)
    assert np.array_equal(found.pred_boxes, expected.pred_boxes.tensor.numpy())
    assert np.array_equal(found.scores, expected.scores.numpy())
    assert np.array_equal(found.pred_classes, expected.pred_classes.numpy())
    assert np.array_equal(found.pred_keypoints, expected.pred_keypoints.numpy())
    masks = expected.pred_masks.numpy()
    assert found.pred_masks.shape == masks.shape
    # Sums in another order: a pixel whose probability is the threshold to seven digits.
    assert (found.pred_masks != masks).sum() <= masks.size * 1e-5
    assert count < 2 or masks.any()


def test_boxes_that_are_no_numbers_and_low_scores_are_dropped():
    outputs = _outputs(3, 2, (60, 80))
    outputs["scores"][:] = 0.9, 0.2
    assert len(_rescaled(outputs, (60, 80), (60, 80), score_threshold=0.5)) == 1
    assert len(_rescaled(outputs, (60, 80), (60, 80), score_threshold=0.9)) == 0
    outputs["boxes"][0, 2] = np.nan
    assert _rescaled(outputs, (60, 80), (60, 80)).scores.tolist() == [np.float32(0.2)]


def test_pasted_masks_are_cut_and_scaled():
    masks = np.zeros((1, 64, 96), bool)
    masks[0, 10:20, 8:40] = True
    masks[0, 60:] = True  # the padding of a batch
    outputs = _outputs(3, 1, (60, 80)) | {"masks": masks}
    found = _rescaled(outputs, (60, 80), (120, 160), mask_pasted=True)
    expected = np.zeros((1, 120, 160), bool)
    expected[0, 20:40, 16:80] = True
    assert (found.pred_masks != expected).sum() <= 4  # the corners
    same = _rescaled(outputs, (60, 80), (60, 80), mask_pasted=True).pred_masks
    assert np.array_equal(same, masks[:, :60, :80])


def test_mask_reaches_the_threshold_at_the_border_of_its_box():
    pasted = paste_masks(np.ones((1, 4, 4), np.float32), np.array([[2, 3, 6, 7.0]]), (9, 9), 0.5)
    assert np.argwhere(pasted[0]).min(axis=0).tolist() == [3, 2]
    assert pasted.sum() == 16
    half = np.full((1, 4, 4), 0.5, np.float32)
    assert paste_masks(half, np.array([[2, 3, 6, 7.0]]), (9, 9), 0.5).sum() == 16


def test_limits_of_the_merging_are_inclusive():
    masks = np.zeros((3, 1, 12), bool)
    masks[0, 0, :4] = masks[1, 0, 2:6] = masks[2, 0, 3:8] = True  # half of 1, and 3 of 5 of 2
    found = Detections(np.zeros((3, 4)), np.array([0.9, 0.5, 0.5]), np.array([1, 2, 3]), masks)
    labels = np.array([[0] * 6 + [2] * 4 + [3] * 2])
    limits = {"overlap_threshold": 0.5, "stuff_area_limit": 4, "instances_score_threshold": 0.5}
    segments, infos = merged_segments(found, labels, **limits)
    assert segments.tolist() == [[1] * 4 + [2] * 2 + [3] * 4 + [0] * 2]
    assert [info["category_id"] for info in infos] == [1, 2, 2]


@pytest.mark.parametrize("seed", range(4))
def test_segments_are_those_of_the_eager_merging(seed):
    rng = np.random.default_rng(seed)
    count, height, width = 8, 40, 50
    masks = np.zeros((count, height, width), bool)
    for mask in masks[:-1]:  # the last one is empty
        y, x = rng.integers(0, 30, 2)
        mask[y : y + rng.integers(1, 25), x : x + rng.integers(1, 25)] = True
    scores = rng.random(count).astype(np.float32)
    scores[3] = scores[2]
    classes = rng.integers(0, 3, count)
    labels = np.kron(rng.integers(0, 4, (4, 5)), np.ones((10, 10), int))
    eager = Instances((height, width))
    eager.pred_masks, eager.scores = torch.from_numpy(masks), torch.from_numpy(scores)
    eager.pred_classes = torch.from_numpy(classes)
    limits = (0.5, 150, 0.3)
    expected, infos = combine_semantic_and_instance_outputs(
        eager, torch.from_numpy(labels), *limits
    )
    found = Detections(np.zeros((count, 4)), scores, classes, masks)
    segments, segment_infos = merged_segments(
        found,
        labels,
        overlap_threshold=limits[0],
        stuff_area_limit=limits[1],
        instances_score_threshold=limits[2],
    )
    assert np.array_equal(segments, expected.numpy())
    assert segment_infos == infos
    assert {info["isthing"] for info in infos} == {True, False}


def test_detections_are_selected_in_every_field():
    found = Detections(np.arange(12.0).reshape(3, 4), np.array([0.9, 0.5, 0.1]), np.arange(3))
    part = found[found.scores > 0.2]
    assert len(part) == 2
    assert part.get_fields().keys() == {"pred_boxes", "scores", "pred_classes"}
    assert part.pred_classes is not None
    assert part.pred_classes.tolist() == [0, 1]
