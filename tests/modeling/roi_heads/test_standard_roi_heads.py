"""Tests of detkit.modeling.roi_heads.standard_roi_heads."""

import pytest
import torch

from detkit.layers import ShapeSpec
from detkit.modeling.roi_heads import StandardROIHeads, build_roi_heads
from detkit.structures import Boxes, Instances, Keypoints, PolygonMasks
from tests.configs import cfg_with
from tests.modeling.roi_heads.inputs import SIZE, K, batch, proposals, truth

SHAPES = {"p2": ShapeSpec(channels=4, stride=4), "p3": ShapeSpec(channels=4, stride=8)}


def config(*overrides):
    options = {
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_HEADS.NUM_CLASSES": K,
        "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3"],
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 3,
        "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 8,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 4,
        "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 4,
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [4],
        "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": 2,
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 2,
    }
    return cfg_with(options, overrides)


def make(*overrides):
    torch.manual_seed(0)
    return build_roi_heads(config(*overrides), SHAPES)


OBJECT = (6.0, 5.0, 26.0, 25.0)


def test_training_gives_sampled_proposals_and_losses():
    sampled, losses = make()(*batch(), [proposals(), proposals()], [truth(OBJECT), truth()])
    assert set(losses) == {"loss_cls", "loss_box_reg"}
    assert [p.has("gt_classes") for p in sampled] == [True, True]


def test_inference_gives_instances():
    instances, losses = make().eval()(*batch(), [proposals(), proposals()])
    assert losses == {}
    assert [sorted(x.get_fields()) for x in instances] == [
        ["pred_boxes", "pred_classes", "scores"]
    ] * 2


@pytest.mark.parametrize("num_proposals", [0, 3], ids=["no-proposals", "proposals"])
def test_batch_of_empty_images_trains(num_proposals):
    heads = make()
    empty = [proposals()[:num_proposals], proposals()[:num_proposals]]
    _, losses = heads(*batch(), empty, [truth(), truth()])
    assert losses["loss_box_reg"].item() == 0
    sum(losses.values()).backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_image_without_proposals_has_no_detections():
    instances, _ = make().eval()(*batch(), [proposals()[:0], proposals()])
    assert len(instances[0]) == 0
    assert len(instances[1]) > 0


def test_names_of_weights_are_those_of_detectron2():
    parts = ["box_head.fc1", "box_head.fc2", "box_predictor.cls_score", "box_predictor.bbox_pred"]
    assert list(make().state_dict()) == [
        f"{part}.{kind}" for part in parts for kind in ("weight", "bias")
    ]


def test_later_branches_can_train_on_predicted_boxes():
    heads = make("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True)
    torch.nn.init.constant_(heads.box_predictor.bbox_pred.bias, 1.0)
    given = [proposals(), proposals()]
    sampled, _ = heads(*batch(), given, [truth(OBJECT), truth(OBJECT)])
    before = {tuple(box) for box in [*given[0].proposal_boxes.tensor.tolist(), list(OBJECT)]}
    assert before.isdisjoint({tuple(box) for box in sampled[0].proposal_boxes.tensor.tolist()})
    assert not sampled[0].proposal_boxes.tensor.requires_grad


ALL_ON = ("MODEL.MASK_ON", True, "MODEL.KEYPOINT_ON", True)


def full_truth(*boxes):
    """Objects that fill their boxes, with a keypoint in two corners."""
    targets = truth(*boxes)
    targets.gt_masks = PolygonMasks(
        [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes]
    )
    targets.gt_keypoints = Keypoints(
        [[[x1, y1, 2], [x2, y2, 1]] for x1, y1, x2, y2 in boxes] or torch.empty(0, 2, 3)
    )
    return targets


def test_all_branches_train():
    heads = make(*ALL_ON)
    _, losses = heads(
        *batch(), [proposals(), proposals()], [full_truth(OBJECT), full_truth(OBJECT, OBJECT)]
    )
    assert list(losses) == ["loss_cls", "loss_box_reg", "loss_mask", "loss_keypoint"]
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in heads.parameters())
    assert heads.mask_head.predictor.weight.grad.any()
    assert heads.keypoint_head.score_lowres.weight.grad.any()


