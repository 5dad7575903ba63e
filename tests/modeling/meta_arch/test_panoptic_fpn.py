"""Tests of detkit.modeling.meta_arch.panoptic_fpn."""

import pytest
import torch

from detkit.modeling import build_model, combine_semantic_and_instance_outputs
from detkit.structures import BitMasks, Boxes, Instances
from tests.helpers import slow_panoptic_merge
from tests.modeling.meta_arch import test_rcnn, test_semantic_seg, two_levels

SIZE = (48, 64)
WITHOUT_MASKS = ("MODEL.MASK_ON", False, "MODEL.PANOPTIC_FPN.COMBINE.ENABLED", False)


def config(*overrides):
    """The small R-CNN of test_rcnn on the backbone and the head of test_semantic_seg."""
    cfg = test_semantic_seg.config()
    rcnn = test_rcnn.config()
    for key in ("RPN", "ROI_HEADS", "ROI_BOX_HEAD", "ANCHOR_GENERATOR"):
        cfg.MODEL[key] = rcnn.MODEL[key]
    cfg.merge_from_list(
        ["MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.MASK_ON", True, *overrides]
    )
    return cfg


def make(*overrides):
    torch.manual_seed(0)
    return build_model(config(*overrides))


def inputs(*numbers_of_objects, **fields):
    batch = two_levels.inputs(*numbers_of_objects, size=SIZE)
    for x, other in zip(batch, test_semantic_seg.inputs(*[SIZE] * len(batch)), strict=True):
        x["sem_seg"] = other["sem_seg"]
        x.update(fields)
    return batch


@pytest.mark.parametrize(
    "numbers", [(2, 1), (2, 0), (0, 0)], ids=["all", "one-empty", "only-empty"]
)
def test_losses_of_all_heads_reach_every_parameter(numbers):
    model = make(*WITHOUT_MASKS)
    losses = model(inputs(*numbers))
    assert list(losses) == [
        "loss_sem_seg",
        "loss_rpn_cls",
        "loss_rpn_loc",
        "loss_cls",
        "loss_box_reg",
    ]
    sum(losses.values()).backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for parameter in model.parameters()
    )


def test_losses_are_those_of_the_models_it_is_made_of():
    batch = inputs(2, 1)
    model = make(*WITHOUT_MASKS, "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT", 0.5)
    rcnn = make(*WITHOUT_MASKS, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    semantic = make(
        "MODEL.MASK_ON",
        False,
        "MODEL.META_ARCHITECTURE",
        "SemanticSegmentor",
        "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT",
        0.5,
    )
    wanted = {}
    for other in (rcnn, semantic):
        other.load_state_dict(model.state_dict(), strict=False)
        torch.manual_seed(3)
        wanted.update(other(batch))
    torch.manual_seed(3)
    torch.testing.assert_close(model(batch), wanted)


def test_instance_loss_weight_scales_the_losses_of_the_roi_heads():
    batch, losses = inputs(2, 1), []
    for weight in (1.0, 3.0):
        model = make(*WITHOUT_MASKS, "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT", weight)
        torch.manual_seed(3)
        losses.append(model(batch))
    ratios = {name: (losses[1][name] / losses[0][name]).item() for name in losses[0]}
    scaled = {"loss_cls", "loss_box_reg"}
    assert ratios == pytest.approx({name: 3.0 if name in scaled else 1.0 for name in losses[0]})


def test_without_merging_there_are_instances_and_scores_per_pixel():
    outputs = make(*WITHOUT_MASKS).eval()(inputs(1, 0, height=61, width=33))
    assert [list(output) for output in outputs] == [["instances", "sem_seg"]] * 2
    assert outputs[0]["sem_seg"].shape == (test_semantic_seg.K, 61, 33)
    assert outputs[0]["instances"].image_size == (61, 33)


@pytest.mark.parametrize("arguments", [((), {"do_postprocess": False}), ((False,), {})])
def test_without_postprocessing_results_are_in_the_coordinates_of_the_input(arguments):
    model = make(*WITHOUT_MASKS).eval()
    positional, named = arguments
    instances, scores = model.inference(inputs(1, height=120, width=45), *positional, **named)
    assert instances[0].image_size == SIZE
    assert scores.shape == (1, test_semantic_seg.K, *SIZE)


def test_given_boxes_give_instances_alone():
    boxes = inputs(2)[0]["instances"]
    given = Instances(SIZE, pred_boxes=boxes.gt_boxes, pred_classes=boxes.gt_classes)
    (output,) = make(*WITHOUT_MASKS).eval().inference(inputs(2), detected_instances=[given])
    assert list(output) == ["instances"]
    torch.testing.assert_close(output["instances"].pred_boxes.tensor, boxes.gt_boxes.tensor)


def test_merged_result_is_that_of_instances_and_scores_per_pixel():
    overrides = (
        "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT",
        30,
        "MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH",
        0.7,
    )
    overrides += ("MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH", 0.2)
    outputs = make(*overrides).eval()(inputs(1, 0, height=61, width=33))
    for output in outputs:
        assert list(output) == ["instances", "sem_seg", "panoptic_seg"]
        wanted = combine_semantic_and_instance_outputs(
            output["instances"], output["sem_seg"].argmax(0), 0.7, 30, 0.2
        )
        assert torch.equal(output["panoptic_seg"][0], wanted[0])
        assert output["panoptic_seg"][1] == wanted[1]
    assert any(info["isthing"] for output in outputs for info in output["panoptic_seg"][1])


def test_masks_are_trained_with_the_rest():
    losses = make()([scene(0)])
    assert list(losses) == [
        "loss_sem_seg",
        "loss_rpn_cls",
        "loss_rpn_loc",
        "loss_cls",
        "loss_box_reg",
        "loss_mask",
    ]


def scene(index):
    """A square, blue or red by its class, on a ground of two halves."""
    top, left = 8 + 8 * (index // 2), 8 + 24 * (index % 2)
    labels = torch.ones(SIZE, dtype=torch.int64)
    labels[:, 32 + 4 * index :] = 2
    image = torch.full((3, *SIZE), 60)
    image[1] = 60 * labels
    labels[top : top + 24, left : left + 24] = 0
    image[2 * (index % 2), labels == 0] = 240
    box = [left, top, left + 24, top + 24]
    instances = Instances(SIZE, gt_boxes=Boxes([box]), gt_classes=torch.tensor([index % 2]))
    instances.gt_masks = BitMasks((labels == 0)[None])
    return {"image": image.to(torch.uint8), "instances": instances, "sem_seg": labels}


def test_merging_without_masks_is_an_error_of_the_config():
    with pytest.raises(
        ValueError,
        match=r"set MODEL.MASK_ON to True, or MODEL.PANOPTIC_FPN.COMBINE.ENABLED to False",
    ):
        make("MODEL.MASK_ON", False)


@pytest.mark.parametrize("missing", ["instances", "sem_seg"])
def test_missing_ground_truth_is_named(missing):
    batch = inputs(1, 1)
    del batch[1][missing]
    with pytest.raises(ValueError, match=rf"'{missing}' in training: image 1"):
        make(*WITHOUT_MASKS)(batch)


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
