"""Tests of detkit.modeling.proposal_generator.rpn."""

import pytest
import torch
from torch import nn

from detkit.config import get_cfg
from detkit.layers import ShapeSpec
from detkit.modeling.proposal_generator.rpn import RPN, StandardRPNHead
from detkit.structures import Boxes, ImageList, Instances, pairwise_iou
from detkit.utils.errors import ConfigError
from detkit.utils.events import EventStorage

SIZE = (64, 96)
NAMES = ["p3", "p4"]


def config(**rpn):
    cfg = get_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32]]
    cfg.MODEL.RPN.IN_FEATURES = NAMES
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 32
    for key, value in rpn.items():
        cfg.MODEL.RPN[key] = value
    return cfg


def make(**rpn):
    torch.manual_seed(0)
    return RPN(
        config(**rpn),
        {"p3": ShapeSpec(channels=4, stride=8), "p4": ShapeSpec(channels=4, stride=16)},
    )


def batch(num_images=2):
    torch.manual_seed(1)
    images = ImageList(torch.zeros(num_images, 3, *SIZE), [SIZE] * num_images)
    features = {
        f"p{k}": torch.randn(num_images, 4, SIZE[0] // 2**k, SIZE[1] // 2**k) for k in (3, 4)
    }
    return images, features


def truth(*boxes):
    return Instances(SIZE, gt_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)))


OBJECT = (10.0, 10.0, 30.0, 34.0)


def labels_and_boxes(rpn, gt_instances):
    _, features = batch(len(gt_instances))
    anchors = rpn.anchor_generator([features[name] for name in NAMES])
    return anchors, *rpn.label_and_sample_anchors(anchors, gt_instances)


def test_training_gives_losses_and_proposals():
    proposals, losses = make()(*batch(), [truth(OBJECT), truth(OBJECT, (40, 5, 60, 40))])
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc"}
    assert all(loss.dim() == 0 and loss.isfinite() and loss > 0 for loss in losses.values())
    assert [sorted(p.get_fields()) for p in proposals] == [
        ["objectness_logits", "proposal_boxes"]
    ] * 2


def test_inference_gives_proposals_only():
    proposals, losses = make().eval()(*batch())
    assert losses == {}
    for p in proposals:
        assert (p.objectness_logits.diff() <= 0).all()
        assert p.proposal_boxes.inside_box((SIZE[0] + 1, SIZE[1] + 1)).all()


def test_proposals_carry_no_gradient():
    proposals, _ = make()(*batch(), [truth(OBJECT), truth(OBJECT)])
    assert not any(
        p.proposal_boxes.tensor.requires_grad or p.objectness_logits.requires_grad
        for p in proposals
    )


def test_untrained_head_proposes_its_anchors():
    rpn = make(NMS_THRESH=1.0).eval()
    torch.nn.init.zeros_(rpn.rpn_head.anchor_deltas.weight)
    images, features = batch(1)
    anchors = Boxes.cat(rpn.anchor_generator([features[name] for name in NAMES]))
    anchors.clip(SIZE)
    ((proposals,), _) = rpn(images, features)
    expected = {tuple(box) for box in anchors[anchors.nonempty()].tensor.round(decimals=3).tolist()}
    assert {
        tuple(box) for box in proposals.proposal_boxes.tensor.round(decimals=3).tolist()
    } == expected


def test_logits_and_deltas_keep_the_order_of_the_anchors():
    """An anchor that the head singles out in its maps is the one that is proposed, moved as the maps say."""
    rpn = make(NMS_THRESH=1.0).eval()
    logits = [torch.full((1, 3, 8, 12), -9.0), torch.full((1, 3, 4, 6), -9.0)]
    deltas = [torch.zeros(1, 12, 8, 12), torch.zeros(1, 12, 4, 6)]
    logits[1][0, 2, 1, 3] = 5.0
    deltas[1][0, 8, 1, 3] = 0.25  # dx of anchor 2
    rpn.rpn_head.forward = lambda features: (logits, deltas)
    ((proposals,), _) = rpn(*batch(1))
    anchor = rpn.anchor_generator.cell_anchors[1][2] + torch.tensor([48.0, 16, 48, 16])
    width = anchor[2] - anchor[0]
    expected = Boxes((anchor + 0.25 * width * torch.tensor([1.0, 0, 1, 0]))[None])
    expected.clip(SIZE)
    torch.testing.assert_close(proposals.proposal_boxes.tensor[:1], expected.tensor)


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_memory_format_does_not_matter(memory_format):
    images, features = batch()
    expected, _ = make().eval()(images, features)
    converted = {name: x.contiguous(memory_format=memory_format) for name, x in features.items()}
    found, _ = make().eval().to(memory_format=memory_format)(images, converted)
    torch.testing.assert_close(
        found[0].proposal_boxes.tensor, expected[0].proposal_boxes.tensor, rtol=1e-4, atol=1e-3
    )


