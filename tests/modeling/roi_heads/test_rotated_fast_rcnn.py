"""Tests of detkit.modeling.roi_heads.rotated_fast_rcnn."""

import pytest
import torch

from detkit.layers import ShapeSpec
from detkit.modeling import Box2BoxTransformRotated, build_roi_heads
from detkit.modeling.roi_heads import FastRCNNOutputLayers
from detkit.modeling.roi_heads.rotated_fast_rcnn import (
    fast_rcnn_inference_rotated,
    fast_rcnn_inference_single_image_rotated,
)
from detkit.structures import Instances, RotatedBoxes
from detkit.utils.errors import ConfigError
from tests.helpers import (
    DEVICES,
    iou_of_two_rotated_boxes,
    random_rotated_boxes,
    slow_batched_nms,
)
from tests.modeling.roi_heads import test_standard_roi_heads as upright
from tests.structures.test_rotated_boxes import as_rotated

ROTATED = [
    "MODEL.ROI_HEADS.NAME",
    "RROIHeads",
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE",
    "ROIAlignRotated",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS",
    (10.0, 10.0, 5.0, 5.0, 1.0),
]


def rotated(instances: Instances) -> Instances:
    """Return the instances with their boxes as rotated ones."""
    fields = {
        name: RotatedBoxes(as_rotated(value.tensor)) if name.endswith("_boxes") else value
        for name, value in instances.get_fields().items()
    }
    return Instances(instances.image_size, **fields)


def upright_and_rotated(*overrides):
    """Return upright heads, and rotated ones with the same weights that predict no turn."""
    heads, rotated_heads = upright.make(*overrides), upright.make(*ROTATED, *overrides)
    state = heads.state_dict()
    for name in ("weight", "bias"):
        deltas = state[f"box_predictor.bbox_pred.{name}"].unflatten(0, (-1, 4))
        angles = torch.zeros_like(deltas[:, :1])
        state[f"box_predictor.bbox_pred.{name}"] = torch.cat([deltas, angles], 1).flatten(0, 1)
    rotated_heads.load_state_dict(state)
    return heads, rotated_heads


@pytest.mark.parametrize("agnostic", [False, True])
def test_without_turns_losses_and_detections_are_those_of_upright_heads(agnostic):
    heads, rotated_heads = upright_and_rotated("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", agnostic)
    images, features = upright.batch()
    proposals = [upright.proposals(), upright.proposals()]
    targets = [upright.truth(upright.OBJECT), upright.truth()]
    _, expected = heads(images, features, proposals, targets)
    _, found = rotated_heads(
        images, features, [rotated(p) for p in proposals], [rotated(t) for t in targets]
    )
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, atol=1e-4, rtol=1e-4)
    expected, _ = heads.eval()(images, features, proposals)
    found, _ = rotated_heads.eval()(images, features, [rotated(p) for p in proposals])
    for found_i, expected_i in zip(found, expected, strict=True):
        assert len(found_i) > 0
        assert torch.equal(found_i.pred_classes, expected_i.pred_classes)
        torch.testing.assert_close(found_i.scores, expected_i.scores, atol=1e-5, rtol=1e-5)
        boxes = found_i.pred_boxes.upright().tensor
        torch.testing.assert_close(boxes, expected_i.pred_boxes.tensor, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_learns_a_turn(device):
    heads = upright.make(*ROTATED).to(device)
    images, features = upright.batch(1)
    features = {name: x.to(device) for name, x in features.items()}
    boxes = RotatedBoxes(torch.tensor([[40.0, 30, 36, 24, 10]]).to(device))
    target = Instances(upright.SIZE, gt_boxes=boxes, gt_classes=torch.tensor([1]).to(device))
    start = RotatedBoxes(torch.tensor([[42.0, 31, 36, 24, -5]]).to(device))
    proposals = Instances(upright.SIZE, proposal_boxes=start)
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.01)
    for _ in range(60):
        _, losses = heads(images, features, [proposals], [target])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    (found,), _ = heads.eval()(images, features, [proposals])
    assert found.pred_classes[0] == 1
    torch.testing.assert_close(found.pred_boxes.tensor[0], boxes.tensor[0], atol=1.0, rtol=0.0)


def test_losses_of_detectron2_from_the_same_seed():
    # The losses as Detectron2 publishes them.
    torch.manual_seed(132)
    predictor = FastRCNNOutputLayers(
        input_shape=ShapeSpec(channels=8),
        box2box_transform=Box2BoxTransformRotated(weights=(10, 10, 5, 5, 1)),
        num_classes=5,
    )
    predictions = predictor(torch.rand(2, 8))
    regions = Instances(
        (10, 10),
        proposal_boxes=RotatedBoxes([[2, 1.95, 2.4, 1.7, 0], [4.65, 5.25, 4.7, 5.5, 0]]),
        gt_boxes=RotatedBoxes([[2, 2, 2, 2, 0], [4, 4, 4, 4, 0]]),
        gt_classes=torch.tensor([1, 2]),
    )
    losses = predictor.losses(predictions, [regions])
    assert losses["loss_cls"].item() == pytest.approx(1.7920907736, rel=1e-5)
    assert losses["loss_box_reg"].item() == pytest.approx(4.0410838127, rel=1e-5)


def test_inference_is_the_slow_reference():
    boxes = random_rotated_boxes(30)
    scores = torch.rand(30, 4, generator=torch.Generator().manual_seed(0))
    scores[3, 0], boxes[4, 2] = float("nan"), float("inf")
    (found,), (regions,) = fast_rcnn_inference_rotated([boxes], [scores], [(100, 90)], 0.4, 0.2, 9)
    is_left = (scores[:, :3] > 0.4) & torch.tensor([i not in (3, 4) for i in range(30)])[:, None]
    rows, classes = is_left.nonzero(as_tuple=True)
    clipped = RotatedBoxes(boxes[rows])
    clipped.clip((100, 90))
    kept = slow_batched_nms(
        clipped.tensor, scores[rows, classes], classes, 0.2, iou_of_two_rotated_boxes
    )[:9]
    assert regions.tolist() == rows[kept].tolist()
    assert found.pred_classes.tolist() == classes[kept].tolist()
    torch.testing.assert_close(found.pred_boxes.tensor, clipped.tensor[kept])
    alone, _ = fast_rcnn_inference_single_image_rotated(boxes, scores, (100, 90), 0.4, 0.2, 9)
    assert torch.equal(alone.pred_boxes.tensor, found.pred_boxes.tensor)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.MASK_ON", True], "MODEL.MASK_ON is True, but RROIHeads only have boxes"),
        (["MODEL.KEYPOINT_ON", True], "MODEL.KEYPOINT_ON is True, but RROIHeads only"),
        (
            ["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2"],
            "POOLER_TYPE must be ROIAlignRotated for RROIHeads, got ROIAlignV2",
        ),
    ],
)
def test_settings_of_upright_boxes_are_errors(overrides, message):
    with pytest.raises(ConfigError, match=message):
        build_roi_heads(upright.config(*ROTATED, *overrides), upright.SHAPES)
