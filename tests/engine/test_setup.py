import argparse
import logging
import os
import signal
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from detkit.checkpoint.run_folder import FolderInUseError, lock_folder
from detkit.config import get_cfg
from detkit.data import DatasetCatalog
from detkit.engine import default_argument_parser, default_setup, default_writers
from detkit.engine.setup import refuse_settings
from detkit.utils.errors import ConfigError
from detkit.utils.events import CommonMetricPrinter, EventStorage, JSONWriter, TensorboardXWriter
from tests.processes import end_of, fork

ARGS = argparse.Namespace(eval_only=False)


def parse(*words):
    return default_argument_parser().parse_args(words)


def test_defaults_of_the_command_line():
    args = parse()
    assert (args.config_file, args.resume, args.eval_only, args.allow_partial) == (
        "",
        False,
        False,
        False,
    )
    assert (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url) == (1, 1, 0, "auto")
    assert args.opts == []


def test_settings_end_the_command_line():
    args = parse(
        "--config-file",
        "a.yaml",
        "--num-gpus",
        "2",
        "--resume",
        "SOLVER.BASE_LR",
        "-0.1",
        "SEED",
        "-1",
    )
    assert (args.config_file, args.num_gpus, args.resume) == ("a.yaml", 2, True)
    assert args.opts == ["SOLVER.BASE_LR", "-0.1", "SEED", "-1"]


def test_option_among_the_settings_is_an_error(capsys):
    with pytest.raises(SystemExit):
        parse("SEED", "1", "--eval-only")
    assert "--eval-only must come before the settings KEY VALUE" in capsys.readouterr().err


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "torchrun" in capsys.readouterr().out


