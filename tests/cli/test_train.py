from argparse import Namespace

import pytest

from detkit.cli import train
from detkit.config import get_cfg


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
