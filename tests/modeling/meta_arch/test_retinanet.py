"""Tests of detkit.modeling.meta_arch.retinanet."""

import pytest
import torch
from torch import nn

from detkit.checkpoint.key_matching import match_weights
from detkit.config import get_cfg
from detkit.layers import CycleBatchNormList, ShapeSpec
from detkit.modeling import RetinaNetHead, build_model
from detkit.structures import Boxes
from detkit.utils.events import EventStorage
from tests.configs import cfg_with
from tests.helpers import slow_focal_loss, slow_match, slow_pairwise_iou
from tests.modeling.meta_arch.two_levels import SIZE, K, inputs


def make(*overrides):
    options = {
        "MODEL.DEVICE": "cpu",
        "MODEL.META_ARCHITECTURE": "RetinaNet",
        "MODEL.BACKBONE.NAME": "TwoConvolutions",
        "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32]],
        "MODEL.RETINANET.IN_FEATURES": ["p3", "p4"],
        "MODEL.RETINANET.NUM_CLASSES": K,
        "MODEL.RETINANET.NUM_CONVS": 1,
        "MODEL.RETINANET.PRIOR_PROB": 0.2,
        "MODEL.PIXEL_STD": [50.0, 50.0, 50.0],
    }
    cfg = cfg_with(options, overrides)
    torch.manual_seed(0)
    return build_model(cfg)


def slow_sums(model, batch):
    """Return the sum of the focal loss, that of the L1 loss, and the number of foreground anchors, anchor by anchor."""
    levels = [model.backbone(model.preprocess_image(batch).tensor)[name] for name in ("p3", "p4")]
    anchors = Boxes.cat(model.anchor_generator(levels))
    maps = zip(*model.head(levels), strict=True)
    rows = [
        [
            x.permute(0, 2, 3, 1).reshape(len(batch), -1, d)
            for x, d in zip(pair, (K, 4), strict=True)
        ]
        for pair in maps
    ]
    logits, deltas = (torch.cat([row[k] for row in rows], dim=1).tolist() for k in (0, 1))
    loss_cls = loss_box = 0.0
    num_foreground = 0
    for i, x in enumerate(batch):
        gt = x["instances"]
        if len(gt) == 0:
            labels, matches = [0] * len(anchors), [0] * len(anchors)
        else:
            iou = slow_pairwise_iou(gt.gt_boxes.tensor, anchors.tensor)
            _, labels = slow_match(iou, [0.4, 0.5], [0, -1, 1], allow_low_quality=True)
            matches = iou.argmax(dim=0).tolist()
        for r, label in enumerate(labels):
            if label == -1:
                continue
            for k in range(K):
                is_true = label == 1 and gt.gt_classes[matches[r]] == k
                loss_cls += slow_focal_loss(logits[i][r][k], is_true, alpha=0.25, gamma=2.0)
            if label == 1:
                num_foreground += 1
                target = model.box2box_transform.get_deltas(
                    anchors.tensor[r : r + 1], gt.gt_boxes.tensor[matches[r]][None]
                )
                loss_box += sum(
                    abs(a - b) for a, b in zip(deltas[i][r], target[0].tolist(), strict=True)
                )
    return loss_cls, loss_box, num_foreground


@pytest.mark.parametrize(
    "numbers", [(2, 1), (2, 0), (0, 0)], ids=["all", "one-empty", "only-empty"]
)
def test_losses_are_sums_over_anchors_divided_by_the_moving_average(numbers):
    model, batch = make("MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", 0.0), inputs(*numbers)
    with torch.no_grad():
        loss_cls, loss_box, num_foreground = slow_sums(model, batch)
        assert (num_foreground > 0) == any(numbers)
        average = 100.0
        for _ in range(2):
            losses = model(batch)
            average = 0.9 * average + 0.1 * max(num_foreground, 1)
            assert losses["loss_cls"].item() == pytest.approx(loss_cls / average, rel=1e-4)
            assert losses["loss_box_reg"].item() == pytest.approx(loss_box / average, rel=1e-4)


