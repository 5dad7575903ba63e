"""Tests of detkit.modeling.postprocessing."""

import pytest
import torch

from detkit.modeling.postprocessing import detector_postprocess
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
