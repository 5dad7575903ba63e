"""Models and backbones from YAML alone: two steps of training, and the second again after a restart, bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detkit.checkpoint import load_checkpoint_file
from detkit.cli import predict, train
from tests.same import same

REGNET = """
  BACKBONE: {NAME: build_regnet_fpn_backbone}
  REGNET: {DEPTH: 6, W_0: 8, W_A: 8, W_M: 2, GROUP_WIDTH: 8, STEM_WIDTH: 8, SE_RATIO: %s}
  FPN: {IN_FEATURES: [s1, s2, s3]}
  RPN: {IN_FEATURES: [p2, p3, p4]}
  ROI_HEADS: {IN_FEATURES: [p2, p3, p4]}
  ANCHOR_GENERATOR: {SIZES: [[16], [32], [64]]}
"""
MODELS = {
    "RegNet X": REGNET % 0.0,
    "RegNet Y, checkpointed": (REGNET % 0.25).replace("REGNET: {", "REGNET: {CHECKPOINT: True, "),
    "ViT": """
  BACKBONE: {NAME: build_vit_fpn_backbone}
  VIT: {EMBED_DIM: 32, DEPTH: 3, NUM_HEADS: 2, WINDOW_SIZE: 2, GLOBAL_BLOCKS: [2], DROP_PATH_RATE: 0.3}
  FPN: {NORM: LN, SQUARE_PAD: 96}
""",
    "ViT, last block trained": """
  BACKBONE: {NAME: build_vit_fpn_backbone}
  VIT: {EMBED_DIM: 32, DEPTH: 2, NUM_HEADS: 2, WINDOW_SIZE: 0, RESIDUAL_BLOCKS: [1], TRAINED_BLOCKS: 1}
""",
    "ViT of timm, frozen": """
  BACKBONE: {NAME: build_timm_vit_fpn_backbone}
  TIMM: {NAME: vit_tiny_patch16_224, TRAINED_BLOCKS: 0}
""",
    "Swin, checkpointed": """
  BACKBONE: {NAME: build_swin_fpn_backbone, FREEZE_AT: 0}
  SWIN: {EMBED_DIM: 8, DEPTHS: [1, 2, 1, 1], NUM_HEADS: [1, 1, 2, 2], CHECKPOINT: True}
  FPN: {IN_FEATURES: [p0, p1, p2, p3]}
""",
    "MViT": """
  BACKBONE: {NAME: build_mvit_fpn_backbone, FREEZE_AT: 0}
  MVIT: {EMBED_DIM: 8, DEPTH: 5, LAST_BLOCKS: [0, 1, 3, 4], WINDOW_SIZE: 8, IMAGE_SIZE: 64}
  FPN: {IN_FEATURES: [scale2, scale3, scale4, scale5]}
""",
    "ResNet variants": """
  BACKBONE: {NAME: build_resnet_fpn_backbone}
  RESNETS:
    DEPTH: 50
    WIDTH_PER_GROUP: 8
    NUM_STAGES: 5
    BLOCKS_PER_STAGE: [1, 1, 1, 1, 2]
    OUT_FEATURES: [res2, res3, res4, res5, res6]
    NORM: GN
    NORM_GROUPS: 8
    CONV_WS: True
    DEFORM_ON_PER_STAGE: [False, False, True, True, True]
    DEFORM_ON_STRIDE: False
    PLUGINS:
      - {name: ContextBlock, position: after_conv3, stages: [res4]}
      - {name: SqueezeExcitation, position: after_conv2}
  FPN: {IN_FEATURES: [res2, res3, res4, res5, res6]}
""",
    "anchors of different number, top block": r"""
  BACKBONE: {NAME: build_resnet_fpn_backbone}
  ANCHOR_GENERATOR: {ASPECT_RATIOS: [[0.5, 1, 2], [0.5, 1, 2], [0.25, 0.5, 1, 2, 4], [1], [1]]}
  FPN: {TOP_BLOCK: LastLevelMaxPool, UPSAMPLE_MODE: bilinear}
  RPN: {SCORE_THRESH: 0.3}
  INIT: [{names: 'bottom_up.*conv.\.weight$', type: xavier_uniform}]
""",
    "dilated res5 in a pyramid": """
  BACKBONE: {NAME: build_resnet_fpn_backbone}
  RESNETS: {RES5_DILATION: 2}
  ROI_HEADS: {IN_FEATURES: [p2, p3, p4]}
""",
    "FCOS": """
  META_ARCHITECTURE: FCOS
  BACKBONE: {NAME: build_retinanet_resnet_fpn_backbone}
  FCOS: {NUM_CLASSES: 5, NUM_CONVS: 1, NORM: "", IN_FEATURES: [p2, p3, p4, p5, p6, p7]}
