"""Set up a training script: command line, logging, seeds, the record of its settings."""

import argparse
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from detkit.checkpoint.run_folder import lock_folder
from detkit.config import CfgNode, settings_without_effect, unread_settings
from detkit.engine.run_config import expand_home, prepare
from detkit.engine.writers import build_writers
from detkit.utils import comm
from detkit.utils.env import collect_env_info, resolve_device, reuse_freed_memory, seed_all_rng
from detkit.utils.errors import ConfigError
from detkit.utils.events import EventWriter
from detkit.utils.file_io import PathManager
from detkit.utils.logger import FILE_ONLY, setup_logger

logger = logging.getLogger(__name__)

# First line of the settings that a run writes: a file without it is the user's own.
_HEADER = "# All settings of a run, written by detkit; the next run in this folder replaces them."


def default_setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Set up a run: log files, `prepare`, seeds, and a record of settings and machine.

    Writes `OUTPUT_DIR/log.txt` and `OUTPUT_DIR/config.yaml`, or `config.run.yaml` where
    `config.yaml` is a file of the user's own, or is there before an evaluation. Unless it only
    evaluates, a run keeps `OUTPUT_DIR` for itself until the process ends or has trained.

    Args:
        cfg: The settings; changed as in `prepare`, and not otherwise.
        args: The parsed command line; logged, and read for `eval_only` and `config_file`.

    Raises:
        FolderInUseError: Another process trains in `OUTPUT_DIR`.
    """
    expand_home(cfg)
    rank = comm.get_rank()
    is_eval_only = getattr(args, "eval_only", False)
    if comm.is_main_process() and cfg.OUTPUT_DIR:
        PathManager.mkdirs(cfg.OUTPUT_DIR)
        if not is_eval_only and "://" not in cfg.OUTPUT_DIR:
            lock_folder(cfg.OUTPUT_DIR)  # before anything is written
    comm.synchronize()  # the folder must exist before any process opens its log in it
    for name in ("fvcore", "detkit"):
        setup_logger(cfg.OUTPUT_DIR or None, distributed_rank=rank, name=name)
    prepare(cfg)
    logger.info(
        "process %d of %d\n%s", rank, comm.get_world_size(), collect_env_info(), extra=FILE_ONLY
    )
    logger.info("command line: %s", args, extra=FILE_ONLY)
    for key, reason in unread_settings(cfg).items():
        logger.warning("%s is set, but this version does not read it: %s", key, reason)
    by_reason: dict[str, list[str]] = {}
    for key, reason in settings_without_effect(cfg).items():
        by_reason.setdefault(reason, []).append(key)
    for reason, keys in by_reason.items():
        form = (
            "%s is set, but has no effect: %s"
            if len(keys) == 1
            else ("%s are set, but have no effect: %s")
        )
        logger.warning(form, ", ".join(keys), reason)
    if comm.is_main_process() and cfg.OUTPUT_DIR:
        path = Path(cfg.OUTPUT_DIR) / "config.yaml"
        if path.exists() and (is_eval_only or _is_users_own(path, args)):
            path = path.with_name("config.run.yaml")
        path.write_text(f"{_HEADER}\n{cfg.dump()}", encoding="utf-8")
        logger.info("all settings are in %s, everything that is logged in log.txt beside it", path)
    _set_numerics(cfg, is_eval_only)


def _is_users_own(path: Path, args: argparse.Namespace) -> bool:
    """Return whether settings were written by the user, and not by an earlier run."""
    with path.open(encoding="utf-8", errors="replace") as file:
        is_of_a_run = file.readline().startswith(_HEADER)
    # What is read may have been changed by the user, and keeps its first line.
    config_file = getattr(args, "config_file", "")
    is_read = bool(config_file) and Path(config_file).resolve() == path.resolve()
    return is_read or not is_of_a_run


def refuse_settings(cfg: CfgNode, idle: Mapping[str, Any], program: str) -> None:
    """Check that a config asks for nothing that a training script of one's own does not do.

    Args:
        cfg: The settings.
        idle: For each key that the script ignores, the value that asks for nothing.
        program: The script, for the message.

    Raises:
        ConfigError: A setting has another value.
    """
    asked_for = [
        f"{key}={cfg.get_by_full_key(key)!r}"
        for key, value in idle.items()
        if cfg.get_by_full_key(key) != value
    ]
    if asked_for:
        raise ConfigError(
            f"{program} does not do what these settings ask for: {', '.join(asked_for)}. Take them"
            " back, or train with tools/train_net.py"
        )


def default_writers(output_dir: str, max_iter: int | None = None) -> list[EventWriter]:
    """Return the writers of Detectron2's default: the console, `metrics.json`, and TensorBoard.

    Args:
        output_dir: Folder of the files; made if absent.
        max_iter: Iterations of the run, for the remaining time.
    """
    return build_writers(("console", "json", "tensorboard"), output_dir, max_iter)


def _set_numerics(cfg: CfgNode, is_eval_only: bool) -> None:
    # Each process has a seed of its own: with the same one, all would augment alike.
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())
    if resolve_device(cfg.MODEL.DEVICE).type == "cpu":
        reuse_freed_memory()
    if cfg.FLOAT32_PRECISION:
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
    # cuDNN times its algorithms again for each image size, of which an evaluation has hundreds.
    torch.backends.cudnn.benchmark = (
        cfg.CUDNN_BENCHMARK and not is_eval_only and not cfg.DETERMINISTIC
    )
    if cfg.DETERMINISTIC:
        _choose_deterministic_operations(has_seed=cfg.SEED >= 0)


def _choose_deterministic_operations(*, has_seed: bool) -> None:
    if not has_seed:
        logger.warning(
            "DETERMINISTIC is set, but SEED is negative: random numbers differ from run to run"
        )
    # cuBLAS reads it at its first use; its documentation names this size for equal results.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.deterministic = True
    # With warn_only, operations without a deterministic implementation warn with their name.
    torch.use_deterministic_algorithms(True, warn_only=True)
