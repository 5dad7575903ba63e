import math

import numpy as np
import pytest

from detkit.evaluation.panoptic.quality import (
    PanopticCounts,
    Segment,
    count_segments,
    panoptic_metrics,
)

NUM_CATEGORIES = 4
IS_THING = np.array([True, True, False, False])


def slow_counts(truth_ids, truth, predicted_ids, predicted):
    """Pixel by pixel with sets, from the text of the definition: [iou, matched, wrong, missed] per category."""
    pixels = {}
    for place, (a, b) in enumerate(zip(truth_ids.flat, predicted_ids.flat, strict=True)):
        pixels.setdefault(("truth", a), set()).add(place)
        pixels.setdefault(("predicted", b), set()).add(place)
    of_truth = {s.id: pixels.get(("truth", s.id), set()) for s in truth}
    of_predicted = {s.id: pixels.get(("predicted", s.id), set()) for s in predicted}
    void = set(range(truth_ids.size)).difference(*of_truth.values())
    counts = {c: [0.0, 0, 0, 0] for c in range(NUM_CATEGORIES)}
    found, right = set(), set()
    for t in truth:
        for p in predicted:
            both = of_truth[t.id] & of_predicted[p.id]
            union = (of_truth[t.id] | of_predicted[p.id]) - (of_predicted[p.id] & void)
            if t.category == p.category and not t.is_crowd and len(both) > len(union) / 2:
                counts[t.category][0] += len(both) / len(union)
                counts[t.category][1] += 1
                found.add(t.id)
                right.add(p.id)
    for t in truth:
        counts[t.category][3] += t.id not in found and not t.is_crowd
    for p in predicted:
        ignored = set(void)
        for t in truth:
            if t.is_crowd and t.category == p.category:
                ignored |= of_truth[t.id]
        counts[p.category][2] += p.id not in right and len(of_predicted[p.id] & ignored) * 2 <= len(
            of_predicted[p.id]
        )
    return np.array([counts[c] for c in range(NUM_CATEGORIES)]).T


def random_segments(rng, ids, crowds):
    categories = rng.integers(0, NUM_CATEGORIES, 99)
    has_crowd = set()
    segments = []
    for i in sorted(set(ids.flat) - {0}):
        category = int(categories[i % 99])
        is_crowd = crowds and category not in has_crowd and rng.random() < 0.3
        has_crowd |= {category} if is_crowd else set()
        segments.append(Segment(int(i), category, bool(is_crowd)))
    return segments


@pytest.mark.parametrize("seed", range(30))
def test_counts_are_those_of_the_slow_reference(seed):
    rng = np.random.default_rng(seed)
    scale = int(rng.choice([1, 1000, 2**20]))
    blocks = rng.integers(0, 5, (6, 6))
    truth_ids = np.kron(blocks, np.ones((3, 3), dtype=int))
    predicted_ids = np.where(
        rng.random(truth_ids.shape) < 0.25, rng.integers(0, 5, truth_ids.shape), truth_ids
    )
    truth = random_segments(rng, truth_ids, crowds=True)
    # Often of the true category, so that there are matches.
    category_of = {s.id: s.category for s in truth}
    predicted = [
        Segment(
            s.id, category_of[s.id] if rng.random() < 0.7 and s.id in category_of else s.category
        )
        for s in random_segments(rng, predicted_ids, crowds=False)
    ]
    truth = [s for s in truth if rng.random() < 0.9]  # the pixels of the others are void
    expected = slow_counts(truth_ids, truth, predicted_ids, predicted)
    scaled = [Segment(scale * s.id, s.category, s.is_crowd) for s in truth]
    counts = count_segments(scale * truth_ids, scaled, predicted_ids, predicted, NUM_CATEGORIES)
    np.testing.assert_allclose([counts.iou, counts.matched, counts.wrong, counts.missed], expected)


def counts_of(truth_ids, truth, predicted_ids, predicted):
    counts = count_segments(
        np.array(truth_ids), truth, np.array(predicted_ids), predicted, NUM_CATEGORIES
    )
    return [counts.matched.sum(), counts.wrong.sum(), counts.missed.sum()]