@pytest.mark.parametrize("num_proposals", [0, 3], ids=["no-proposals", "proposals"])
@pytest.mark.parametrize("num_fields", ["with", "without"])
def test_all_branches_train_on_empty_images(num_proposals, num_fields):
    heads = make(*ALL_ON)
    empty = full_truth() if num_fields == "with" else truth()
    given = [proposals()[:num_proposals], proposals()[:num_proposals]]
    _, losses = heads(*batch(), given, [empty, empty])
    assert losses["loss_mask"].item() == losses["loss_keypoint"].item() == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())


def test_image_with_objects_and_image_without_train_together():
    _, losses = make(*ALL_ON)(*batch(), [proposals(), proposals()], [full_truth(OBJECT), truth()])
    assert losses["loss_mask"] > 0
    assert losses["loss_keypoint"] > 0


def test_losses_of_all_branches_are_finite_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, losses = make(*ALL_ON)(
            *batch(), [proposals(), proposals()], [full_truth(OBJECT), truth()]
        )
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


def test_detections_have_the_fields_of_all_branches():
    instances, _ = make(*ALL_ON).eval()(*batch(), [proposals()[:0], proposals()])
    assert [sorted(x.get_fields()) for x in instances] == [
        [
            "pred_boxes",
            "pred_classes",
            "pred_keypoint_heatmaps",
            "pred_keypoints",
            "pred_masks",
            "scores",
        ]
    ] * 2
    count = len(instances[1])
    assert len(instances[0]) == 0 < count
    assert instances[1].pred_masks.shape == (count, 1, 8, 8)
    assert instances[1].pred_keypoints.shape == (count, 2, 3)


def test_given_boxes_get_what_detections_get():
    heads = make(*ALL_ON).eval()
    _, features = batch()
    found = heads.predict(features, [proposals(), proposals()])
    given = [Instances(SIZE, pred_boxes=x.pred_boxes, pred_classes=x.pred_classes) for x in found]
    again = heads.forward_with_given_boxes(features, given)
    for x, y in zip(found, again, strict=True):
        torch.testing.assert_close(y.pred_masks, x.pred_masks)
        torch.testing.assert_close(y.pred_keypoints, x.pred_keypoints)


def test_given_boxes_in_training_are_an_error():
    with pytest.raises(RuntimeError, match=r"call eval\(\) on the model first"):
        make(*ALL_ON).forward_with_given_boxes(batch()[1], [])


