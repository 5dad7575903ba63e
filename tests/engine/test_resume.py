"""A run that was stopped anywhere and resumed ends where the undisturbed run ends, bit for bit."""

import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch

from detkit.checkpoint import load_checkpoint_file
from detkit.engine import DefaultTrainer, hooks
from detkit.utils.env import seed_all_rng
from detkit.utils.events import JSONWriter
from tests.same import same


class Killed(BaseException):
    """Stands for the end of the process: nothing that handles errors sees it."""


class Noisy(DefaultTrainer):
    """Draws random numbers in training and in evaluation, and can be killed at a place."""

    killed_at: tuple[str, int] | None = None

    def build_hooks(self):
        def kill(place):
            def hook(trainer):
                if self.killed_at == (place, trainer.iter):
                    raise Killed

            return hook

        found = list(super().build_hooks())
        found.insert(0, hooks.CallbackHook(before_step=kill("before"), after_step=kill("after")))
        return [*found, hooks.CallbackHook(after_step=kill("end"))]

    def run_step(self):
        noise = random.random() + torch.rand(1).item()
        self.storage.put_scalar("noise", noise, smoothing_hint=False)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += 1e-3 * torch.randn_like(parameter)
        super().run_step()
        if type(self).killed_at == ("step", self.iter):
            raise Killed

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        results = super().test(cfg, model, evaluators)
        if cls.killed_at == ("evaluation", None):
            raise Killed
        results["bbox"]["luck"] = torch.rand(1).item()
        return results


def run(cfg, *, resume=False, killed_at=None, base=Noisy):
    seed_all_rng(max(cfg.SEED, 0))
    trainer = type("Run", (base,), {"killed_at": killed_at})(cfg)
    trainer.resume_or_load(resume=resume)
    if killed_at is None:
        return trainer, trainer.train()
    with pytest.raises(Killed):
        trainer.train()
    return trainer, None