""",
}
"""By name: the keys below MODEL that it needs beside those of a small Faster R-CNN."""


@pytest.mark.parametrize("model", MODELS)
def test_model_trains_and_resumes_exactly(workplace: Path, model: str) -> None:
    if "timm" in model:
        pytest.importorskip("timm")
    config = workplace / "config.yaml"
    config.write_text(f"_BASE_: tiny.yaml\nDATASETS: {{TEST: []}}\nMODEL:{MODELS[model]}")
    settings = ["SOLVER.CHECKPOINT_PERIOD", "1"]
    assert train.main(["--config-file", str(config), *settings]) == 0
    first = load_checkpoint_file("out/model_final.pth")
    assert all(value.isfinite().all() for value in first["model"].values())

    for name in ("model_final.pth", "model_0000001.pth"):
        Path("out", name).unlink(missing_ok=True)
    Path("out/last_checkpoint").write_text("model_0000000.pth")
    torch.manual_seed(123)
    assert train.main(["--config-file", str(config), "--resume", *settings]) == 0
    second = load_checkpoint_file("out/model_final.pth")
    assert same(second["model"], first["model"])
    optimizers = [run["trainer"]["_trainer"]["optimizer"] for run in (first, second)]
    assert same(*optimizers)


def test_images_of_four_channels_train_and_are_predicted(workplace: Path, datasets: Path) -> None:
    """A fourth channel that only two of the pictures have: the others are opaque."""
    pictures = workplace / "pictures"
    pictures.mkdir()
    for number, path in enumerate(sorted((datasets / "shapes/JPEGImages").glob("train*"))):
        rgba = Image.open(path).convert("RGBA")
        if number < 2:
            rgba.putalpha(7)
        rgba.save(pictures / f"{path.stem}.png")
    annotations = json.loads((datasets / "shapes/instances_train.json").read_text())
    for image in annotations["images"]:
        image["file_name"] = Path(image["file_name"]).with_suffix(".png").name
    (workplace / "rgba.json").write_text(json.dumps(annotations))
    (workplace / "config.yaml").write_text(
        """
_BASE_: tiny.yaml
DATASETS:
  REGISTER: [{name: rgba, format: coco, images: pictures, annotations: rgba.json}]
  TRAIN: [rgba]
  TEST: [rgba]
INPUT: {FORMAT: RGBA}
MODEL: {PIXEL_MEAN: [120, 120, 120, 200], PIXEL_STD: [60, 60, 60, 60]}
"""
    )
    assert train.main(["--config-file", "config.yaml"]) == 0
    weights = load_checkpoint_file("out/model_final.pth")["model"]
    assert weights["backbone.bottom_up.stem.conv1.weight"].shape[1] == 4
    picture = str(min(pictures.glob("*.png")))
    command = ["--config-file", "config.yaml", "--input", picture, "--output", "seen"]
    assert predict.main([*command, "MODEL.WEIGHTS", "out/model_final.pth"]) == 0


@pytest.mark.parametrize(("channels", "ending"), [(1, ".png"), (5, ".npy")])
def test_stored_values_of_any_channels_train_and_are_predicted(
    workplace: Path, datasets: Path, channels: int, ending: str
) -> None:
    """Grey of 16 bits, and floating point."""
    pictures = workplace / "pictures"
    pictures.mkdir()
    for path in sorted((datasets / "shapes/JPEGImages").glob("train*")):
        grey = np.asarray(Image.open(path).convert("L"))
        if ending == ".npy":
            values = np.stack([grey / 255 * k for k in range(1, channels + 1)], axis=2)
            np.save(pictures / f"{path.stem}.npy", values)
        else:
            Image.fromarray(grey.astype(np.uint16) * 200).save(pictures / f"{path.stem}.png")
    annotations = json.loads((datasets / "shapes/instances_train.json").read_text())
    for image in annotations["images"]:
        image["file_name"] = Path(image["file_name"]).with_suffix(ending).name
    (workplace / "raw.json").write_text(json.dumps(annotations))
    mean = [25000] if ending == ".png" else [0.5] * channels
    (workplace / "config.yaml").write_text(
        f"""
_BASE_: tiny.yaml
DATASETS:
  REGISTER: [{{name: raw_{channels}, format: coco, images: pictures, annotations: raw.json}}]
  TRAIN: [raw_{channels}]
  TEST: [raw_{channels}]
INPUT: {{FORMAT: RAW}}
MODEL: {{PIXEL_MEAN: {mean}, PIXEL_STD: {mean}}}
"""
    )
    assert train.main(["--config-file", "config.yaml"]) == 0
    weights = load_checkpoint_file("out/model_final.pth")["model"]
    assert weights["backbone.bottom_up.stem.conv1.weight"].shape[1] == channels
    command = ["--config-file", "config.yaml", "--input", "pictures", "--output", "seen"]
    assert predict.main([*command, "MODEL.WEIGHTS", "out/model_final.pth"]) == 0
    assert len(list(Path("seen").glob("train*"))) == len(annotations["images"])
