"""Tests of detkit.modeling.matcher."""

import subprocess
import sys

import pytest
import torch

from detkit.modeling.matcher import Matcher
from detkit.structures import Boxes, RotatedBoxes, pairwise_iou, pairwise_iou_rotated
from detkit.utils.errors import ConfigError, ContractError
from tests.helpers import random_rotated_boxes, slow_match


def random_quality(num_gt, num_pred, seed):
    quality = torch.rand(num_gt, num_pred, generator=torch.Generator().manual_seed(seed))
    return (quality * 10).round() / 10  # ties and values on the thresholds


@pytest.mark.parametrize("low_quality", [False, True], ids=["plain", "low-quality"])
@pytest.mark.parametrize("num_gt", [1, 4], ids=["one", "many"])
@pytest.mark.parametrize("seed", range(3))
def test_matches_are_those_of_the_slow_reference(num_gt, low_quality, seed):
    quality = random_quality(num_gt, 30, seed)
    matches, labels = Matcher([0.3, 0.7], [0, -1, 1], low_quality)(quality)
    expected_quality, expected_labels = slow_match(quality, [0.3, 0.7], [0, -1, 1], low_quality)
    torch.testing.assert_close(quality[matches, torch.arange(30)], expected_quality)
    assert labels.tolist() == expected_labels
    assert labels.dtype == torch.int8
    assert matches.dtype == torch.int64


def test_by_hand():
    quality = torch.tensor([[0.1, 0.3, 0.69, 0.7], [0.2, 0.0, 0.0, 0.0]])
    matches, labels = Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True)(quality)
    assert matches.tolist() == [1, 0, 0, 0]
    assert labels.tolist() == [1, -1, -1, 1]  # the first one is the best that the second box has


@pytest.mark.parametrize("low_quality", [False, True], ids=["plain", "low-quality"])
@pytest.mark.parametrize(
    "shape", [(0, 5), (3, 0), (0, 0)], ids=["no-objects", "no-boxes", "nothing"]
)
def test_nothing_to_match_is_all_background(shape, low_quality):
    matches, labels = Matcher([0.5], [0, 1], low_quality)(torch.zeros(shape))
    assert matches.tolist() == labels.tolist() == [0] * shape[1]
    assert labels.dtype == torch.int8


def test_object_that_nothing_overlaps_makes_no_foreground():
    quality = torch.tensor([[0.0, 0.0, 0.0], [0.9, 0.1, 0.1]])
    _, labels = Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True)(quality)
    assert labels.tolist() == [1, 0, 0]


def test_matching_follows_a_permutation_of_the_boxes():
    quality, order = random_quality(4, 30, 0), torch.randperm(30)
    matcher = Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True)
    _, labels = matcher(quality)
    _, permuted = matcher(quality[:, order])
    assert permuted.tolist() == labels[order].tolist()


@pytest.mark.parametrize(
    ("thresholds", "labels", "message"),
    [
        pytest.param([0.7, 0.3], [0, -1, 1], "thresholds must be positive and rise", id="falling"),
        pytest.param([0.0], [0, 1], "thresholds must be positive and rise", id="zero"),
        pytest.param([0.5], [0, -1, 1], "labels must be one more than thresholds", id="count"),
        pytest.param([0.5], [0, 2], "labels must be -1", id="label"),
    ],
)
def test_bad_settings_name_the_argument(thresholds, labels, message):
    with pytest.raises(ContractError, match=message):
        Matcher(thresholds, labels)


class _ByInterval(Matcher):
    """Goes through the intervals from end to end, as code for Detectron2 does."""

    def __call__(self, match_quality_matrix):
        quality, matches = match_quality_matrix.max(dim=0)
        match_labels = torch.full_like(matches, -2, dtype=torch.int8)
        ends = zip(self.thresholds[:-1], self.thresholds[1:], strict=True)
        for label, (low, high) in zip(self.labels, ends, strict=True):
            match_labels[(quality >= low) & (quality < high)] = label
        return matches, match_labels


def test_subclass_finds_the_intervals_from_end_to_end():
    quality = torch.tensor([[0.0, 0.2, 0.3, 0.5, 0.7, 1.0]])
    _, labels = _ByInterval([0.3, 0.7], [0, -1, 1])(quality)
    assert labels.tolist() == Matcher([0.3, 0.7], [0, -1, 1])(quality)[1].tolist()
    assert labels.tolist() == [0, 0, -1, -1, 1, 1]


def random_boxes(count, seed):
    corners = torch.randint(
        0, 40, (count, 2, 2), generator=torch.Generator().manual_seed(seed)
    ).float()
    return Boxes(
        torch.cat([corners.amin(dim=1), corners.amax(dim=1) + 1], dim=1)
    )  # whole numbers: many ties


