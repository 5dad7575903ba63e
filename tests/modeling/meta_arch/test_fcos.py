"""Tests of detkit.modeling.meta_arch.fcos."""

import math

import pytest
import torch

from detkit.layers import ShapeSpec
from detkit.modeling import FCOSHead, build_model
from detkit.structures import Boxes, Instances
from tests.configs import cfg_with
from tests.helpers import slow_focal_loss, slow_pairwise_iou
from tests.modeling.meta_arch.two_levels import SIZE, K, inputs


def make(*overrides):
    options = {
        "MODEL.DEVICE": "cpu",
        "MODEL.META_ARCHITECTURE": "FCOS",
        "MODEL.BACKBONE.NAME": "TwoConvolutions",
        "MODEL.FCOS.IN_FEATURES": ["p3", "p4"],
        "MODEL.FCOS.NUM_CLASSES": K,
        "MODEL.FCOS.NUM_CONVS": 1,
        "MODEL.FCOS.PRIOR_PROB": 0.2,
        "MODEL.PIXEL_STD": [50.0, 50.0, 50.0],
    }
    cfg = cfg_with(options, overrides)
    torch.manual_seed(0)
    return build_model(cfg)


def cells(sizes=((8, 12), (4, 6)), strides=(8, 16)):
    """Return (x, y, stride, level) of every cell."""
    return [
        ((x + 0.5) * stride, (y + 0.5) * stride, stride, level)
        for level, ((height, width), stride) in enumerate(zip(sizes, strides, strict=True))
        for y in range(height)
        for x in range(width)
    ]


def slow_owner(cell, boxes, radius=1.5, num_levels=2):
    """Return which of the boxes a cell is trained on, or None."""
    x, y, stride, level = cell
    owners = []
    for m, (x1, y1, x2, y2) in enumerate(boxes):
        sides = (x - x1, y - y1, x2 - x, y2 - y)
        is_inside = min(sides) > 0
        is_near = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)) < radius * stride
        lower = 0 if level == 0 else 4 * stride
        upper = math.inf if level == num_levels - 1 else 8 * stride
        if is_inside and is_near and lower < max(sides) < upper:
            owners.append(((x2 - x1) * (y2 - y1), m))
    return min(owners)[1] if owners else None


