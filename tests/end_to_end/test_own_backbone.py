"""The README's example of a backbone in a user's own file, as printed there."""

import re
import sys
from pathlib import Path

import pytest
import torch

from detkit.cli import train
from detkit.modeling import BACKBONE_REGISTRY

README = Path(__file__).parents[2] / "README.md"


def _block(first_line: str) -> str:
    """The fenced block of the README that starts with the given comment."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (found,) = [block for block in blocks if block.startswith(first_line)]
    return found


def test_backbone_of_the_readme_trains(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name for name, _ in BACKBONE_REGISTRY}
    monkeypatch.setattr(sys, "path", list(sys.path))  # the working directory is put on it
    (workplace / "my_backbone.py").write_text(_block("# my_backbone.py"))
    (workplace / "my_backbone.yaml").write_text(_block("# my_backbone.yaml"))
    small = ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", "out"]
    small += ["INPUT.MIN_SIZE_TRAIN", "[64]", "INPUT.MIN_SIZE_TEST", "64", "MODEL.DEVICE", "cpu", "VIS_PERIOD", "0"]
    try:
        assert train.main(["--config-file", "my_backbone.yaml", *small]) == 0
        added = {name for name, _ in BACKBONE_REGISTRY} - known
    finally:
        sys.modules.pop("my_backbone", None)
    assert added, "the example registers no backbone"
    saved = torch.load(workplace / "out" / "model_final.pth", weights_only=True)
    assert any(name.startswith("backbone.bottom_up.stages") for name in saved["model"])
