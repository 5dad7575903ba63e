"""Runs that the version before the one trainer (commit 9fc378d) had begun go on as they would have with it.

`tests/golden/old_run/KIND` holds what that version wrote in a run of six iterations: the checkpoint of the third, and
the last one. They were recorded in a checkout of that commit, with this file in it, by

    OLD_RUN=FOLDER python -m pytest tests/engine/test_old_run.py
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detkit.checkpoint import load_checkpoint_file
from detkit.engine import DefaultTrainer, hooks
from detkit.utils.env import seed_all_rng
from tests.same import same

RECORDED = Path(__file__).parents[1] / "golden" / "old_run"
FIRST, LAST = "model_0000002.pth", "model_final.pth"


def tiny(cfg):
    """One convolution with batch norm: averaged weights, two passes a step, SGD, a best score."""
    cfg.SOLVER.ACCUM_STEPS, cfg.SOLVER.SKIP_NONFINITE_STEPS = 2, 2
    cfg.MODEL_EMA.ENABLED, cfg.TEST.EVAL_PERIOD = True, 2
    cfg.BEST_METRIC, cfg.EARLY_STOP.PATIENCE = "bbox/AP", 5


def faster_rcnn(cfg):
    """Faster R-CNN with a ResNet-18 of few channels: AdamW, frozen layers, losses on the test set."""
    cfg.merge_from_file("detkit://Base-RCNN-FPN.yaml")
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.STRIDE_IN_1X1 = 18, False
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = "BN", "BN", 1
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 2, 2
    cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 4, 8
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 12
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.META_ARCHITECTURE = 2, "GeneralizedRCNN"
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR, cfg.SOLVER.STEPS = "AdamW", 0.001, (4,)
    cfg.TEST.COMPUTE_LOSS, cfg.TEST.EVAL_PERIOD = True, 2
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("tiny_train",), ("tiny_val",)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (40,), 40
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS = 2, 6, 0


KINDS = {"tiny": tiny, "faster_rcnn": faster_rcnn}


@pytest.fixture(params=KINDS)
def old_run(request, tiny_cfg, tmp_path):
    """The folder of the recorded run, and its settings."""
    KINDS[request.param](tiny_cfg)
    rng = np.random.default_rng(0)
    for path in sorted((tmp_path / "data" / "images").iterdir()):
        # Norms of pictures of one color divide rounding errors by next to nothing.
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return RECORDED / request.param, tiny_cfg


def make_trainer(cfg):
    """A trainer whose second step has gradients that are not finite, where it may be skipped."""

    def spoil(trainer):
        if trainer.iter == 1 and cfg.SOLVER.SKIP_NONFINITE_STEPS:
            for parameter in trainer.model.parameters():
                parameter.grad.fill_(torch.nan)

    seed_all_rng(cfg.SEED)
    trainer = DefaultTrainer(cfg)
    trainer.register_hooks([hooks.CallbackHook(after_backward=spoil)])
    return trainer


@pytest.mark.skipif("OLD_RUN" not in os.environ, reason="records a run")
def test_record(old_run):
    folder, cfg = old_run
    make_trainer(cfg).train()
    target = Path(os.environ["OLD_RUN"]) / folder.name
    target.mkdir(parents=True)
    for name in (FIRST, LAST):
        shutil.copy(Path(cfg.OUTPUT_DIR) / name, target / name)


def resumed(folder, cfg):
    output = Path(cfg.OUTPUT_DIR)
    output.mkdir()
    shutil.copy(folder / FIRST, output / FIRST)
    (output / "last_checkpoint").write_text(FIRST)
    trainer = make_trainer(cfg)
    trainer.resume_or_load(resume=True)
    return trainer


def without(state, *names):
    return {key: value for key, value in state.items() if key not in names}


def test_state_of_the_old_checkpoint_is_taken_over_whole(old_run):
    folder, cfg = old_run
    trainer = resumed(folder, cfg)
    old = load_checkpoint_file(str(folder / FIRST))
    assert trainer.start_iter == 3
    assert same(dict(trainer.checkpointer.model.state_dict()), dict(old["model"]))
    if trainer.ema is not None:
        assert same(trainer.ema.state_dict(), old["ema"])
    # Written again, it is in the place where the old version looks for it. Random numbers, measured
    # values and the hooks to come are set when training begins.
    new, old = trainer.state_dict(), old["trainer"]
    assert new["iteration"] == new["_trainer"]["iteration"] == old["iteration"]
    assert same(new["hooks"], old["hooks"])
    assert same(new["_trainer"]["optimizer"], old["_trainer"]["optimizer"])
    assert new["_trainer"]["skipped_steps"] == old["_trainer"]["skipped_steps"]
    assert old["_trainer"]["skipped_steps"] == (1 if folder.name == "tiny" else 0)
    (new_rank,), (old_rank,) = new["_trainer"]["ranks"], old["_trainer"]["ranks"]
    assert same(new_rank["data"], old_rank["data"])
    assert same(new_rank["ungathered"], old_rank["ungathered"])
    assert "hooks" in new_rank  # which the old version looks for there, too


def test_run_ends_as_the_old_version_ended_it(old_run):
    folder, cfg = old_run
    trainer = resumed(folder, cfg)
    trainer.train()
    found = load_checkpoint_file(str(Path(cfg.OUTPUT_DIR) / LAST))
    expected = load_checkpoint_file(str(folder / LAST))

    def check(new, old):
        # Not bit for bit, as it is on one machine: convolutions and matrix products add in an
        # order of their own on each kind of CPU. Other images, other draws, a forgotten momentum
        # or another learning rate change the numbers by far more.
        torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-5)

    check(dict(found["model"]), dict(expected["model"]))
    if "ema" in expected:
        check(found["ema"]["weights"], expected["ema"]["weights"])
        assert found["ema"]["num_updates"] == expected["ema"]["num_updates"]
    new, old = found["trainer"], expected["trainer"]
    check(new["_trainer"]["optimizer"]["state"], old["_trainer"]["optimizer"]["state"])
    assert new["_trainer"]["skipped_steps"] == old["_trainer"]["skipped_steps"]
    # The same hooks; the writers are last today, which users' `insert(-1, hook)` counts on.
    assert sorted(new["hooks_to_come"]) == sorted(old["hooks_to_come"])
    assert same(new["_trainer"]["ranks"][0]["data"], old["_trainer"]["ranks"][0]["data"])
    # The same random numbers are drawn next, so the same ones were drawn in between.
    assert same(new["ranks"][0]["random"], old["ranks"][0]["random"])
    for name, scalar in old["storage"].items():
        if name in ("time", "data_time"):
            continue
        assert [i for _, i in scalar["values"]] == [i for _, i in new["storage"][name]["values"]]
        values = [value for value, _ in scalar["values"]]
        assert [value for value, _ in new["storage"][name]["values"]] == pytest.approx(
            values, rel=1e-3, abs=1e-5, nan_ok=True
        )
