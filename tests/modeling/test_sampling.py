"""Tests of detkit.modeling.sampling."""

import pytest
import torch
from counts import Waits

from detkit.modeling.sampling import (
    find_foreground,
    note_foreground_first,
    subsample_labels,
    subsample_masks,
)

BACKGROUND = 9


def labels_with(num_foreground, num_background, num_ignored=3):
    labels = [2] * num_foreground + [BACKGROUND] * num_background + [-1] * num_ignored
    return torch.tensor(labels)[torch.randperm(len(labels))]


@pytest.mark.parametrize(
    ("foreground", "background", "expected"),
    [
        pytest.param(50, 50, (5, 15), id="enough-of-both"),
        pytest.param(2, 50, (2, 18), id="background-fills-up"),
        pytest.param(50, 3, (5, 3), id="foreground-does-not-fill-up"),
        pytest.param(0, 50, (0, 20), id="no-foreground"),
        pytest.param(50, 0, (5, 0), id="no-background"),
        pytest.param(0, 0, (0, 0), id="nothing"),
    ],
)
def test_numbers_drawn(foreground, background, expected):
    positive, negative = subsample_labels(labels_with(foreground, background), 20, 0.25, BACKGROUND)
    assert (len(positive), len(negative)) == expected


def test_drawn_are_of_their_kind_and_none_twice():
    labels = labels_with(40, 60)
    positive, negative = subsample_labels(labels, 30, 0.5, BACKGROUND)
    assert set(labels[positive].tolist()) == {2}
    assert set(labels[negative].tolist()) == {BACKGROUND}
    assert len(set(positive.tolist())) == 15
    assert len(set(negative.tolist())) == 15


def test_everything_is_drawn_where_there_is_room():
    labels = labels_with(4, 6)
    positive, negative = subsample_labels(labels, 1000, 1.0, BACKGROUND)
    assert (
        sorted(positive.tolist() + negative.tolist()) == (labels != -1).nonzero().flatten().tolist()
    )


def test_every_candidate_is_equally_likely():
    torch.manual_seed(0)
    labels = torch.full((2000, 8), BACKGROUND)
    _, negative = subsample_masks(labels, 2, 0.5, BACKGROUND)
    assert (negative.sum(dim=1) == 2).all()
    share = negative.float().mean(dim=0)  # expected 1/4, standard deviation below 0.01
    assert ((share - 0.25).abs() < 0.05).all()


def test_rows_are_sampled_by_themselves():
    rows = [labels_with(50, 50), labels_with(1, 102)[:103], labels_with(0, 103)[:103]]
    labels = torch.stack([row[:103] for row in rows])
    positive, negative = subsample_masks(labels, 20, 0.25, BACKGROUND)
    assert positive.sum(dim=1).tolist()[0] == 5
    assert (positive.sum(dim=1) + negative.sum(dim=1)).tolist() == [20, 20, 20]


def test_no_boxes_give_no_sample():
    positive, negative = subsample_labels(torch.zeros(0, dtype=torch.int64), 20, 0.5, BACKGROUND)
    assert len(positive) == len(negative) == 0


@pytest.mark.parametrize(
    ("num_samples", "fraction", "num_positive"),
    [(7, 0.5, 3), (3, 0.9, 2), (10, 0.25, 2), (1, 0.99, 0)],
)
def test_share_of_foreground_is_rounded_down(num_samples, fraction, num_positive):
    labels = torch.tensor([1] * 20 + [0] * 20)
    positive, negative = subsample_labels(labels, num_samples, fraction, bg_label=0)
    assert (len(positive), len(negative)) == (num_positive, num_samples - num_positive)


def test_foreground_is_found_in_each_image():
    classes = [torch.tensor([2, -1, 5, 0]), torch.tensor([5]), torch.zeros(0).long()]
    for (found, on_host), expected in zip(
        find_foreground(classes, bg_label=5), [[0, 3], [], []], strict=True
    ):
        assert found.tolist() == on_host.tolist() == expected


def test_noted_foreground_is_not_asked_for_until_classes_change():
    classes = torch.tensor([2, 1, 5])
    note_foreground_first(classes, 2, bg_label=5)
    with Waits() as waits:
        ((found, _),) = find_foreground([classes], bg_label=5)
    assert len(waits) == 0
    assert found.tolist() == [0, 1]
    classes[0] = 5
    ((found, _),) = find_foreground([classes], bg_label=5)
    assert found.tolist() == [1]


def test_foreground_is_noted_for_one_label_of_background():
    classes = torch.tensor([2, 1, 5])
    note_foreground_first(classes, 2, bg_label=5)
    ((found, on_host),) = find_foreground([classes], bg_label=1)
    assert found.tolist() == on_host.tolist() == [0, 2]


def test_foreground_is_found_in_inference_mode():
    with torch.inference_mode():
        classes = torch.tensor([2, 1, 5])
        note_foreground_first(classes, 2, bg_label=5)
        classes[0] = 5
        ((found, _),) = find_foreground([classes], bg_label=5)
    assert found.tolist() == [1]
