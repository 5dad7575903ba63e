"""Tests of detkit.modeling.meta_arch.panoptic_merge."""

import pytest
import torch

from detkit.modeling import combine_semantic_and_instance_outputs
from detkit.structures import Instances
from tests.helpers import slow_panoptic_merge

H, W = 12, 16


def instances(masks, scores, classes=None):
    masks = torch.as_tensor(masks, dtype=torch.bool).reshape(-1, H, W)
    classes = list(range(len(scores))) if classes is None else classes
    return Instances(
        (H, W),
        pred_masks=masks,
        scores=torch.tensor(scores),
        pred_classes=torch.tensor(classes).long(),
    )


def block(top, left, bottom, right):
    mask = torch.zeros(H, W, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def merge(found, semantic, overlap=0.5, stuff_area=1, score=0.5):
    return combine_semantic_and_instance_outputs(found, semantic, overlap, stuff_area, score)


NOTHING = instances(torch.zeros(0, H, W), [])
THINGS = torch.zeros(H, W, dtype=torch.int64)


@pytest.mark.parametrize("seed", range(12))
def test_merge_is_that_of_a_loop_over_pixels(seed):
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(0, 9, (), generator=generator))
    corners = torch.rand(count, 4, generator=generator)
    masks = [
        block(int(a * H), int(b * W), int(a * H + c * 8), int(b * W + d * 10))
        for a, b, c, d in corners.tolist()
    ]
    masks = torch.stack(masks) if masks else torch.zeros(0, H, W)
    # Steps of 1/4: equal scores, and scores at the threshold.
    scores = (torch.randint(0, 5, (count,), generator=generator) / 4).tolist()
    found = instances(masks, scores, torch.randint(0, 3, (count,), generator=generator).tolist())
    semantic = torch.randint(0, 5, (H // 4, W // 4), generator=generator)
    semantic = semantic.repeat_interleave(4, 0).repeat_interleave(4, 1)
    thresholds = (0.5, 20, 0.5)
    segments, infos = merge(found, semantic, *thresholds)
    wanted_segments, wanted_infos = slow_panoptic_merge(
        found.pred_masks.tolist(),
        scores,
        found.pred_classes.tolist(),
        semantic.tolist(),
        *thresholds,
    )
    assert segments.tolist() == wanted_segments
    assert infos == wanted_infos
    assert segments.dtype == torch.int32


def test_better_instance_keeps_what_two_claim():
    found = instances(torch.stack([block(0, 0, 6, 6), block(0, 4, 6, 12)]), [0.6, 0.9])
    segments, infos = merge(found, THINGS)
    assert segments[0, :13].tolist() == [2] * 4 + [1] * 8 + [0]
    assert [(info["id"], info["instance_id"]) for info in infos] == [(1, 1), (2, 0)]


@pytest.mark.parametrize(
    ("right", "stays"), [(8, True), (7, False)], ids=["half-covered", "more-than-half"]
)
def test_instance_that_is_covered_by_more_than_the_threshold_goes(right, stays):
    found = instances(torch.stack([block(0, 0, 6, 4), block(0, 0, 6, right)]), [0.9, 0.8])
    assert len(merge(found, THINGS)[1]) == 1 + stays


@pytest.mark.parametrize(("score", "count"), [(0.5, 1), (0.49, 0)], ids=["at-threshold", "below"])
def test_instance_below_the_score_goes(score, count):
    assert len(merge(instances(block(0, 0, 3, 3), [score]), THINGS)[1]) == count


@pytest.mark.parametrize(("limit", "count"), [(192, 1), (193, 0)], ids=["at-limit", "below"])
def test_stuff_of_fewer_pixels_than_the_limit_goes(limit, count):
    assert len(merge(NOTHING, torch.full((H, W), 3), stuff_area=limit)[1]) == count


def test_stuff_fills_what_instances_leave_and_tells_its_area():
    segments, infos = merge(instances(block(0, 0, 6, W), [0.9]), torch.full((H, W), 7))
    assert infos[1] == {"id": 2, "isthing": False, "category_id": 7, "area": 6 * W}
    assert segments[5:7, 0].tolist() == [1, 2]


def test_stuff_that_is_covered_whole_is_no_segment():
    _, infos = merge(instances(torch.ones(H, W), [0.9]), torch.full((H, W), 7), stuff_area=0)
    assert [info["isthing"] for info in infos] == [True]


def test_class_0_of_the_map_stands_for_things_and_is_never_stuff():
    segments, infos = merge(NOTHING, THINGS, stuff_area=0)
    assert infos == []
    assert segments.unique().tolist() == [0]


def test_instance_without_a_pixel_takes_no_id():
    found = instances(torch.stack([block(0, 0, 0, 0), block(0, 0, 3, 3)]), [0.9, 0.8])
    assert [(info["id"], info["instance_id"]) for info in merge(found, THINGS)[1]] == [(1, 1)]


def test_order_of_instances_does_not_matter():
    found = instances(
        torch.stack([block(0, 0, 6, 6), block(0, 4, 6, 12), block(3, 3, 9, 9)]), [0.6, 0.9, 0.7]
    )
    segments, infos = merge(found, THINGS)
    again, infos_again = merge(found[torch.tensor([2, 0, 1])], THINGS)
    assert torch.equal(segments, again)
    assert [i["score"] for i in infos] == [i["score"] for i in infos_again]


def test_inputs_are_not_changed():
    found, semantic = instances(block(0, 0, 6, 6), [0.9]), torch.full((H, W), 2)
    masks = found.pred_masks.clone()
    merge(found, semantic)
    assert torch.equal(found.pred_masks, masks)
    assert semantic.unique().tolist() == [2]


def test_sizes_that_differ_are_an_error():
    with pytest.raises(ValueError, match=r"one size: got \(12, 16\) and \(12, 15\)"):
        merge(NOTHING, torch.zeros(H, W - 1, dtype=torch.int64))