def test_topk_before_and_after_nms():
    kwargs = {"PRE_NMS_TOPK_TEST": 20, "POST_NMS_TOPK_TEST": 7, "NMS_THRESH": 1.0}
    assert [len(p) for p in make(**kwargs).eval()(*batch())[0]] == [7, 7]
    kwargs["POST_NMS_TOPK_TEST"] = 1000
    assert all(
        20 < len(p) <= 40 for p in make(**kwargs).eval()(*batch())[0]
    )  # 20 of either level, less empty ones


def test_labels_by_hand():
    rpn = make(BATCH_SIZE_PER_IMAGE=10000, POSITIVE_FRACTION=1.0)
    anchors, (labels,), (boxes,) = labels_and_boxes(rpn, [truth(OBJECT)])
    anchors = Boxes.cat(anchors)
    iou = pairwise_iou(truth(OBJECT).gt_boxes, anchors)[0]
    expected = torch.where(iou < 0.3, 0, torch.where(iou < 0.7, -1, 1))
    expected[iou == iou.max()] = 1
    assert labels.tolist() == expected.tolist()
    torch.testing.assert_close(
        boxes[labels == 1], torch.tensor([OBJECT]).expand(int((labels == 1).sum()), 4)
    )


def test_sample_is_bounded_and_background_fills_it_up():
    _, labels, _ = labels_and_boxes(make(BATCH_SIZE_PER_IMAGE=16), [truth(OBJECT), truth()])
    assert [int((x >= 0).sum()) for x in labels] == [16, 16]
    assert 1 <= int((labels[0] == 1).sum()) <= 8
    assert int((labels[1] == 1).sum()) == 0


def test_anchors_outside_the_image_are_not_trained_on_request():
    rpn = make(BOUNDARY_THRESH=0, BATCH_SIZE_PER_IMAGE=10000)
    anchors, (labels,), _ = labels_and_boxes(rpn, [truth(OBJECT)])
    outside = ~Boxes.cat(anchors).inside_box(SIZE, 0)
    assert outside.any()
    assert set(labels[outside].tolist()) == {-1}


def test_losses_are_normalised_by_the_wanted_sample():
    """With more room in the sample than there are anchors, doubling the room halves the losses."""
    gt = [truth(OBJECT), truth(OBJECT)]
    _, small = make(BATCH_SIZE_PER_IMAGE=10000, POSITIVE_FRACTION=1.0)(*batch(), gt)
    _, large = make(BATCH_SIZE_PER_IMAGE=20000, POSITIVE_FRACTION=1.0)(*batch(), gt)
    for name in small:
        torch.testing.assert_close(small[name], 2 * large[name])


def test_loss_weights_are_factors():
    gt = [truth(OBJECT), truth(OBJECT)]
    everything = {"BATCH_SIZE_PER_IMAGE": 10000, "POSITIVE_FRACTION": 1.0}
    _, plain = make(**everything)(*batch(), gt)
    _, weighted = make(**everything, LOSS_WEIGHT=2.0, BBOX_REG_LOSS_WEIGHT=3.0)(*batch(), gt)
    torch.testing.assert_close(weighted["loss_rpn_cls"], 2 * plain["loss_rpn_cls"])
    torch.testing.assert_close(weighted["loss_rpn_loc"], 6 * plain["loss_rpn_loc"])


@pytest.mark.parametrize("loss_type", ["smooth_l1", "giou", "diou", "ciou"])
@pytest.mark.parametrize("with_object", [True, False], ids=["some", "only-empty-images"])
def test_every_parameter_gets_a_finite_gradient(loss_type, with_object):
    rpn = make(BBOX_REG_LOSS_TYPE=loss_type)
    gt = [truth(OBJECT) if with_object else truth(), truth()]
    _, losses = rpn(*batch(), gt)
    sum(losses.values()).backward()
    for name, parameter in rpn.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert rpn.rpn_head.anchor_deltas.weight.grad.any() == with_object


