"""Tests of detkit.modeling.meta_arch.panoptic_fpn."""

import pytest
import torch

from detkit.modeling import build_model, combine_semantic_and_instance_outputs
from detkit.structures import BitMasks, Boxes, Instances
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


def test_without_postprocessing_results_are_in_the_coordinates_of_the_input():
    model = make(*WITHOUT_MASKS).eval()
    instances, scores = model.inference(inputs(1, height=120, width=45), do_postprocess=False)
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
