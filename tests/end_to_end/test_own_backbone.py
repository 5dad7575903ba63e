"""The documentation's examples of a backbone and a head in a user's own file, as printed there."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from detkit.cli import train
from detkit.modeling import BACKBONE_REGISTRY

PAGE = Path(__file__).parents[2] / "docs" / "write_a_part.md"


def _block(first_line: str) -> str:
    """Return the fenced block of the page that starts with the given comment."""
    blocks = re.findall(
        r"^```\w*\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    (found,) = [block for block in blocks if block.startswith(first_line)]
    return found


SMALL = """
SOLVER: {MAX_ITER: 2, IMS_PER_BATCH: 2}
DATALOADER: {NUM_WORKERS: 0}
INPUT: {MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64}
OUTPUT_DIR: out
VIS_PERIOD: 0
"""
# What the text below the example says of a model of one map.
WITHOUT_PYRAMID = """
_BASE_: my_backbone.yaml
MODEL:
  BACKBONE: {NAME: StridedConvs}
  RPN: {IN_FEATURES: [s32]}
  ROI_HEADS: {IN_FEATURES: [s32]}
  ANCHOR_GENERATOR: {SIZES: [[16, 32, 64]]}
"""


@pytest.fixture
def with_example(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory that holds the files of the page."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # the working directory is put on it
    (workplace / "my_backbone.py").write_text(_block("# my_backbone.py"))
    (workplace / "my_backbone.yaml").write_text(_block("# my_backbone.yaml"))
    (workplace / "my_head.py").write_text(_block("# my_head.py"))
    (workplace / "my_head.yaml").write_text(_block("# my_head.yaml"))
    yield workplace
    sys.modules.pop("my_backbone", None)
    sys.modules.pop("my_head", None)


@pytest.mark.parametrize(
    ("config", "prefix"),
    [
        pytest.param("_BASE_: my_backbone.yaml\n", "backbone.bottom_up.stages", id="with pyramid"),
        pytest.param(WITHOUT_PYRAMID, "backbone.stages", id="without"),
    ],
)
def test_backbone_of_the_page_trains(with_example: Path, config: str, prefix: str) -> None:
    (with_example / "small.yaml").write_text(config + SMALL)
    assert train.main(["--config-file", "small.yaml", "MODEL.DEVICE", "cpu"]) == 0
    assert "StridedConvs" in BACKBONE_REGISTRY
    saved = torch.load(with_example / "out" / "model_final.pth", weights_only=True)
    assert any(name.startswith(prefix) for name in saved["model"])


def test_wrong_channels_in_the_example_are_named(
    with_example: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _block("# my_backbone.py")
    declared = "widths = [width, 2 * width, 4 * width, 8 * width]"
    assert "zip(self._out_features, widths)" in source
    (with_example / "my_backbone.py").write_text(
        source.replace("zip(self._out_features, widths)", "zip(self._out_features, wrong)").replace(
            declared, f"{declared}\n        wrong = [width, 2 * width, 5 * width, 8 * width]"
        )
    )
    assert train.main(["--config-file", "my_backbone.yaml", "MODEL.DEVICE", "cpu"]) == 2
    assert (
        "StridedConvs.output_shape declares 's16' with 80 channels, forward returns 64"
        in capsys.readouterr().err
    )


def test_head_of_the_page_trains(with_example: Path) -> None:
    (with_example / "small.yaml").write_text("_BASE_: my_head.yaml\n" + SMALL)
    assert train.main(["--config-file", "small.yaml", "MODEL.DEVICE", "cpu"]) == 0
    saved = torch.load(with_example / "out" / "model_final.pth", weights_only=True)
    assert saved["model"]["roi_heads.box_head.fc.weight"].shape == (64, 64)


def test_example_of_the_page_is_short() -> None:
    assert len([line for line in _block("# my_backbone.py").splitlines() if line.strip()]) <= 32