def test_scalars_are_logged_per_image():
    rpn = make(BATCH_SIZE_PER_IMAGE=16)
    with EventStorage(0) as storage:
        rpn(*batch(), [truth(OBJECT), truth()])
        latest = storage.latest()
    positive, negative = latest["rpn/num_pos_anchors"][0], latest["rpn/num_neg_anchors"][0]
    assert positive > 0
    assert positive + negative == 16


def test_diverged_training_stops():
    rpn = make()
    torch.nn.init.constant_(rpn.rpn_head.objectness_logits.bias, float("nan"))
    with pytest.raises(FloatingPointError, match="training has diverged"):
        rpn(*batch(), [truth(OBJECT), truth()])


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_boxes_and_losses_are_float32_under_autocast(dtype):
    rpn = make()
    with torch.autocast("cpu", dtype=dtype):
        proposals, losses = rpn(*batch(), [truth(OBJECT), truth(OBJECT)])
    assert (
        proposals[0].proposal_boxes.tensor.dtype
        == proposals[0].objectness_logits.dtype
        == torch.float32
    )
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    _, expected = make()(*batch(), [truth(OBJECT), truth(OBJECT)])
    torch.testing.assert_close(losses["loss_rpn_cls"], expected["loss_rpn_cls"], rtol=0.02, atol=0)


def test_training_without_ground_truth_is_an_error():
    with pytest.raises(ValueError, match="gt_instances is None"):
        make()(*batch())


def test_feature_that_the_backbone_lacks_names_the_key():
    with pytest.raises(ValueError, match=r"MODEL.RPN.IN_FEATURES must be of .*: got 'p3'"):
        RPN(config(), {"p4": ShapeSpec(channels=4, stride=16)})


def test_rpn_holds_no_state_but_the_head():
    assert all(name.startswith("rpn_head.") for name in make().state_dict())


def test_settings_come_from_the_config():
    cfg = config(
        BBOX_REG_LOSS_TYPE="giou", SMOOTH_L1_BETA=0.25, BBOX_REG_WEIGHTS=(1.0, 2.0, 3.0, 4.0)
    )
    cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE = 3
    rpn = RPN(cfg, {"p3": ShapeSpec(channels=4, stride=8), "p4": ShapeSpec(channels=4, stride=16)})
    assert (rpn.box_reg_loss_type, rpn.smooth_l1_beta, rpn.min_box_size) == ("giou", 0.25, 3)
    assert rpn.box2box_transform.weights == (1.0, 2.0, 3.0, 4.0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        pytest.param(
            "IOU_THRESHOLDS", [0.7, 0.3], "thresholds must be positive and rise", id="matcher"
        ),
        pytest.param("BBOX_REG_LOSS_TYPE", "l3", "box_reg_loss_type must be one of", id="loss"),
    ],
)
def test_bad_setting_is_an_error_with_the_argument_and_its_key(key, value, message):
    cfg = get_cfg()
    cfg.MODEL.RPN.IN_FEATURES = ["p2"]
    cfg.MODEL.RPN[key] = value
    with pytest.raises(ConfigError, match=rf"^RPN: {message}.*\(set by MODEL.RPN.{key}\)"):
        RPN(cfg, {"p2": ShapeSpec(channels=8, stride=4)})


def test_head_maps_have_an_entry_per_anchor():
    logits, deltas = StandardRPNHead(in_channels=8, num_anchors=3)(
        [torch.randn(2, 8, 5, 7), torch.randn(2, 8, 1, 1)]
    )
    assert [tuple(x.shape) for x in logits] == [(2, 3, 5, 7), (2, 3, 1, 1)]
    assert [tuple(x.shape) for x in deltas] == [(2, 12, 5, 7), (2, 12, 1, 1)]


@pytest.mark.parametrize(
    ("conv_dims", "names"),
    [
        pytest.param([-1], {"conv.weight": (8, 8, 3, 3)}, id="one"),
        pytest.param([16], {"conv.weight": (16, 8, 3, 3)}, id="other-width"),
        pytest.param(
            [16, -1],
            {"conv.conv0.weight": (16, 8, 3, 3), "conv.conv1.weight": (16, 16, 3, 3)},
            id="two",
        ),
    ],
)
def test_names_and_shapes_of_weights_are_those_of_detectron2(conv_dims, names):
    state = StandardRPNHead(in_channels=8, num_anchors=3, conv_dims=conv_dims).state_dict()
    last = tuple(names.values())[-1][0]
    names = {
        **names,
        "objectness_logits.weight": (3, last, 1, 1),
        "anchor_deltas.weight": (12, last, 1, 1),
    }
    assert {name: tuple(t.shape) for name, t in state.items() if name.endswith("weight")} == names
    assert {name for name in state if name.endswith("bias")} == {
        name.replace("weight", "bias") for name in names
    }