def test_overlap_of_exactly_half_is_no_match():
    assert counts_of([[1, 1, 0]], [Segment(1, 0)], [[1, 0, 0]], [Segment(1, 0)]) == [0, 1, 1]
    assert counts_of([[1, 1, 1]], [Segment(1, 0)], [[1, 1, 0]], [Segment(1, 0)]) == [1, 0, 0]


def test_void_counts_neither_in_the_overlap_nor_as_wrong():
    assert counts_of([[1, 1, 0, 0]], [Segment(1, 0)], [[1, 1, 1, 1]], [Segment(1, 0)]) == [1, 0, 0]
    assert counts_of([[1, 0, 0, 0]], [Segment(1, 0)], [[2, 2, 2, 0]], [Segment(2, 1)]) == [0, 0, 1]


def test_prediction_that_lies_by_exactly_half_in_void_is_wrong():
    truth, predicted = [Segment(1, 0)], [Segment(5, 1)]
    assert counts_of([[1, 1, 0, 0]], truth, [[0, 5, 5, 0]], predicted) == [0, 1, 1]
    assert counts_of([[1, 1, 0, 0]], truth, [[0, 5, 5, 5]], predicted) == [0, 0, 1]


def test_last_of_several_crowds_of_a_category_counts():
    crowds = [Segment(1, 0, is_crowd=True), Segment(2, 0, is_crowd=True)]
    assert counts_of([[1, 1, 2, 2]], crowds, [[0, 0, 5, 5]], [Segment(5, 0)]) == [0, 0, 0]
    assert counts_of([[1, 1, 2, 2]], crowds, [[5, 5, 0, 0]], [Segment(5, 0)]) == [0, 1, 0]


def test_crowd_of_the_same_category_excuses_a_prediction():
    crowd = [Segment(1, 0, is_crowd=True)]
    assert counts_of([[1, 1, 1]], crowd, [[5, 5, 0]], [Segment(5, 0)]) == [0, 0, 0]
    assert counts_of([[1, 1, 1]], crowd, [[5, 5, 0]], [Segment(5, 1)]) == [0, 1, 0]


def test_nothing_at_all():
    assert counts_of([[0, 0]], [], [[0, 0]], []) == [0, 0, 0]


def test_hand_worked_quality():
    # Things: one match of overlap 0.8 and one wrong; category 1 missed. Stuff: one match of overlap 1.
    counts = PanopticCounts(
        iou=np.array([0.8, 0, 1, 0]),
        matched=np.array([1.0, 0, 1, 0]),
        wrong=np.array([1.0, 0, 0, 0]),
        missed=np.array([0, 2.0, 0, 0]),
    )
    metrics = panoptic_metrics(counts, IS_THING)
    first = 0.8 / 1.5
    assert metrics == pytest.approx(
        {
            "PQ": 100 * (first + 0 + 1) / 3,
            "SQ": 100 * (0.8 + 0 + 1) / 3,
            "RQ": 100 * (1 / 1.5 + 0 + 1) / 3,
            "PQ_th": 100 * first / 2,
            "SQ_th": 40,
            "RQ_th": 100 / 3,
            "PQ_st": 100,
            "SQ_st": 100,
            "RQ_st": 100,
        }
    )


def test_without_segments_quality_is_nan():
    assert all(
        math.isnan(value) for value in panoptic_metrics(PanopticCounts.zeros(4), IS_THING).values()
    )


@pytest.mark.parametrize(
    ("ids", "segments", "message"),
    [
        pytest.param(
            [[1, 2]],
            [Segment(1, 0)],
            r"only pixels have \[2\], only segments have \[\]",
            id="not listed",
        ),
        pytest.param(
            [[1, 0]], [Segment(1, 0), Segment(7, 0)], r"only segments have \[7\]", id="no pixels"
        ),
        pytest.param([[1, 1]], [Segment(1, 0), Segment(1, 1)], "must be unique", id="twice"),
    ],
)
def test_prediction_that_contradicts_itself_is_an_error(ids, segments, message):
    with pytest.raises(ValueError, match=message):
        counts_of([[0, 0]], [], ids, segments)
