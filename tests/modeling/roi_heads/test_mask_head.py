"""Tests of detkit.modeling.roi_heads.mask_head."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from detkit.config import configurable
from detkit.layers import ShapeSpec
from detkit.modeling.roi_heads import BaseMaskRCNNHead, MaskRCNNConvUpsampleHead, build_mask_head
from detkit.modeling.roi_heads.mask_head import mask_rcnn_inference, mask_rcnn_loss
from detkit.structures import BitMasks, Boxes, Instances, PolygonMasks
from detkit.utils.events import EventStorage
from tests.configs import cfg_with

SIZE = (40, 50)
K, C = 3, 4


def square(x, y, side):
    return np.array([x, y, x + side, y, x + side, y + side, x, y + side], dtype=np.float64)


def regions(count, kind="polygons"):
    """Proposals around squares, of classes 0, 1, 2, ..."""
    masks = PolygonMasks([[square(4 * i, 3, 8)] for i in range(count)])
    boxes = torch.tensor([[4.0 * i, 3, 4 * i + 16, 11] for i in range(count)]).reshape(-1, 4)
    return Instances(
        SIZE,
        proposal_boxes=Boxes(boxes),
        gt_classes=torch.arange(count) % K,
        gt_masks=masks if kind == "polygons" else BitMasks.from_polygon_masks(masks, *SIZE),
    )


def background():
    """What is left of an image without objects: it has no gt_masks."""
    return Instances(SIZE, proposal_boxes=Boxes([]), gt_classes=torch.empty(0, dtype=torch.int64))


def detections(*classes):
    return Instances(
        SIZE,
        pred_boxes=Boxes(torch.ones(len(classes), 4)),
        pred_classes=torch.tensor(classes).long(),
    )


def make(*overrides):
    options = {
        "MODEL.ROI_HEADS.NUM_CLASSES": K,
        "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
        "MODEL.ROI_MASK_HEAD.NUM_CONV": 2,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 6,
    }
    cfg = cfg_with(options, overrides)
    torch.manual_seed(0)
    return build_mask_head(cfg, ShapeSpec(channels=C, height=7, width=7))


def logits(count, seed=0, channels=K, size=8):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def slow_loss(prediction, instances):
    """Mean over regions and cells of the cross entropy in the channel of the region's class, cell by cell."""
    terms, row = [], 0
    for x in instances:
        targets = (
            x.gt_masks.crop_and_resize(x.proposal_boxes.tensor, prediction.shape[2])
            if len(x)
            else []
        )
        for target, class_i in zip(targets, x.gt_classes.tolist(), strict=True):
            channel = prediction[row, class_i if prediction.shape[1] > 1 else 0].double()
            for value, inside in zip(
                channel.flatten().tolist(), target.flatten().tolist(), strict=True
            ):
                probability = 1 / (1 + math.exp(-value))
                terms.append(-math.log(probability if inside else 1 - probability))
            row += 1
    return sum(terms) / len(terms)


@pytest.mark.parametrize("kind", ["polygons", "bitmaps"])
@pytest.mark.parametrize("channels", [K, 1], ids=["per class", "shared"])
def test_loss_equals_the_slow_reference(kind, channels):
    instances = [regions(2, kind), background(), regions(3, kind)]
    prediction = logits(5, channels=channels)
    assert mask_rcnn_loss(prediction, instances).item() == pytest.approx(
        slow_loss(prediction, instances), rel=1e-5
    )


def test_target_is_the_object_within_the_proposal():
    """The square is the left half of each proposal: so is the perfect prediction."""
    perfect = torch.where(torch.arange(8) < 4, 30.0, -30.0).expand(2, 1, 8, 8)
    assert mask_rcnn_loss(perfect, [regions(2)]) < 1e-6
    assert mask_rcnn_loss(-perfect, [regions(2)]) == pytest.approx(30, rel=1e-3)


def test_only_the_true_class_learns():
    prediction = logits(3).requires_grad_()
    mask_rcnn_loss(prediction, [regions(3)]).backward()
    is_touched = prediction.grad.abs().sum(dim=(2, 3)) > 0
    assert torch.equal(is_touched, torch.eye(3, dtype=torch.bool))


def test_loss_without_regions_is_zero_within_the_graph():
    prediction = logits(0).requires_grad_()
    loss = mask_rcnn_loss(prediction, [background(), background()])
    assert loss.item() == 0
    loss.backward()
    assert prediction.grad is not None


def test_foreground_without_masks_is_an_error():
    instances = regions(2)
    instances.remove("gt_masks")
    with pytest.raises(
        ValueError, match="trained on gt_masks, but instances have only .*MODEL.MASK_ON needs"
    ):
        mask_rcnn_loss(logits(2), [instances])


def test_accuracy_is_logged_and_stays_on_the_device():
    prediction = torch.where(torch.arange(8) < 6, 1.0, -1.0).expand(2, 1, 8, 8)
    with EventStorage(0) as storage:
        mask_rcnn_loss(prediction, [regions(2)])
    found = {name: float(history.latest()) for name, history in storage.histories().items()}
    # Of 8 columns 4 belong to the object: all of them are found, and of the other 4 two are taken for it.
    assert found == {
        "mask_rcnn/accuracy": 0.75,
        "mask_rcnn/false_positive": 0.5,
        "mask_rcnn/false_negative": 0,
    }


def test_cell_is_predicted_from_a_probability_of_one_half_on():
    # Of 8 columns, the 4 of the object have logits just above 0, the others just below.
    prediction = torch.where(torch.arange(8) < 4, 0.1, -0.1).expand(2, 1, 8, 8)
    with EventStorage(0) as storage:
        mask_rcnn_loss(prediction, [regions(2)])
    assert storage.histories()["mask_rcnn/accuracy"].latest() == 1


