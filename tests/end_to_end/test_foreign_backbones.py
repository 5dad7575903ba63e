"""Backbones of torchvision and timm, from YAML alone: two steps with a pyramid, evaluation, resuming, prediction."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from detkit.cli import train
from detkit.config import get_cfg
from detkit.engine import DefaultPredictor
from detkit.model_zoo import get_config
from detkit.modeling import build_backbone, follow_backbone_pixels
from detkit.utils.image import read_image

CONFIG = """
_BASE_: [tiny.yaml]
MODEL:
  BACKBONE: {{NAME: build_{library}_fpn_backbone}}
  {library_upper}: {{NAME: {model}}}
  FPN: {{IN_FEATURES: [s4, s8, s16, s32]}}
DATASETS: {{TEST: []}}
"""
SMALL = ["resnet18", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "regnet_y_400mf"]
LARGE = ["resnet34", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "convnext_tiny", "swin_t"]
TIMM_SMALL = ["mobilenetv3_small_050"]
TIMM_LARGE = ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224", "regnety_002"]


def _write(folder: Path, library: str, model: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(library=library, library_upper=library.upper(), model=model))
    return path


@pytest.mark.parametrize(
    ("library", "model"),
    [
        *(("torchvision", model) for model in SMALL),
        *(("timm", model) for model in TIMM_SMALL),
        *(pytest.param("torchvision", model, marks=pytest.mark.slow) for model in LARGE),
        *(pytest.param("timm", model, marks=pytest.mark.slow) for model in TIMM_LARGE),
    ],
)
def test_model_trains_with_a_pyramid(workplace: Path, library: str, model: str) -> None:
    pytest.importorskip(library)
    assert train.main(["--config-file", str(_write(workplace, library, model))]) == 0
    lines = (workplace / "out" / "metrics.json").read_text().splitlines()
    assert '"iteration": 1' in lines[-1]
    saved = torch.load(workplace / "out" / "model_final.pth", weights_only=True)
    assert any(name.startswith("backbone.bottom_up.body.") for name in saved["model"])


def test_config_of_the_documentation_builds_what_it_says(workplace: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "backbones.md"
    text = page.read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(# swin.yaml\n.*?)^```", text, re.DOTALL | re.MULTILINE)
    (workplace / "swin.yaml").write_text(block)
    cfg = get_cfg()
    cfg.merge_from_file("swin.yaml")
    follow_backbone_pixels(cfg)
    assert (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN) == ("RGB", [123.675, 116.28, 103.53])
    assert [shape.channels for shape in build_backbone(cfg).bottom_up.output_shape().values()] == [
        96,
        192,
        384,
        768,
    ]


@pytest.mark.parametrize(
    "name", ["faster_rcnn_mobilenet_v3_large_FPN_shapes", "faster_rcnn_swin_t_FPN"]
)
def test_packaged_example_has_the_pixels_of_its_model(name: str) -> None:
    cfg = get_config(f"Examples/{name}.yaml")
    follow_backbone_pixels(cfg)
    got = (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    assert got == ("RGB", [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])


def _settings(path: Path) -> tuple[list[float], list[float], str]:
    tree = yaml.safe_load(path.read_text())
    return tree["MODEL"]["PIXEL_MEAN"], tree["MODEL"]["PIXEL_STD"], tree["INPUT"]["FORMAT"]


def test_pixels_of_the_model_go_through_training_resuming_evaluation_and_prediction(
    workplace: Path, datasets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "DETKIT_OFFLINE", "1"
    )  # the weights are named, and yet nothing may look for them
    config = _write(workplace, "torchvision", "mobilenet_v3_small")
    assert train.main(["--config-file", str(config)]) == 0
    dumped = workplace / "out" / "config.yaml"
    # The base sets PIXEL_STD, in the order of BGR images; the other two follow the model.
    want = ([123.675, 116.28, 103.53], [57.375, 57.12, 58.395], "RGB")
    assert _settings(dumped) == want
    assert (
        "MODEL.PIXEL_STD [57.375, 57.12, 58.395] is kept"
        in (workplace / "out" / "log.txt").read_text()
    )

    weights = str(workplace / "out" / "model_final.pth")
    named = ["MODEL.TORCHVISION.WEIGHTS", "DEFAULT"]
    assert (
        train.main(["--config-file", str(dumped), "--resume", "SOLVER.MAX_ITER", "3", *named]) == 0
    )
    assert _settings(dumped) == want
    evaluation = [
        "--eval-only",
        "DATASETS.TEST",
        "('shapes_val',)",
        "MODEL.WEIGHTS",
        weights,
        *named,
    ]
    assert train.main(["--config-file", str(config), *evaluation]) == 0

    picture = read_image(str(next((datasets / "shapes").rglob("*.jpg"))))
    outputs = []
    for path in (config, dumped):
        cfg = get_cfg()
        cfg.merge_from_file(str(path))
        cfg.merge_from_list(
            ["MODEL.WEIGHTS", weights, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, *named]
        )
        cfg.freeze()
        predictor = DefaultPredictor(cfg)
        assert predictor.input_format == "RGB"
        outputs.append(predictor(picture)["instances"].scores.numpy())
    assert len(outputs[0]) > 0
    np.testing.assert_array_equal(*outputs)


def test_weights_that_are_not_there_end_a_new_run_with_a_message(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DETKIT_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(workplace))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    config = _write(workplace, "torchvision", "mobilenet_v3_small")
    assert train.main(["--config-file", str(config), "MODEL.TORCHVISION.WEIGHTS", "DEFAULT"]) == 2
    assert "place it as" in capsys.readouterr().err