@pytest.mark.parametrize("loss_type", ["smooth_l1", "giou", "diou", "ciou"])
@pytest.mark.parametrize("numbers", [(2, 1), (0, 0)], ids=["objects", "only-empty"])
def test_losses_reach_every_parameter(loss_type, numbers):
    model = make("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", loss_type)
    losses = model(inputs(*numbers))
    assert set(losses) == {"loss_cls", "loss_box_reg"}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_few_steps_lower_the_losses():
    model, batch = make(), inputs(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    history = []
    for _ in range(15):
        loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(
            loss.item() * model.loss_normalizer.item()
        )  # the average falls from its start at 100
    assert history[-1] < 0.8 * history[0]


def test_foreground_anchors_are_logged():
    with EventStorage() as storage:
        model, batch = make(), inputs(2, 1)
        model(batch)
    assert float(storage.latest()["num_pos_anchors"][0]) == slow_sums(model, batch)[2] / 2


def test_fresh_model_has_the_names_of_detectron2_and_a_trained_one_its_average_too():
    model = make()
    fresh = set(model.state_dict())
    assert "loss_normalizer" not in fresh
    model(inputs(2))
    assert set(model.state_dict()) - fresh == {"loss_normalizer"}


def test_average_is_resumed_by_a_fresh_model():
    trained = make()
    trained(inputs(2))
    resumed = make()
    chosen, report = match_weights(trained.state_dict(), resumed.state_dict())
    assert report.is_complete
    assert not report.unexpected
    resumed.load_state_dict(chosen)
    assert resumed.loss_normalizer.item() == trained.loss_normalizer.item() < 100


def test_weights_without_an_average_start_it_afresh():
    trained, weights = make(), make().state_dict()
    trained(inputs(2))
    chosen, report = match_weights(weights, trained.state_dict())
    assert report.is_complete
    trained.load_state_dict(chosen)
    assert trained.loss_normalizer is None


def test_detections_are_the_best_of_their_class():
    outputs = make("TEST.DETECTIONS_PER_IMAGE", 7).eval()(inputs(1, 0, height=120, width=180))
    for output in outputs:
        found = output["instances"]
        assert found.image_size == (120, 180)
        assert sorted(found.get_fields()) == ["pred_boxes", "pred_classes", "scores"]
        assert 0 < len(found) <= 7
        assert (found.scores.diff() <= 0).all()
        iou = slow_pairwise_iou(found.pred_boxes.tensor, found.pred_boxes.tensor).fill_diagonal_(0)
        assert (
            iou[found.pred_classes[:, None] == found.pred_classes] <= 0.55
        ).all()  # clipped after NMS


def test_suppression_follows_the_config():
    batch = inputs(1)
    everything = ("TEST.DETECTIONS_PER_IMAGE", 2000, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0)
    usual, soft, agnostic = (
        make(*everything, *overrides).eval().inference(batch, do_postprocess=False)[0]
        for overrides in ((), ("TEST.NMS.METHOD", "gaussian"), ("TEST.NMS.CLASS_AGNOSTIC", True))
    )
    assert len(soft) > len(usual) > len(agnostic) > 0
    iou = slow_pairwise_iou(agnostic.pred_boxes.tensor, agnostic.pred_boxes.tensor).fill_diagonal_(
        0
    )
    assert iou.max() <= 0.5


def test_only_the_best_candidates_of_each_level_enter_suppression():
    everything = ("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0, "MODEL.RETINANET.NMS_THRESH_TEST", 1.0)
    (few,), (all_of_them,) = (
        make(*everything, "MODEL.RETINANET.TOPK_CANDIDATES_TEST", number)
        .eval()
        .inference(inputs(1), do_postprocess=False)
        for number in (3, 1000)
    )
    assert len(few) == 2 * 3
    assert few.scores[0] == all_of_them.scores[0]


def test_high_threshold_leaves_no_detection():
    (output,) = make("MODEL.RETINANET.SCORE_THRESH_TEST", 0.999).eval()(inputs(1))
    assert len(output["instances"]) == 0


def test_without_postprocessing_boxes_are_not_clipped():
    (found,) = make().eval().inference(inputs(1), do_postprocess=False)
    assert found.image_size == SIZE
    assert found.pred_boxes.tensor.min() < 0


def test_boxes_are_clipped_before_they_suppress_each_other_where_that_is_set():
    settings = ("MODEL.RETINANET.CLIP_BEFORE_NMS", True, "TEST.DETECTIONS_PER_IMAGE", 2000)
    (found,) = make(*settings).eval().inference(inputs(1), do_postprocess=False)
    boxes = found.pred_boxes.tensor
    assert boxes.min() >= 0
    assert (boxes[:, 2:] <= torch.tensor(SIZE[::-1])).all()
    iou = slow_pairwise_iou(boxes, boxes).fill_diagonal_(0)
    assert (iou[found.pred_classes[:, None] == found.pred_classes] <= 0.5).all()


def test_training_under_autocast_gives_losses_close_to_float32():
    batch = inputs(2, 1)
    expected = make()(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = make()(batch)
    for name, loss in losses.items():
        torch.testing.assert_close(loss.float(), expected[name], rtol=0.02, atol=0)


def test_training_without_ground_truth_is_an_error():
    with pytest.raises(
        ValueError, match="RetinaNet needs 'instances' in training: image 0 of the batch"
    ):
        make()([{"image": torch.zeros(3, *SIZE)}])


def test_unknown_feature_names_the_key():
    with pytest.raises(
        ValueError, match=r"MODEL.RETINANET.IN_FEATURES must be of \['p3', 'p4'\]: got 'p5'"
    ):
        make("MODEL.RETINANET.IN_FEATURES", ["p3", "p5"])


def test_settings_come_from_the_config():
    settings = (
        "BBOX_REG_LOSS_TYPE",
        "giou",
        "SMOOTH_L1_LOSS_BETA",
        0.25,
        "BBOX_REG_WEIGHTS",
        (1.0, 2.0, 3.0, 4.0),
    )
    settings += ("FOCAL_LOSS_ALPHA", 0.3, "FOCAL_LOSS_GAMMA", 1.5, "NORM", "GN")
    names = [f"MODEL.RETINANET.{name}" for name in settings[::2]]
    model = make(*(item for pair in zip(names, settings[1::2], strict=True) for item in pair))
    assert (model.box_reg_loss_type, model.smooth_l1_beta) == ("giou", 0.25)
    assert model.box2box_transform.weights == (1.0, 2.0, 3.0, 4.0)
    assert (model.focal_loss_alpha, model.focal_loss_gamma) == (0.3, 1.5)
    assert isinstance(model.head.cls_subnet[1], nn.GroupNorm)


C, A = 32, 2
SHAPES = [ShapeSpec(channels=C, stride=8), ShapeSpec(channels=C, stride=16)]


def make_head(**kwargs):
    torch.manual_seed(0)
    arguments = {"input_shape": SHAPES, "num_classes": K, "num_anchors": A, "conv_dims": [C, C]}
    return RetinaNetHead(**{**arguments, **kwargs})


def head_features(num=2):
    return [torch.randn(num, C, 4, 6), torch.randn(num, C, 2, 3)]


def test_maps_have_a_number_per_anchor_and_class_or_side():
    logits, deltas = make_head()(head_features())
    assert [tuple(x.shape) for x in logits] == [(2, A * K, 4, 6), (2, A * K, 2, 3)]
    assert [tuple(x.shape) for x in deltas] == [(2, A * 4, 4, 6), (2, A * 4, 2, 3)]


def test_every_class_starts_at_the_prior_probability():
    with torch.no_grad():
        scores = make_head(prior_prob=0.2)([0 * x for x in head_features()])[0][0].sigmoid()
    torch.testing.assert_close(scores, torch.full_like(scores, 0.2))


@pytest.mark.parametrize(
    ("norm", "names"),
    [
        pytest.param("", ["0.weight", "0.bias", "2.weight", "2.bias"], id="none"),
        pytest.param(
            "GN", ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"], id="shared"
        ),
    ],
)
def test_names_are_those_of_detectron2(norm, names):
    state = make_head(norm=norm).state_dict()
    assert [
        name for name in names if f"cls_subnet.{name}" in state and f"bbox_subnet.{name}" in state
    ] == names
    last = {f"{part}.{kind}" for part in ("cls_score", "bbox_pred") for kind in ("weight", "bias")}
    assert {name for name in state if "subnet" not in name} == last


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_batch_norm_keeps_statistics_per_level(norm):
    head = make_head(norm=norm)
    head(head_features())
    norms = [m for m in head.modules() if isinstance(m, CycleBatchNormList)]
    assert len(norms) == 4
    for layer in norms:
        assert [int(level.num_batches_tracked) for level in layer] == [1, 1]


def test_settings_of_the_head_come_from_the_config():
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.RETINANET.NUM_CONVS", 1, "MODEL.RETINANET.NUM_CLASSES", 7])
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32]]
    head = RetinaNetHead(cfg, SHAPES)
    assert head.cls_score.out_channels == 3 * 7
    assert len(head.cls_subnet) == 2


def test_levels_of_different_channels_are_an_error():
    shapes = [SHAPES[0], ShapeSpec(channels=2 * C, stride=16)]
    with pytest.raises(
        ValueError, match=r"MODEL.RETINANET.IN_FEATURES: .* the same channels; got \[32, 64\]"
    ):
        make_head(input_shape=shapes)


def test_levels_of_different_numbers_of_anchors_use_the_first_predictions():
    head = make_head(num_anchors=[2, 3])
    x = torch.randn(2, C, 4, 6)
    (few, many), (few_deltas, many_deltas) = head([x, x])
    assert (few.shape[1], few_deltas.shape[1]) == (2 * K, 2 * 4)
    assert (many.shape[1], many_deltas.shape[1]) == (3 * K, 3 * 4)
    torch.testing.assert_close(few, many[:, : 2 * K])
    torch.testing.assert_close(few_deltas, many_deltas[:, : 2 * 4])


def test_model_with_other_ratios_on_each_level_trains_and_detects():
    model = make("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5, 1.0, 2.0], [1.0]])
    losses = model(inputs(2, 1))
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert len(model.eval()(inputs(1))[0]["instances"]) > 0


@pytest.mark.parametrize("prior", [0.0, 1.0, 2.0])
def test_prior_outside_is_an_error(prior):
    with pytest.raises(ValueError, match=f"prior_prob must be between 0 and 1, got {prior}"):
        make_head(prior_prob=prior)


def test_wrong_number_of_features_is_an_error():
    with pytest.raises(ValueError, match="built for 2 levels, got 1 features"):
        make_head()(head_features()[:1])


def test_boxes_are_in_the_precision_of_the_weights_under_autocast():
    head, features = make_head().eval(), head_features()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits, deltas = head(features)
        half = head.bbox_subnet(features[0])
    assert (half.dtype, logits[0].dtype, deltas[0].dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )
    torch.testing.assert_close(deltas[0], head.bbox_pred(half.float()), rtol=0, atol=1e-6)
