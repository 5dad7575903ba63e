from argparse import Namespace

import pytest

from detkit.cli import train
from detkit.cli.train import format_results
from detkit.config import get_cfg

COCO = {"bbox": {"AP": 41.26, "AP50": 60.0, "AP-cat": 50.0, "AP-traffic-light": 30.0}}


def _rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]


def test_overall_metrics_of_a_task_are_one_row() -> None:
    assert _rows(format_results(COCO))[0] == ["", "AP", "AP50"]
    assert _rows(format_results(COCO))[2] == ["bbox", "41.3", "60.0"]


def test_metrics_of_single_classes_are_left_to_the_log() -> None:
    assert "cat" not in format_results(COCO)
    assert "traffic" not in format_results(COCO)


def test_several_tasks_are_several_tables() -> None:
    text = format_results({**COCO, "segm": {"AP": 38.0}})
    assert ["segm", "38.0"] in _rows(text)
    assert ["bbox", "41.3", "60.0"] in _rows(text)


def test_several_data_sets_are_named() -> None:
    lines = format_results({"first_val": COCO, "second_val": {"bbox": {"AP": 7.0}}}).splitlines()
    assert "first_val" in lines
    assert "second_val" in lines
    assert "| bbox |  7.0 |" in lines


def test_missing_score_is_shown_as_nan() -> None:
    assert _rows(format_results({"bbox": {"AP": float("nan")}}))[2] == ["bbox", "nan"]


class Started(Exception):
    """The run came as far as the data."""


@pytest.fixture
def settings(tmp_path, monkeypatch):
    def start(cfg):
        raise Started

    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    monkeypatch.setattr(train, "setup", lambda args: cfg)
    monkeypatch.setattr(train, "DefaultTrainer", start)
    monkeypatch.setattr(start, "build_model", start, raising=False)
    return cfg


@pytest.mark.parametrize("eval_only", [False, True])
def test_missing_weights_are_found_before_the_data_are_read(settings, eval_only):
    settings.MODEL.WEIGHTS = "nofile.pth"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at nofile\.pth"):
        train.run(Namespace(resume=False, eval_only=eval_only))


@pytest.mark.parametrize("resume", [False, True])
def test_run_that_goes_on_needs_no_other_weights(settings, tmp_path, resume):
    settings.MODEL.WEIGHTS = "nofile.pth"
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    with pytest.raises(Started if resume else FileNotFoundError):
        train.run(Namespace(resume=resume, eval_only=False))
