import logging
from pathlib import Path

import pytest

from detkit.engine import DefaultTrainer, TrainerBase, hooks
from detkit.utils.image_file import BadImageError


class Trainer(TrainerBase):
    def run_step(self):
        if self.iter == 3:
            raise OSError("disk full")


class Loader:
    def __init__(self, skipped):
        self.skipped = skipped


def messages_of(loader, caplog, iterations=2):
    trainer = Trainer()
    trainer.register_hooks([hooks.SkippedImages(loader)])
    with caplog.at_level(logging.INFO):
        trainer.train(0, iterations)
    return [record.message for record in caplog.records if "skipped" in record.message]


def test_summary_names_each_image_and_counts(caplog):
    (message,) = messages_of(Loader({"b.jpg is empty": 1, "a.jpg does not exist": 3}), caplog)
    assert "2 images were skipped in training, 4 times in all" in message
    assert message.splitlines()[1:] == ["3 times: a.jpg does not exist", "1 times: b.jpg is empty"]


def test_long_list_is_cut_with_its_length(caplog):
    (message,) = messages_of(Loader({f"{k}.jpg is empty": 1 for k in range(130)}), caplog)
    assert len(message.splitlines()) == 102
    assert message.endswith("... and 30 others, which were named when they first came")


@pytest.mark.parametrize("loader", [Loader({}), object()], ids=["none", "own loader"])
def test_nothing_skipped_is_said_too(caplog, loader):
    assert messages_of(loader, caplog) == ["no image was skipped (DATALOADER.ON_BAD_IMAGE)"]


def test_run_that_fails_has_no_summary(caplog):
    with pytest.raises(OSError):
        messages_of(Loader({"a": 1}), caplog, iterations=5)
    assert not [record for record in caplog.records if "skipped" in record.message]


def test_trainer_counts_over_a_resume(tiny_cfg, tmp_path, caplog):
    tiny_cfg.DATASETS.TEST, tiny_cfg.DATALOADER.ON_BAD_IMAGE = (), "skip"
    bad = tmp_path / "data" / "images" / "0.png"
    bad.write_bytes(b"")
    DefaultTrainer(tiny_cfg).train()
    (Path(tiny_cfg.OUTPUT_DIR) / "last_checkpoint").write_text("model_0000002.pth")
    again = DefaultTrainer(tiny_cfg)
    again.resume_or_load(resume=True)
    again.train()
    summaries = [
        record.message for record in caplog.records if "skipped in training" in record.message
    ]
    assert len(summaries) == 2
    assert summaries[0] == summaries[1]
    assert f"{bad} is empty" in summaries[0]


def test_evaluation_skips_nothing(tiny_cfg, tmp_path):
    tiny_cfg.DATALOADER.ON_BAD_IMAGE = "skip"
    (tmp_path / "data" / "images" / "0.png").write_bytes(b"")
    with pytest.raises(BadImageError, match=r"0\.png is empty"):
        DefaultTrainer(tiny_cfg).train()
    assert (Path(tiny_cfg.OUTPUT_DIR) / "model_final.pth").exists()