def rows(cfg):
    """What `metrics.json` holds, without times."""
    lines = (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()
    timed = ("time", "data_time", "eta_seconds")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def outcome(cfg, trainer):
    final = load_checkpoint_file(f"{cfg.OUTPUT_DIR}/model_final.pth")
    losses = trainer.storage.history("total_loss").values()
    optimizer = final["trainer"]["_trainer"]["optimizer"]["state"]
    ranks = [final["trainer"]["ranks"], final["trainer"]["_trainer"]["ranks"]]
    return final["model"], optimizer, ranks, losses, rows(cfg)


@pytest.fixture
def resumed_cfg(tiny_cfg, tmp_path, monkeypatch):
    """Settings with an evaluation every two iterations, a checkpoint every two, a line each, momentum and grouping."""
    monkeypatch.setattr("detkit.engine.default_trainer._WRITE_PERIOD", 1)
    tiny_cfg.SOLVER.CHECKPOINT_PERIOD = 2
    tiny_cfg.TEST.EVAL_PERIOD = 2
    tiny_cfg.SOLVER.STEPS = (4,)
    return tiny_cfg


@pytest.mark.parametrize(
    "killed_at",
    [
        [("before", 1)],
        [("step", 2), ("before", 4)],
        [("after", 3)],
        [("end", 3), ("end", 5)],
        [("evaluation", None), ("evaluation", None)],
    ],
    ids=lambda places: "-".join(f"{name}{number or ''}" for name, number in places),
)
def test_resumed_run_equals_the_undisturbed_one(resumed_cfg, tmp_path, killed_at):
    expected = outcome(resumed_cfg, run(resumed_cfg)[0])
    resumed_cfg.OUTPUT_DIR = str(tmp_path / "again")
    for k, place in enumerate(killed_at):
        run(resumed_cfg, resume=k > 0, killed_at=place)
    assert same(outcome(resumed_cfg, run(resumed_cfg, resume=True)[0]), expected)


@pytest.mark.parametrize("place", ["before_step", "after_step", "evaluation", "writer"])
def test_error_in_a_hook_costs_no_iteration(resumed_cfg, tmp_path, place, monkeypatch):
    expected = outcome(resumed_cfg, run(resumed_cfg)[0])
    resumed_cfg.OUTPUT_DIR = str(tmp_path / "again")
    resumed_cfg.SOLVER.CHECKPOINT_PERIOD = 100

    def fail(*args):
        raise ValueError("a hook fails")

    class Fails(Noisy):
        def build_hooks(self):
            def fail_once(trainer):
                if trainer.iter == 3:
                    fail()

            return [*super().build_hooks(), hooks.CallbackHook(**{place: fail_once})]

    with monkeypatch.context() as patch:
        if place == "evaluation":
            patch.setattr(Noisy, "test", classmethod(fail))
        elif place == "writer":
            patch.setattr(JSONWriter, "write", fail)
        base = Fails if "step" in place else Noisy
        seed_all_rng(resumed_cfg.SEED)
        trainer = base(resumed_cfg)
        with pytest.raises(ValueError, match="a hook fails"):
            trainer.train()
    done = {"before_step": 2, "after_step": 3, "evaluation": 1, "writer": 0}[place]
    assert Path(trainer.checkpointer.get_checkpoint_file()).stem == f"model_{done:07d}"
    resumed_cfg.SOLVER.CHECKPOINT_PERIOD = 2
    resumed, _ = run(resumed_cfg, resume=True)
    assert resumed.start_iter == done + 1
    assert same(outcome(resumed_cfg, resumed), expected)


def test_hook_that_fails_before_the_first_step_leaves_no_checkpoint(resumed_cfg):
    trainer = Noisy(resumed_cfg)
    trainer.register_hooks([hooks.CallbackHook(before_step=lambda trainer: 1 / 0)])
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not trainer.checkpointer.has_checkpoint()


def test_run_without_a_seed_of_its_own_keeps_the_one_it_drew(resumed_cfg, tmp_path, monkeypatch):
    resumed_cfg.SEED = -1
    expected = outcome(resumed_cfg, run(resumed_cfg)[0])
    resumed_cfg.OUTPUT_DIR = str(tmp_path / "again")
    run(resumed_cfg, killed_at=("after", 3))
    monkeypatch.setattr("detkit.utils.comm.shared_random_seed", lambda: 99)
    assert same(outcome(resumed_cfg, run(resumed_cfg, resume=True)[0]), expected)


class Faulty(Noisy):
    """Has gradients that are not finite at iterations 1 and 4."""

    def after_backward(self):
        super().after_backward()
        if self.iter in (1, 4):
            self._trainer.model.conv.weight.grad.fill_(torch.nan)


def test_skipped_steps_are_counted_through_a_resume(resumed_cfg, tmp_path):
    resumed_cfg.SOLVER.SKIP_NONFINITE_STEPS = 2
    resumed_cfg.MODEL_EMA.ENABLED = True
    trainer = run(resumed_cfg, base=Faulty)[0]
    assert trainer.storage.history("skipped_steps").values() == [(1.0, 1), (2.0, 4)]
    assert trainer.ema.num_updates == 4
    expected = outcome(resumed_cfg, trainer)
    assert [row["iteration"] for row in expected[-1] if "skipped_steps" in row] == [1, 4]
    resumed_cfg.OUTPUT_DIR = str(tmp_path / "again")
    run(resumed_cfg, killed_at=("after", 3), base=Faulty)
    resumed = run(resumed_cfg, resume=True, base=Faulty)[0]
    assert same(outcome(resumed_cfg, resumed), expected)
    assert same(resumed.ema.state_dict(), trainer.ema.state_dict())


def test_steps_skipped_before_a_resume_count(resumed_cfg):
    resumed_cfg.SOLVER.SKIP_NONFINITE_STEPS = 1
    run(resumed_cfg, killed_at=("end", 2), base=Faulty)
    with pytest.raises(
        FloatingPointError, match=r"iteration 4, .* 1 steps were skipped before .*0000004\.json"
    ):
        run(resumed_cfg, resume=True, base=Faulty)
    assert (Path(resumed_cfg.OUTPUT_DIR) / "nonfinite_iter_0000004.json").is_file()


def test_batches_for_precise_statistics_go_on_too(resumed_cfg, tmp_path):
    resumed_cfg.TEST.PRECISE_BN.ENABLED = True
    resumed_cfg.TEST.PRECISE_BN.NUM_ITER = 2
    expected = outcome(resumed_cfg, run(resumed_cfg)[0])
    resumed_cfg.OUTPUT_DIR = str(tmp_path / "again")
    run(resumed_cfg, killed_at=("end", 2))
    assert same(outcome(resumed_cfg, run(resumed_cfg, resume=True)[0]), expected)


def test_longer_run_goes_on_from_a_finished_one(resumed_cfg, tmp_path):
    run(resumed_cfg)
    resumed_cfg.SOLVER.MAX_ITER = 8
    longer = outcome(resumed_cfg, run(resumed_cfg, resume=True)[0])
    resumed_cfg.OUTPUT_DIR = str(tmp_path / "again")
    assert same(longer, outcome(resumed_cfg, run(resumed_cfg)[0]))


def test_checkpoint_without_positions_says_so(resumed_cfg, caplog):
    trainer, _ = run(resumed_cfg)
    state = trainer.state_dict()
    del state["ranks"], state["_trainer"]["ranks"]
    DefaultTrainer(resumed_cfg).load_state_dict(state)
    assert "the checkpoint has the states of 0 processes, this run has 1" in caplog.text
    assert "the position in the training data is not known" in caplog.text


class Signalled(Noisy):
    """Gets a signal in the middle of a step."""

    number = signal.SIGTERM

    def run_step(self):
        super().run_step()
        if self.iter == 2 and self.start_iter == 0:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("number", "workers"),
    [
        (signal.SIGTERM, 0),
        (signal.SIGINT, 0),
        (signal.SIGUSR1, 0),
        pytest.param(signal.SIGTERM, 4, marks=pytest.mark.slow),
    ],
)
def test_signalled_run_finishes_its_step_saves_and_goes_on_exactly(
    resumed_cfg, tmp_path, number, workers
):
    resumed_cfg.DATALOADER.NUM_WORKERS = workers
    resumed_cfg.DATASETS.TEST = ()
    expected = outcome(resumed_cfg, run(resumed_cfg)[0])
    resumed_cfg.OUTPUT_DIR = str(tmp_path / "again")
    seed_all_rng(resumed_cfg.SEED)
    trainer = type("Run", (Signalled,), {"number": number})(resumed_cfg)
    with pytest.raises(SystemExit) as stopped:
        trainer.train()
    assert stopped.value.code == 75
    assert (tmp_path / "again" / "last_checkpoint").read_text() == "model_0000002.pth"
    assert same(outcome(resumed_cfg, run(resumed_cfg, resume=True)[0]), expected)