@pytest.mark.parametrize("low_quality", [False, True], ids=["plain", "low-quality"])
@pytest.mark.parametrize(
    "max_pairs", [1, 60, 61, 10_000], ids=["a row", "two rows", "two rows and a bit", "all"]
)
@pytest.mark.parametrize("num_gt", [0, 1, 7], ids=["nothing", "one", "many"])
def test_boxes_matched_in_groups_are_matched_as_at_once(num_gt, max_pairs, low_quality):
    matcher = Matcher([0.2, 0.4], [0, -1, 1], low_quality)
    truth, boxes = random_boxes(num_gt, 0), random_boxes(30, 1)
    matches, labels = matcher.match_boxes(truth, boxes, max_pairs=max_pairs)
    expected_matches, expected_labels = matcher(pairwise_iou(truth, boxes))
    assert matches.tolist() == expected_matches.tolist()
    assert labels.tolist() == expected_labels.tolist()


@pytest.mark.parametrize("max_pairs", [1, 1000])
def test_rotated_boxes_are_matched_by_their_own_overlap(max_pairs):
    matcher = Matcher([0.2, 0.4], [0, -1, 1], allow_low_quality_matches=True)
    truth, boxes = RotatedBoxes(random_rotated_boxes(6)), RotatedBoxes(random_rotated_boxes(30, 80))
    matches, labels = matcher.match_boxes(truth, boxes, max_pairs=max_pairs)
    expected_matches, expected_labels = matcher(pairwise_iou_rotated(truth.tensor, boxes.tensor))
    assert matches.tolist() == expected_matches.tolist()
    assert labels.tolist() == expected_labels.tolist()
    assert 0 < (labels == 1).sum() < 30


def test_subclass_that_matches_in_its_own_way_is_asked():
    class OwnMatcher(Matcher):
        def __call__(self, match_quality_matrix):
            matches, labels = super().__call__(match_quality_matrix)
            return matches, -torch.ones_like(labels)

    truth, boxes = Boxes(torch.tensor([[0.0, 0, 9, 9]])), Boxes(torch.tensor([[0.0, 0, 9, 8]] * 3))
    _, labels = OwnMatcher([0.5], [0, 1]).match_boxes(truth, boxes, max_pairs=1)
    assert labels.tolist() == [-1, -1, -1]


def test_low_quality_matches_of_a_subclass_are_its_own():
    class OwnMatcher(Matcher):
        def set_low_quality_matches_(self, match_labels, match_quality_matrix):
            seen.append(match_labels.tolist())
            match_labels[match_quality_matrix.max(dim=0).values > 0.2] = 1

    seen = []
    truth = Boxes(torch.tensor([[0.0, 0, 10, 10]]))
    boxes = Boxes(torch.tensor([[0.0, 0, 10, 1], [0, 0, 10, 3], [0, 0, 10, 4], [0, 0, 10, 9]]))
    for is_allowed, expected in ((True, [0, 1, 1, 1]), (False, [0, 0, 0, 1])):
        matcher = OwnMatcher([0.5], [0, 1], is_allowed)
        _, labels = matcher.match_boxes(truth, boxes, max_pairs=1)
        assert labels.tolist() == expected
        assert matcher.match_boxes(truth[:0], boxes)[1].tolist() == [0] * 4
    assert seen == [[0, 0, 0, 1]]  # without those of the base


def test_rotated_and_upright_boxes_are_not_matched():
    matcher = Matcher([0.5], [0, 1])
    message = "ground truth is Boxes, but the model predicts RotatedBoxes: MODEL.ROTATED_BOXES must"
    with pytest.raises(ConfigError, match=message):
        matcher.match_boxes(Boxes(torch.zeros(0, 4)), RotatedBoxes(torch.zeros(2, 5)))


_CROWD = """
import resource, torch
from detkit.modeling.matcher import Matcher
from detkit.structures import Boxes
def boxes(count):
    corner = torch.rand(count, 2) * 1000
    return Boxes(torch.cat([corner, corner + 5 + torch.rand(count, 2) * 50], dim=1))
truth, anchors = boxes(5_000), boxes(250_000)
matcher = Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True)
matcher.match_boxes(truth[:1], anchors)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
matches, labels = matcher.match_boxes(truth, anchors)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
# The same for a part of the anchors, whose matrix fits. Not the labels: the best anchor of an object may be elsewhere.
expected, _ = matcher.match_boxes(truth, anchors[:1000], max_pairs=5_000_000)
assert matches[:1000].equal(expected)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory as Linux tells it")
def test_crowd_is_matched_within_half_a_gigabyte():
    done = subprocess.run([sys.executable, "-c", _CROWD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 512


@pytest.mark.parametrize("max_pairs", [1, 2, 100], ids=["row-by-row", "two-rows", "at-once"])
def test_first_ground_truth_of_a_tie_is_matched(max_pairs):
    twice = Boxes([[0.0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 10, 10], [50, 50, 60, 60]])
    boxes = Boxes([[0.0, 0, 10, 8]])
    matches, labels = Matcher([0.5], [0, 1]).match_boxes(twice, boxes, max_pairs=max_pairs)
    assert (matches.tolist(), labels.tolist()) == ([0], [1])
    boxes = Boxes([[50.0, 50, 60, 58]])
    matches, _ = Matcher([0.5], [0, 1]).match_boxes(twice, boxes, max_pairs=max_pairs)
    assert matches.tolist() == [1]
