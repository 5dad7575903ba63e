"""Tests of detkit.modeling.postprocessing."""

import pytest
import torch

from detkit.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from detkit.structures import Boxes, Instances


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
    scaled = detector_postprocess(results([[-10.0, -10, 250, 90], [5, 5, 5, 9], [210, 0, 220, 9]]), 100, 200)
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
