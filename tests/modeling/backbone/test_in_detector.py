"""Backbones within Faster R-CNN, from YAML: they train and detect."""

import pytest
import torch

from detkit.config import get_cfg
from detkit.modeling import build_model
from detkit.solver import build_optimizer
from detkit.structures import Boxes, Instances
from detkit.utils.events import EventStorage

COMMON = """
MODEL:
  DEVICE: cpu
  WEIGHTS: ""
  BACKBONE: {FREEZE_AT: 0}
  RPN: {PRE_NMS_TOPK_TRAIN: 100, PRE_NMS_TOPK_TEST: 100, POST_NMS_TOPK_TRAIN: 20, POST_NMS_TOPK_TEST: 20}
  ROI_HEADS: {NUM_CLASSES: 3, BATCH_SIZE_PER_IMAGE: 16, SCORE_THRESH_TEST: 0.0}
  ROI_BOX_HEAD: {FC_DIM: 16}
SOLVER: {BASE_LR: 0.0001}
"""
# Res4, or a dilated res5, straight into the two heads.
WITHOUT_PYRAMID = """
MODEL:
  BACKBONE: {NAME: build_resnet_backbone}
  RESNETS: {DEPTH: 18, NORM: BN, STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 8, OUT_FEATURES: [@feature], RES5_DILATION: @dilation}
  RPN: {IN_FEATURES: [@feature]}
  ROI_HEADS: {NAME: StandardROIHeads, IN_FEATURES: [@feature]}
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, NUM_FC: 2, POOLER_RESOLUTION: 7}
"""


def _config(tmp_path, *texts: str):
    cfg = get_cfg()
    for index, text in enumerate(texts):
        file = tmp_path / f"{index}.yaml"
        file.write_text(text)
        cfg.merge_from_file(str(file))
    return cfg


def _batch(size=(60, 90)):
    generator = torch.Generator().manual_seed(0)
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor([[5.0, 8.0, 40.0, 50.0], [30.0, 10.0, 80.0, 55.0]]))
    instances.gt_classes = torch.tensor([0, 2])
    return [
        {
            "image": torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator),
            "instances": instances,
        }
    ]


def _train(cfg, steps: int) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    for _ in range(steps):
        with (
            EventStorage(),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=cfg.SOLVER.AMP.ENABLED),
        ):
            losses = model(_batch())
        assert all(torch.isfinite(loss) for loss in losses.values())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(("feature", "dilation"), [("res4", 1), ("res5", 1), ("res5", 2)])
def test_resnet_18_without_a_pyramid_trains_and_detects(tmp_path, feature, dilation):
    text = WITHOUT_PYRAMID.replace("@feature", feature).replace("@dilation", str(dilation))
    model = _train(_config(tmp_path, COMMON, text), steps=2)
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        (output,) = model.eval()(_batch())
    assert output["instances"].image_size == (60, 90)
    assert len(output["instances"]) > 0


@pytest.mark.parametrize(
    ("modulated", "amp"),
    [
        pytest.param(False, False, id="v1"),
        pytest.param(True, False, id="v2", marks=pytest.mark.slow),
        pytest.param(False, True, id="v1, AMP", marks=pytest.mark.slow),
        pytest.param(True, True, id="v2, AMP", marks=pytest.mark.slow),
    ],
)
def test_deformable_resnet_50_with_a_pyramid_takes_a_training_step(tmp_path, modulated, amp):
    cfg = _config(
        tmp_path,
        "_BASE_: detkit://Misc/mask_rcnn_R_50_FPN_1x_dconv_c3-c5.yaml\nMODEL: {MASK_ON: False}",
        COMMON,
        f"MODEL: {{RESNETS: {{DEFORM_MODULATED: {modulated}}}}}\nSOLVER: {{AMP: {{ENABLED: {amp}}}}}",
    )
    model = _train(cfg, steps=1)
    offsets = [p for name, p in model.named_parameters() if "conv2_offset" in name]
    assert len(offsets) == 2 * (4 + 6 + 3)
    assert all(p.any() for p in offsets)  # they were zero