def test_later_branches_see_the_predicted_boxes():
    heads = make(*ALL_ON, "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True)
    seen = []
    heads.mask_pooler.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    sampled, _ = heads(*batch(), [proposals(), proposals()], [full_truth(OBJECT), truth()])
    is_foreground = sampled[0].gt_classes < K
    assert torch.equal(seen[0][0].tensor, sampled[0].proposal_boxes.tensor[is_foreground])
    assert len(seen[0][1]) == 0


def test_branches_take_no_part_where_they_are_off():
    assert [name for name, _ in make().named_children()] == [
        "box_pooler",
        "box_head",
        "box_predictor",
    ]
    names = {name for name, _ in make("MODEL.MASK_ON", True).named_children()}
    assert names == {"box_pooler", "box_head", "box_predictor", "mask_pooler", "mask_head"}


def standard(kind=StandardROIHeads, **kwargs):
    """Heads built from plain arguments, as Detectron2's users do it."""
    heads = make()
    names = ("num_classes", "box_pooler", "box_head", "box_predictor", "proposal_matcher")
    parts = {name: getattr(heads, name) for name in names}
    return kind(
        **parts,
        box_in_features=["p2", "p3"],
        batch_size_per_image=4,
        positive_fraction=0.5,
        **kwargs,
    )


class ByName(torch.nn.Module):
    """A mask head that pools by itself."""

    def forward(self, x, instances):
        return {"loss_mask": x["p3"].mean()} if self.training else [dict(x)] * len(instances)


def test_head_without_a_pooler_gets_the_features_by_name():
    heads = standard(mask_in_features=["p3"], mask_head=ByName())
    _, features = batch()
    _, losses = heads(None, features, [proposals(), proposals()], [truth(OBJECT), truth()])
    assert losses["loss_mask"] == features["p3"].mean()
    found = heads.eval().predict(features, [proposals(), proposals()])
    assert [list(x) for x in found] == [["p3"], ["p3"]]


class Detectron2Heads(StandardROIHeads):
    """Overrides the entry points of the branches, as heads written for Detectron2 do."""

    def _forward_box(self, features, proposals):
        result = super()._forward_box(features, proposals)
        if self.training:
            return {"loss_own_box": result["loss_cls"] * 0 + 1}
        return [x[:2] for x in result]

    def _forward_mask(self, features, instances):
        if self.training:
            return {"loss_own_mask": torch.ones(())}
        for x in instances:
            x.own_masks = torch.ones(len(x))
        return instances

    def _forward_keypoint(self, features, instances):
        if self.training:
            return {"loss_own_keypoint": torch.ones(())}
        for x in instances:
            x.own_keypoints = torch.zeros(len(x))
        return instances


def test_entry_points_of_the_branches_can_be_overridden_as_in_detectron2():
    heads, (images, features) = standard(Detectron2Heads), batch()
    given = [proposals(), proposals()]
    _, losses = heads(images, features, given, [truth(OBJECT), truth()])
    assert losses == {"loss_own_box": 1, "loss_own_mask": 1, "loss_own_keypoint": 1}
    fields = {"pred_boxes", "scores", "pred_classes"}
    found, _ = heads.eval()(images, features, given)
    assert [len(x) for x in found] == [2, 2]
    assert set(found[0].get_fields()) == {*fields, "own_masks", "own_keypoints"}
    boxes = heads._forward_box(features, given)
    assert set(boxes[0].get_fields()) == fields
    assert heads.forward_with_given_boxes(features, boxes)[0].has("own_masks")


def test_branch_that_a_subclass_builds_by_a_method_of_the_object_is_left_to_it():
    class Own(StandardROIHeads):
        def __init__(self, cfg, input_shape):
            super().__init__(cfg, input_shape)
            self._init_mask_head(cfg, input_shape)

        def _init_mask_head(self, cfg, input_shape):
            self.mask_on, self.of_mine = cfg.MODEL.MASK_ON, torch.nn.Linear(1, 1)

    heads = Own(config("MODEL.MASK_ON", True), SHAPES)
    assert heads.mask_on
    assert not hasattr(heads, "mask_head")


def test_unknown_feature_names_the_key():
    with pytest.raises(
        ValueError, match=r"MODEL.ROI_HEADS.IN_FEATURES must be of \['p2', 'p3'\]: got 'p4'"
    ):
        make("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p4"])


def test_features_of_different_channels_are_an_error():
    shapes = {**SHAPES, "p3": ShapeSpec(channels=8, stride=8)}
    with pytest.raises(ValueError, match="IN_FEATURES must have the same channels.*p2: 4, p3: 8"):
        build_roi_heads(config(), shapes)


def test_unknown_pooler_names_the_legal_ones():
    cfg = config()
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROICrop"
    with pytest.raises(
        ValueError,
        match="pooler_type must be one of ROIAlign, ROIAlignV2, ROIPool, ROIAlignRotated, got 'ROICrop'.*HEAD.POOLER_TYPE",
    ):
        build_roi_heads(cfg, SHAPES)


def test_training_without_ground_truth_is_an_error():
    with pytest.raises(ValueError, match="targets is None"):
        make()(*batch(), [proposals(), proposals()])


def test_given_boxes_need_their_fields():
    with pytest.raises(ValueError, match="image 0 need a field 'pred_classes'"):
        make().eval().forward_with_given_boxes({}, [Instances(SIZE, pred_boxes=Boxes([]))])