def test_signal_in_the_last_evaluation_stops_at_once(resumed_cfg):
    class Evaluating(Noisy):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            if (Path(cfg.OUTPUT_DIR) / "model_final.pth").exists():
                os.kill(os.getpid(), signal.SIGTERM)
            return super().test(cfg, model, evaluators)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        Evaluating(resumed_cfg).train()
    assert signal.getsignal(signal.SIGTERM) == before


def test_changed_settings_and_finished_runs_are_told(resumed_cfg, caplog):
    run(resumed_cfg)
    resumed_cfg.SOLVER.BASE_LR = 0.02
    run(resumed_cfg, resume=True)
    assert (
        "settings changed since the checkpoint was written:\nSOLVER.BASE_LR: 0.01 -> 0.02"
        in caplog.text
    )
    assert "is finished: its last checkpoint is of iteration 6 of 6" in caplog.text


def test_only_the_newest_checkpoints_are_kept(resumed_cfg):
    resumed_cfg.SOLVER.CHECKPOINT_PERIOD = 1
    resumed_cfg.CHECKPOINT_KEEP = 2
    run(resumed_cfg)
    names = sorted(path.name for path in Path(resumed_cfg.OUTPUT_DIR).glob("*.pth"))
    assert names == ["model_0000004.pth", "model_0000005.pth", "model_final.pth"]


def test_two_runs_with_one_seed_are_alike(resumed_cfg, tmp_path):
    resumed_cfg.SOLVER.MAX_ITER = 20
    resumed_cfg.DETERMINISTIC = True
    outcomes = []
    for name in ("a", "b"):
        resumed_cfg.OUTPUT_DIR = str(tmp_path / name)
        outcomes.append(outcome(resumed_cfg, run(resumed_cfg)[0]))
    assert same(*outcomes)


def test_full_disk_stops_the_run_with_the_last_checkpoint_as_it_was(resumed_cfg):
    resource = pytest.importorskip("resource")
    run(resumed_cfg, killed_at=("end", 1))
    good = Path(resumed_cfg.OUTPUT_DIR) / "model_0000001.pth"
    before = good.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"could not be written: File too large.*model_0000003\.pth"
        ):
            run(resumed_cfg, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert good.read_bytes() == before
    assert (good.parent / "last_checkpoint").read_text() == good.name
    assert {path.name for path in good.parent.iterdir() if "model" in path.name} == {good.name}