def test_detections_get_the_mask_of_their_class():
    prediction = logits(3)
    instances = [detections(2, 0), detections(), detections(1)]
    mask_rcnn_inference(prediction, instances)
    assert [tuple(x.pred_masks.shape) for x in instances] == [
        (2, 1, 8, 8),
        (0, 1, 8, 8),
        (1, 1, 8, 8),
    ]
    found = torch.cat([x.pred_masks[:, 0] for x in instances])
    torch.testing.assert_close(
        found, torch.stack([prediction[0, 2], prediction[1, 0], prediction[2, 1]]).sigmoid()
    )


def test_shared_masks_go_to_every_class():
    prediction, instances = logits(2, channels=1), [detections(2, 0)]
    mask_rcnn_inference(prediction, instances)
    torch.testing.assert_close(instances[0].pred_masks, prediction.sigmoid())


def test_masks_in_half_precision_become_float32():
    instances = [detections(1)]
    mask_rcnn_inference(logits(1).bfloat16(), instances)
    assert instances[0].pred_masks.dtype == torch.float32


@pytest.mark.parametrize("count", [0, 1, 5])
def test_head_trains_and_predicts(count):
    head, x = make(), torch.randn(count, C, 7, 7)
    losses = head(x, [regions(count), background()])
    assert set(losses) == {"loss_mask"}
    losses["loss_mask"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    instances = head.eval()(x, [detections(*[1] * count), detections()])
    assert [tuple(y.pred_masks.shape) for y in instances] == [(count, 1, 14, 14), (0, 1, 14, 14)]


def test_loss_is_finite_under_autocast():
    head = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head(torch.randn(2, C, 7, 7), [regions(2)])["loss_mask"]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(2), rel=0.05)  # untrained, a mask is undecided


def test_names_and_shapes_of_weights_are_those_of_detectron2():
    shapes = {name: tuple(t.shape) for name, t in make().state_dict().items()}
    assert shapes == {
        "mask_fcn1.weight": (6, C, 3, 3),
        "mask_fcn1.bias": (6,),
        "mask_fcn2.weight": (6, 6, 3, 3),
        "mask_fcn2.bias": (6,),
        "deconv.weight": (6, 6, 2, 2),
        "deconv.bias": (6,),
        "predictor.weight": (K, 6, 1, 1),
        "predictor.bias": (K,),
    }


def test_keys_choose_norm_and_shared_masks():
    head = make("MODEL.ROI_MASK_HEAD.NORM", "BN", "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True)
    assert {"mask_fcn1.norm.weight", "mask_fcn2.norm.running_mean"} <= set(head.state_dict())
    assert "mask_fcn1.bias" not in head.state_dict()
    assert head.predictor.out_channels == 1


def test_weight_of_the_loss():
    shape = ShapeSpec(channels=C)
    torch.manual_seed(0)
    one = MaskRCNNConvUpsampleHead(input_shape=shape, num_classes=K, conv_dims=[4])
    torch.manual_seed(0)
    three = MaskRCNNConvUpsampleHead(
        input_shape=shape, num_classes=K, conv_dims=[4], loss_weight=3.0
    )
    x, instances = torch.randn(2, C, 7, 7), [regions(2)]
    torch.testing.assert_close(three(x, instances)["loss_mask"], 3 * one(x, instances)["loss_mask"])


def test_head_of_ones_own_needs_layers_only():
    class Head(BaseMaskRCNNHead):
        def layers(self, x):
            return x

    assert Head()(logits(2), [regions(2)])["loss_mask"] > 0
    with pytest.raises(NotImplementedError, match="BaseMaskRCNNHead does not implement layers"):
        BaseMaskRCNNHead()(logits(2), [regions(2)])


@pytest.mark.parametrize(
    ("shape", "dims", "message"),
    [
        pytest.param(ShapeSpec(channels=4), [], "conv_dims is empty", id="no upsampling"),
        pytest.param(ShapeSpec(), [4], "needs the channels of its input", id="no channels"),
    ],
)
def test_head_that_cannot_be_built_is_an_error(shape, dims, message):
    with pytest.raises(ValueError, match=message):
        MaskRCNNConvUpsampleHead(input_shape=shape, num_classes=K, conv_dims=dims)


def test_layers_are_listed_for_a_subclass_that_runs_them_itself():
    head = MaskRCNNConvUpsampleHead(ShapeSpec(channels=4), num_classes=3, conv_dims=[8, 8, 6])
    x = want = torch.randn(2, 4, 3, 3)
    for layer in head.conv_norm_relus:
        x = layer(x)
    assert torch.equal(head.predictor(head.deconv(x).relu()), head.layers(want))


class _OneLayer(BaseMaskRCNNHead):
    """Takes its own settings besides those of the base."""

    @configurable
    def __init__(self, input_shape, *, num_classes, **kwargs):
        super().__init__(**kwargs)
        self.predictor = nn.Conv2d(input_shape.channels, num_classes, 1)

    @classmethod
    def from_config(cls, cfg, input_shape):
        own = {"input_shape": input_shape, "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES}
        return {**super().from_config(cfg, input_shape), **own}

    def layers(self, x):
        return self.predictor(x)


class _NoLayer(BaseMaskRCNNHead):
    def layers(self, x):
        return x


@pytest.mark.parametrize("head_class", [_OneLayer, _NoLayer, MaskRCNNConvUpsampleHead])
def test_subclasses_take_the_settings_of_the_base_from_the_config(head_class):
    head = head_class(cfg_with({"VIS_PERIOD": 7}), ShapeSpec(channels=4))
    assert (head.vis_period, head.loss_weight) == (7, 1.0)