def test_weights_start_small_and_biases_at_zero():
    state = StandardRPNHead(in_channels=64, num_anchors=15).state_dict()
    for name, t in state.items():
        if name.endswith("bias"):
            assert not t.any()
        else:
            assert 0.008 < t.std() < 0.012


class _DilatedHead(StandardRPNHead):
    def _get_rpn_conv(self, in_channels, out_channels):
        return nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=2, dilation=2, bias=False), nn.GELU()
        )


@pytest.mark.parametrize("conv_dims", [(-1,), (4, 6)])
def test_head_is_built_with_the_convolutions_of_a_subclass(conv_dims):
    head = _DilatedHead(in_channels=8, num_anchors=3, conv_dims=conv_dims)
    dilated = [m for m in head.modules() if isinstance(m, nn.Conv2d) and m.dilation == (2, 2)]
    assert [conv.in_channels for conv in dilated] == [8, *conv_dims[:-1]]
    assert all(0.005 < conv.weight.std() < 0.02 for conv in dilated)
    assert head([torch.zeros(1, 8, 4, 5)])[0][0].shape == (1, 3, 4, 5)


def test_head_does_not_change_its_input():
    x = torch.randn(1, 8, 5, 7)
    before = x.clone()
    StandardRPNHead(in_channels=8, num_anchors=3)([x])
    torch.testing.assert_close(x, before)


def test_config_gives_the_head_channels_and_anchors():
    cfg = get_cfg()
    cfg.MODEL.RPN.CONV_DIMS = [16, -1]
    head = StandardRPNHead(cfg, [ShapeSpec(channels=8, stride=16)])
    assert head.objectness_logits.weight.shape == (15, 16, 1, 1)


def test_levels_of_different_channels_are_an_error():
    with pytest.raises(ValueError, match=r"MODEL.RPN.IN_FEATURES: .*same channels; got \[8, 16\]"):
        StandardRPNHead(
            get_cfg(), [ShapeSpec(channels=8, stride=16), ShapeSpec(channels=16, stride=32)]
        )


def test_levels_of_different_anchors_use_the_first_predictions():
    cfg = config()
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0], [0.25, 0.5, 1.0, 2.0]]
    shapes = [ShapeSpec(channels=4, stride=8), ShapeSpec(channels=4, stride=16)]
    head = StandardRPNHead(cfg, shapes)
    assert head.objectness_logits.out_channels == 4
    x = torch.randn(2, 4, 5, 7)
    (first, last), (first_deltas, last_deltas) = head([x, x])
    assert (first.shape[1], first_deltas.shape[1]) == (2, 8)
    assert (last.shape[1], last_deltas.shape[1]) == (4, 16)
    torch.testing.assert_close(first, last[:, :2])
    torch.testing.assert_close(first_deltas, last_deltas[:, :8])

    rpn = RPN(cfg, {"p3": shapes[0], "p4": shapes[1]})
    proposals, losses = rpn(*batch(), [truth(OBJECT), truth()])
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in rpn.parameters())
    assert [len(proposals_i) > 0 for proposals_i in proposals] == [True, True]


def test_proposals_below_the_score_are_dropped():
    images, features = batch()
    (every, _), (likely, _) = (
        make(SCORE_THRESH=thresh, NMS_THRESH=1.0).eval()(images, features) for thresh in (0.0, 0.5)
    )
    for every_i, likely_i in zip(every, likely, strict=True):
        scores = every_i.objectness_logits.sigmoid()
        assert 0 < len(likely_i) < len(every_i)
        assert torch.equal(likely_i.objectness_logits, every_i.objectness_logits[scores >= 0.5])


@pytest.mark.parametrize("conv_dims", [[], [0], [16, -2]], ids=["none", "zero", "negative"])
def test_bad_conv_dims_name_the_key(conv_dims):
    with pytest.raises(ValueError, match="conv_dims must have a number per convolution"):
        StandardRPNHead(in_channels=8, num_anchors=3, conv_dims=conv_dims)
