"""Tests of detkit.modeling.meta_arch.retinanet_head."""

import pytest
import torch

from detkit.config import get_cfg
from detkit.layers import CycleBatchNormList, ShapeSpec
from detkit.modeling import RetinaNetHead

C, K, A = 32, 3, 2
SHAPES = [ShapeSpec(channels=C, stride=8), ShapeSpec(channels=C, stride=16)]


def make(**kwargs):
    torch.manual_seed(0)
    arguments = {"input_shape": SHAPES, "num_classes": K, "num_anchors": A, "conv_dims": [C, C]}
    return RetinaNetHead(**{**arguments, **kwargs})


def features(num=2):
    return [torch.randn(num, C, 4, 6), torch.randn(num, C, 2, 3)]


def test_maps_have_a_number_per_anchor_and_class_or_side():
    logits, deltas = make()(features())
    assert [tuple(x.shape) for x in logits] == [(2, A * K, 4, 6), (2, A * K, 2, 3)]
    assert [tuple(x.shape) for x in deltas] == [(2, A * 4, 4, 6), (2, A * 4, 2, 3)]


def test_every_class_starts_at_the_prior_probability():
    with torch.no_grad():
        scores = make(prior_prob=0.2)([0 * x for x in features()])[0][0].sigmoid()
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
    state = make(norm=norm).state_dict()
    assert [
        name for name in names if f"cls_subnet.{name}" in state and f"bbox_subnet.{name}" in state
    ] == names
    last = {f"{part}.{kind}" for part in ("cls_score", "bbox_pred") for kind in ("weight", "bias")}
    assert {name for name in state if "subnet" not in name} == last


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_batch_norm_keeps_statistics_per_level(norm):
    head = make(norm=norm)
    head(features())
    norms = [m for m in head.modules() if isinstance(m, CycleBatchNormList)]
    assert len(norms) == 4
    for layer in norms:
        assert [int(level.num_batches_tracked) for level in layer] == [1, 1]


def test_settings_come_from_the_config():
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
        make(input_shape=shapes)


def test_levels_of_different_numbers_of_anchors_are_an_error():
    cfg = get_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32, 40]]
    with pytest.raises(
        ValueError, match=r"MODEL.ANCHOR_GENERATOR: .* anchors per cell; got \[3, 6\]"
    ):
        RetinaNetHead(cfg, SHAPES)


@pytest.mark.parametrize("prior", [0.0, 1.0, 2.0])
def test_prior_outside_is_an_error(prior):
    with pytest.raises(
        ValueError, match=f"MODEL.RETINANET.PRIOR_PROB must lie between 0 and 1, got {prior}"
    ):
        make(prior_prob=prior)


def test_wrong_number_of_features_is_an_error():
    with pytest.raises(ValueError, match="built for 2 levels, got 1 features"):
        make()(features()[:1])