class TestSetup:
    def test_writes_log_and_settings(self, tiny_cfg):
        default_setup(tiny_cfg, ARGS)
        output = Path(tiny_cfg.OUTPUT_DIR)
        assert "torch" in (output / "log.txt").read_text()
        again = get_cfg()
        again.merge_from_file(str(output / "config.yaml"))
        assert again == tiny_cfg

    def test_settings_replace_those_of_an_earlier_run_and_no_file_of_the_users(self, tiny_cfg):
        own = Path(tiny_cfg.OUTPUT_DIR) / "config.yaml"
        default_setup(tiny_cfg, ARGS)
        tiny_cfg.SOLVER.MAX_ITER = 7
        default_setup(tiny_cfg, ARGS)
        assert "MAX_ITER: 7" in own.read_text()
        own.write_text("# a week of work\n")
        default_setup(tiny_cfg, ARGS)
        assert own.read_text() == "# a week of work\n"
        assert "MAX_ITER: 7" in own.with_name("config.run.yaml").read_text()

    def test_settings_that_a_run_reads_are_not_replaced(self, tiny_cfg):
        default_setup(tiny_cfg, ARGS)
        path = Path(tiny_cfg.OUTPUT_DIR) / "config.yaml"
        path.write_text(path.read_text() + "# a remark\n")
        default_setup(tiny_cfg, argparse.Namespace(config_file=str(path)))
        assert path.read_text().endswith("# a remark\n")

    def test_evaluation_leaves_the_settings_of_the_training(self, tiny_cfg):
        default_setup(tiny_cfg, ARGS)
        path = Path(tiny_cfg.OUTPUT_DIR) / "config.yaml"
        before = path.read_text()
        tiny_cfg.MODEL.WEIGHTS = "model_final.pth"
        default_setup(tiny_cfg, argparse.Namespace(eval_only=True))
        assert path.read_text() == before
        assert "model_final.pth" in path.with_name("config.run.yaml").read_text()

    @pytest.mark.parametrize("is_frozen", [False, True])
    def test_home_folder_is_expanded(self, tiny_cfg, tmp_path, monkeypatch, is_frozen):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        tiny_cfg.OUTPUT_DIR = "~/run"
        if is_frozen:
            tiny_cfg.freeze()
        default_setup(tiny_cfg, ARGS)
        assert str(tmp_path / "home" / "run") == tiny_cfg.OUTPUT_DIR
        assert tiny_cfg.is_frozen() is is_frozen
        assert (tmp_path / "home" / "run" / "log.txt").exists()
        assert not (tmp_path / "~").exists()

    def test_home_folder_of_nobody_is_an_error(self, tiny_cfg):
        tiny_cfg.OUTPUT_DIR = "~nobody-of-that-name/run"
        with pytest.raises(
            ConfigError, match=r"home folder of a user .* \./~nobody-of-that-name/run"
        ):
            default_setup(tiny_cfg, ARGS)

    @pytest.mark.parametrize("eval_only", [False, True])
    def test_training_in_the_folder_of_a_running_one_is_refused_before_it_writes(
        self, tiny_cfg, eval_only
    ):
        ready, wait = os.pipe()

        def first():
            lock_folder(tiny_cfg.OUTPUT_DIR)
            os.write(wait, b"1")
            signal.pause()

        child = fork(first)
        os.read(ready, 1)
        try:
            args = argparse.Namespace(eval_only=eval_only)
            with (
                nullcontext() if eval_only else pytest.raises(FolderInUseError, match="OUTPUT_DIR")
            ):
                default_setup(tiny_cfg, args)
            assert (Path(tiny_cfg.OUTPUT_DIR) / "config.yaml").exists() is eval_only
        finally:
            os.kill(child, signal.SIGKILL)
            end_of(child)

    def test_registers_declared_data_sets(self, tiny_cfg):
        default_setup(tiny_cfg, ARGS)
        assert len(DatasetCatalog.get("tiny_train")) == 6

    def test_imports_the_users_modules(self, tiny_cfg, tmp_path, monkeypatch):
        (tmp_path / "my_module_for_setup.py").write_text(
            "import builtins; builtins.my_module_was_imported = True"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.path", __import__("sys").path.copy())
        monkeypatch.setattr("builtins.my_module_was_imported", False, raising=False)
        tiny_cfg.IMPORTS = ["my_module_for_setup"]
        default_setup(tiny_cfg, ARGS)
        assert __import__("builtins").my_module_was_imported

    @pytest.mark.parametrize("seed", [0, 3])
    def test_seed_repeats_the_random_numbers(self, tiny_cfg, seed):
        tiny_cfg.SEED = seed

        def draw():
            default_setup(tiny_cfg, ARGS)
            return torch.rand(1).item(), np.random.rand()

        assert draw() == draw()

    def test_negative_seed_is_drawn_and_logged(self, tiny_cfg):
        tiny_cfg.SEED = -1
        default_setup(tiny_cfg, ARGS)
        assert "random seed of this run: " in (Path(tiny_cfg.OUTPUT_DIR) / "log.txt").read_text()

    def test_setting_that_nothing_reads_is_named(self, tiny_cfg):
        tiny_cfg.GLOBAL.HACK = 2.0
        default_setup(tiny_cfg, ARGS)
        assert (
            "GLOBAL.HACK is set, but this version does not"
            in (Path(tiny_cfg.OUTPUT_DIR) / "log.txt").read_text()
        )

    def test_setting_without_effect_is_named(self, tiny_cfg):
        tiny_cfg.SOLVER.AMP.DTYPE = "bf16"
        default_setup(tiny_cfg, ARGS)
        log = (Path(tiny_cfg.OUTPUT_DIR) / "log.txt").read_text()
        assert "SOLVER.AMP.DTYPE is set, but has no effect: SOLVER.AMP.ENABLED is False" in log

    @pytest.mark.parametrize(("eval_only", "want"), [(False, True), (True, False)])
    def test_cudnn_times_its_algorithms_in_training_only(
        self, tiny_cfg, monkeypatch, eval_only, want
    ):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        tiny_cfg.CUDNN_BENCHMARK = True
        default_setup(tiny_cfg, argparse.Namespace(eval_only=eval_only))
        assert torch.backends.cudnn.benchmark is want

    @pytest.mark.parametrize("seed", [3, -1])
    def test_deterministic_operations_are_chosen(self, tiny_cfg, monkeypatch, seed):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
        tiny_cfg.DETERMINISTIC, tiny_cfg.SEED = True, seed
        try:
            default_setup(tiny_cfg, ARGS)
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled()
            assert torch.backends.cudnn.deterministic
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        finally:
            torch.use_deterministic_algorithms(False)
        log = (Path(tiny_cfg.OUTPUT_DIR) / "log.txt").read_text()
        assert ("DETERMINISTIC is set, but SEED is negative" in log) == (seed < 0)

    def test_matmul_precision_is_set(self, tiny_cfg):
        before = torch.get_float32_matmul_precision()
        tiny_cfg.FLOAT32_PRECISION = "high"
        try:
            default_setup(tiny_cfg, ARGS)
            assert torch.get_float32_matmul_precision() == "high"
        finally:
            torch.set_float32_matmul_precision(before)

    def test_calling_it_twice_logs_once(self, tiny_cfg):
        default_setup(tiny_cfg, ARGS)
        default_setup(tiny_cfg, ARGS)
        logging.getLogger("detkit").info("only once")
        assert (Path(tiny_cfg.OUTPUT_DIR) / "log.txt").read_text().count("only once") == 1


def test_default_writers(tmp_path):
    writers = default_writers(str(tmp_path / "new"), 10)
    assert [type(writer) for writer in writers] == [
        CommonMetricPrinter,
        JSONWriter,
        TensorboardXWriter,
    ]
    with EventStorage() as storage:
        storage.put_scalar("loss", 1.0)
        for writer in writers:
            writer.write()
            writer.close()
    assert (tmp_path / "new" / "metrics.json").read_text() == '{"iteration": 0, "loss": 1.0}\n'
    assert list((tmp_path / "new").glob("events*"))


def test_settings_that_a_script_does_not_follow_are_refused():
    cfg = get_cfg()
    idle = {"SOLVER.ACCUM_STEPS": 1, "TEST.EXPECTED_RESULTS": [], "MODEL_EMA.ENABLED": False}
    refuse_settings(cfg, idle, "mine.py")
    cfg.SOLVER.ACCUM_STEPS, cfg.MODEL_EMA.ENABLED = 2, True
    with pytest.raises(
        ValueError,
        match=r"mine\.py does not do .* ask for: SOLVER\.ACCUM_STEPS=2, MODEL_EMA\.ENABLED=True\. Take",
    ):
        refuse_settings(cfg, idle, "mine.py")
