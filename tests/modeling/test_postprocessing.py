"""Tests of detkit.modeling.postprocessing."""

import pytest
import torch

from detkit.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from detkit.structures import Boxes, Instances, ROIMasks, paste_masks_in_image


def results(boxes, name="pred_boxes"):
    instances = Instances((100, 200), scores=torch.arange(len(boxes)).float())
    instances.set(name, Boxes(torch.tensor(boxes).reshape(-1, 4)))
    return instances


@pytest.mark.parametrize("name", ["pred_boxes", "proposal_boxes"])
def test_boxes_are_scaled_per_axis(name):
    scaled = detector_postprocess(results([[10.0, 20, 30, 40]], name), 50, 400)
    assert scaled.image_size == (50, 400)
    torch.testing.assert_close(scaled.get(name).tensor, torch.tensor([[20.0, 10, 60, 20]]))


def test_boxes_are_clipped_and_the_empty_ones_go():
    scaled = detector_postprocess(
        results([[-10.0, -10, 250, 90], [5, 5, 5, 9], [210, 0, 220, 9]]), 100, 200
    )
    torch.testing.assert_close(scaled.pred_boxes.tensor, torch.tensor([[0.0, 0, 200, 90]]))
    assert scaled.scores.tolist() == [0]


def test_results_given_are_not_changed():
    given = results([[10.0, 20, 30, 400]])
    detector_postprocess(given, 50, 400)
    assert given.pred_boxes.tensor.tolist() == [[10, 20, 30, 400]]
    assert given.image_size == (100, 200)


def test_there_and_back_is_the_identity():
    given = results([[10.0, 20, 30, 40], [0, 0, 200, 100]])
    back = detector_postprocess(detector_postprocess(given, 333, 77), 100, 200)
    torch.testing.assert_close(back.pred_boxes.tensor, given.pred_boxes.tensor)


def test_no_results_stay_none():
    assert len(detector_postprocess(results([]), 50, 400)) == 0


def with_masks(masks):
    given = results([[10.0, 20, 30, 40], [5, 5, 5, 9], [0, 0, 80, 60]])
    given.pred_masks = masks
    return given


@pytest.mark.parametrize("kind", ["tensor", "ROIMasks"])
def test_masks_are_painted_at_the_new_size(kind):
    masks = torch.rand(3, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    given = with_masks(masks if kind == "tensor" else ROIMasks(masks[:, 0]))
    scaled = detector_postprocess(given, 50, 400, mask_threshold=0.4)
    assert scaled.pred_masks.shape == (2, 50, 400)
    assert scaled.pred_masks.dtype == torch.bool
    boxes = torch.tensor([[20.0, 10, 60, 20], [0, 0, 160, 30]])
    assert torch.equal(
        scaled.pred_masks, paste_masks_in_image(masks[[0, 2], 0], boxes, (50, 400), 0.4)
    )
    assert given.pred_masks is masks or kind == "ROIMasks"


@pytest.mark.parametrize(("probability", "is_painted"), [(0.49, False), (0.51, True)])
def test_pixel_belongs_to_the_object_from_a_probability_of_one_half(probability, is_painted):
    masks = detector_postprocess(
        with_masks(torch.full((3, 1, 7, 7), probability)), 50, 400
    ).pred_masks
    assert (masks.flatten(1).any(dim=1) == is_painted).all()


def test_no_masks_stay_none():
    given = results([])
    given.pred_masks = torch.empty(0, 1, 28, 28)
    assert detector_postprocess(given, 50, 400).pred_masks.shape == (0, 50, 400)


def test_keypoints_are_scaled_per_axis_and_the_given_ones_stay():
    given = results([[10.0, 20, 30, 40], [5, 5, 5, 9]])
    given.pred_keypoints = torch.tensor([[[12.0, 22, 0.5], [14, 24, 0.25]]]).repeat(2, 1, 1)
    scaled = detector_postprocess(given, 50, 400)
    assert scaled.pred_keypoints.tolist() == [[[24, 11, 0.5], [28, 12, 0.25]]]
    assert given.pred_keypoints[0, 0].tolist() == [12, 22, 0.5]


def test_sem_seg_is_cut_to_the_image_and_resized():
    scores = torch.randn(3, 8, 12)
    scores[:, 6:] = scores[:, :, 10:] = torch.inf  # the padding: it must not leak in
    resized = sem_seg_postprocess(scores, (6, 10), 12, 5)
    assert resized.shape == (3, 12, 5)
    # Twice as high, half as wide: halves of neighbours, at quarters between rows.
    columns = (scores[:, :6, 0:10:2] + scores[:, :6, 1:10:2]) / 2
    torch.testing.assert_close(resized[:, 1], 0.75 * columns[:, 0] + 0.25 * columns[:, 1])


def test_sem_seg_of_the_wanted_size_stays_as_it_is():
    scores = torch.randn(3, 8, 12)
    torch.testing.assert_close(sem_seg_postprocess(scores, (8, 12), 8, 12), scores)