def slow_giou_loss(a, b):
    left, top = max(a[0], b[0]), max(a[1], b[1])
    right, bottom = min(a[2], b[2]), min(a[3], b[3])
    common = max(right - left, 0) * max(bottom - top, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return 1 - common / union + (hull - union) / hull


def slow_sums(model, batch):
    """Return the three losses as sums, and the number of foreground cells, cell by cell."""
    levels = [model.backbone(model.preprocess_image(batch).tensor)[name] for name in ("p3", "p4")]
    maps = model.head(levels)
    rows = [
        torch.cat([x.flatten(2).transpose(1, 2) for x in kind], dim=1).tolist() for kind in maps
    ]
    loss_cls = loss_loc = loss_ctr = 0.0
    num_foreground = 0
    for i, image in enumerate(batch):
        boxes, classes = image["instances"].gt_boxes.tensor.tolist(), image["instances"].gt_classes
        for cell, logits, sides, (ctr,) in zip(cells(), *(row[i] for row in rows), strict=True):
            owner = slow_owner(cell, boxes)
            for k in range(K):
                is_true = owner is not None and classes[owner] == k
                loss_cls += slow_focal_loss(logits[k], is_true, alpha=0.25, gamma=2.0)
            if owner is None:
                continue
            num_foreground += 1
            x, y, stride, _ = cell
            left, top, right, bottom = (max(side, 0) * stride for side in sides)
            x1, y1, x2, y2 = boxes[owner]
            loss_loc += slow_giou_loss((x - left, y - top, x + right, y + bottom), boxes[owner])
            ratios = [sorted(pair) for pair in ((x - x1, x2 - x), (y - y1, y2 - y))]
            target = math.sqrt(math.prod(small / large for small, large in ratios))
            loss_ctr += math.log1p(math.exp(ctr)) - target * ctr
    return (loss_cls, loss_loc, loss_ctr), num_foreground


@pytest.mark.parametrize(
    "numbers", [(2, 1), (2, 0), (0, 0)], ids=["all", "one-empty", "only-empty"]
)
def test_losses_are_sums_over_cells_divided_by_the_moving_average(numbers):
    model, batch = make(), inputs(*numbers)
    with torch.no_grad():
        sums, num_foreground = slow_sums(model, batch)
        assert (num_foreground > 0) == any(numbers)
        average = 300.0
        for _ in range(2):
            losses = model(batch)
            average = 0.9 * average + 0.1 * max(num_foreground, 1)
            assert list(losses) == ["loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"]
            assert [loss.item() * average for loss in losses.values()] == pytest.approx(
                sums, rel=1e-4
            )


@pytest.mark.parametrize("numbers", [(2, 1), (0, 0)], ids=["objects", "only-empty"])
def test_losses_reach_every_parameter(numbers):
    model = make()
    sum(model(inputs(*numbers)).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


GRID = [torch.zeros(1, 1, 8, 12), torch.zeros(1, 1, 4, 6)]


@pytest.mark.parametrize(
    "boxes",
    [
        pytest.param([[10, 12, 40, 33]], id="one"),
        pytest.param([[0, 0, 96, 64], [20, 20, 60, 50]], id="small-in-large"),
        pytest.param([[20, 20, 60, 50], [20, 20, 60, 50]], id="same-twice"),
        pytest.param([[0, 0, 5, 5]], id="between-the-centres"),
        pytest.param([[4, 4, 28, 28]], id="sides-on-centres"),
        pytest.param([[4, 4, 124, 60]], id="64-pixels-from-a-centre-of-p3"),
        pytest.param([[8, 4, 128, 60]], id="64-pixels-from-a-centre-of-p4"),
    ],
)
def test_cells_belong_to_the_smallest_object_of_their_level_around_them(boxes):
    model = make()
    gt = Instances(SIZE, gt_boxes=Boxes(boxes), gt_classes=torch.arange(len(boxes)))
    labels, matched = model.label_cells(model.anchor_generator(GRID), gt)
    owners = [slow_owner(cell, boxes) for cell in cells()]
    assert labels.tolist() == [K if owner is None else owner for owner in owners]
    for row, owner in zip(matched.tolist(), owners, strict=True):
        assert owner is None or row == boxes[owner]


def test_wider_radius_trains_more_cells():
    gt = inputs(2)[0]["instances"]
    few, many = (
        (model.label_cells(model.anchor_generator(GRID), gt)[0] < K).sum()
        for model in (make("MODEL.FCOS.CENTER_SAMPLING_RADIUS", 0.6), make())
    )
    assert 0 < few < many


def test_score_is_the_geometric_mean_of_class_and_centreness():
    settings = ("MODEL.FCOS.SCORE_THRESH_TEST", 0.0, "MODEL.FCOS.NMS_THRESH_TEST", 1.0)
    model, batch = make(*settings).eval(), inputs(1)
    with torch.no_grad():
        levels = [model.backbone(model.preprocess_image(batch).tensor)[x] for x in ("p3", "p4")]
        logits, _, centreness = model.head(levels)
        (found,) = model.inference(batch, do_postprocess=False)
    best = max(
        (torch.sigmoid(x) * torch.sigmoid(y)).sqrt().max()
        for x, y in zip(logits, centreness, strict=True)
    )
    assert found.scores[0] == best


def test_detections_are_the_best_of_their_class():
    settings = ("TEST.DETECTIONS_PER_IMAGE", 7, "MODEL.FCOS.SCORE_THRESH_TEST", 0.1)
    outputs = make(*settings).eval()(inputs(1, 0, height=120, width=180))
    for output in outputs:
        found = output["instances"]
        assert found.image_size == (120, 180)
        assert 0 < len(found) <= 7
        assert (found.scores.diff() <= 0).all()
        iou = slow_pairwise_iou(found.pred_boxes.tensor, found.pred_boxes.tensor).fill_diagonal_(0)
        assert (iou[found.pred_classes[:, None] == found.pred_classes] <= 0.65).all()


def test_suppression_follows_the_config():
    everything = ("TEST.DETECTIONS_PER_IMAGE", 2000, "MODEL.FCOS.SCORE_THRESH_TEST", 0.0)
    numbers = []
    for overrides in ((), ("TEST.NMS.METHOD", "gaussian"), ("TEST.NMS.CLASS_AGNOSTIC", True)):
        model = make(*everything, *overrides).eval()
        torch.nn.init.constant_(model.head.bbox_pred.bias, 2.0)  # wide enough to overlap
        (found,) = model.inference(inputs(1), do_postprocess=False)
        numbers.append(len(found))
    usual, soft, agnostic = numbers
    assert soft > usual > agnostic > 0


def test_settings_come_from_the_config():
    model = make("MODEL.FCOS.FOCAL_LOSS_ALPHA", 0.3, "MODEL.FCOS.FOCAL_LOSS_GAMMA", 1.5)
    assert (model.focal_loss_alpha, model.focal_loss_gamma) == (0.3, 1.5)
    assert model.head.cls_subnet[1].num_groups == 32


def test_unknown_feature_names_the_key():
    with pytest.raises(ValueError, match=r"MODEL.FCOS.IN_FEATURES must be of .* got 'p5'"):
        make("MODEL.FCOS.IN_FEATURES", ["p3", "p5"])


def test_threshold_may_be_set_on_the_model():
    model = make("MODEL.FCOS.SCORE_THRESH_TEST", 0.0).eval()
    (found,) = model.inference(inputs(1), do_postprocess=False)
    model.test_score_thresh = found.scores.median().item()
    (fewer,) = model.inference(inputs(1), do_postprocess=False)
    assert 0 < len(fewer) < len(found)


@pytest.mark.parametrize("features", [["p4", "p3"], ["p3", "p3"]])
def test_levels_that_are_not_finest_first_are_refused(features):
    with pytest.raises(ValueError, match="head_in_features must be finest first: .* have strides"):
        make("MODEL.FCOS.IN_FEATURES", features)


def test_levels_of_different_channels_name_the_key():
    shapes = [ShapeSpec(channels=32, stride=8), ShapeSpec(channels=64, stride=16)]
    with pytest.raises(ValueError, match=r"MODEL.FCOS.IN_FEATURES: .* same channels; got"):
        FCOSHead(input_shape=shapes, num_classes=K, conv_dims=[32])


def test_masks_are_refused():
    with pytest.raises(ValueError, match="MODEL.MASK_ON is True, but .* FCOS does not use it"):
        make("MODEL.MASK_ON", True)
