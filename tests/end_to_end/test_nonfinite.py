"""Losses that are not finite, from a YAML file on: a stop that is explained, steps that are skipped."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from detkit.checkpoint import load_checkpoint_file
from detkit.cli import train

# The losses of the second and the fourth step are not finite.
FAULTY = """
from detkit.modeling import META_ARCH_REGISTRY, GeneralizedRCNN


@META_ARCH_REGISTRY.register()
class FaultyForTests(GeneralizedRCNN):
    calls = 0

    def training_losses(self, batched_inputs):
        losses = super().training_losses(batched_inputs)
        FaultyForTests.calls += 1
        return {**losses, "loss_cls": losses["loss_cls"] * (float("nan") if FaultyForTests.calls in (2, 4) else 1.0)}
"""
CONFIG = """
_BASE_: tiny.yaml
IMPORTS: [faulty]
MODEL: {META_ARCHITECTURE: FaultyForTests}
DATASETS: {TEST: []}
SOLVER: {SKIP_NONFINITE_STEPS: 1, MAX_ITER: 3}
"""


@pytest.fixture
def faulty(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with `faulty.yaml`: the second and the fourth step are not finite."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # the working directory is put on it
    (workplace / "faulty.py").write_text(FAULTY)
    (workplace / "faulty.yaml").write_text(CONFIG)
    yield workplace
    sys.modules.pop("faulty", None)


def _skipped(folder: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [(row["iteration"], row["skipped_steps"]) for row in rows if "skipped_steps" in row]


def test_absurd_learning_rate_stops_the_run_and_is_explained(workplace: Path, capsys) -> None:
    settings = ["SOLVER.BASE_LR", "1e6", "SOLVER.MAX_ITER", "20", "DATASETS.TEST", "()"]
    assert train.main(["--config-file", "tiny.yaml", *settings]) == 2
    (path,) = (workplace / "out").glob("nonfinite_iter_*.json")
    message = capsys.readouterr().err
    assert "is not finite at iteration" in message
    assert "the learning rate is too high. Settings to look at: SOLVER.BASE_LR lower" in message
    assert f"All that is known: out/{path.name}." in message

    content = json.loads(path.read_text())
    assert path.name == f"nonfinite_iter_{content['iteration']:07d}.json"
    assert content["parameter_groups"][0]["lr"] > 1e5
    (process,) = content["processes"]
    (of_pass,) = process["passes"]
    assert len(of_pass["images"]) == 2
    assert all(
        image["file_name"].endswith(".jpg") and image["boxes"] for image in of_pass["images"]
    )
    assert process["replay"]["first_output"]["module"].startswith(
        ("backbone.", "proposal_generator.", "roi_heads.")
    )
    assert not list((workplace / "out").glob("*.pth"))


def test_steps_are_skipped_as_often_as_allowed_and_counted_through_a_resume(
    faulty: Path, capsys
) -> None:
    assert train.main(["--config-file", "faulty.yaml"]) == 0
    assert _skipped(faulty / "out") == [(1, 1)]
    log = (faulty / "out" / "log.txt").read_text()
    assert (
        "iteration 1 is skipped (1 of SOLVER.SKIP_NONFINITE_STEPS=1): not finite are loss_cls=nan"
        in log
    )
    assert " (images " in log
    final = load_checkpoint_file(str(faulty / "out" / "model_final.pth"))
    assert all(value.isfinite().all() for value in final["model"].values())

    assert train.main(["--config-file", "faulty.yaml", "--resume", "SOLVER.MAX_ITER", "5"]) == 2
    assert "not finite at iteration 3: loss_cls=nan" in (message := capsys.readouterr().err)
    assert "1 steps were skipped before (SOLVER.SKIP_NONFINITE_STEPS)" in message
    assert (faulty / "out" / "nonfinite_iter_0000003.json").is_file()


def test_negative_number_of_steps_is_refused(workplace: Path, capsys) -> None:
    assert train.main(["--config-file", "tiny.yaml", "SOLVER.SKIP_NONFINITE_STEPS", "-1"]) == 2
    assert "SOLVER.SKIP_NONFINITE_STEPS must be at least 0, got -1" in capsys.readouterr().err
