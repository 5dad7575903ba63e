"""`TorchProfiler`: a trace of some iterations."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from detkit.engine.train_loop import HookBase, TrainerBase

logger = logging.getLogger(__name__)


class TorchProfiler(HookBase):
    """Writes a Chrome trace (`chrome://tracing`, Perfetto) for each iteration that a function chooses.

    Example:
        >>> trainer.register_hooks([TorchProfiler(lambda trainer: 10 <= trainer.iter < 13, cfg.OUTPUT_DIR)])
    """

    def __init__(self, enable_predicate: Callable[[TrainerBase], bool], output_dir: str) -> None:
        """Remember what to trace.

        Args:
            enable_predicate: Whether to trace the iteration that is about to run.
            output_dir: Folder of the traces.
        """
        self._enable_predicate = enable_predicate
        self._output_dir = Path(output_dir)
        self._profiler: Any = None

    def before_step(self) -> None:
        if not self._enable_predicate(self.trainer):
            return
        activities = [
            ProfilerActivity.CPU,
            *([ProfilerActivity.CUDA] if torch.cuda.is_available() else []),
        ]
        self._profiler = profile(activities=activities, record_shapes=True)
        self._profiler.__enter__()

    def after_step(self) -> None:
        if self._profiler is None:
            return
        self._profiler.__exit__(None, None, None)
        self._output_dir.mkdir(parents=True, exist_ok=True)
        path = self._output_dir / f"trace_{self.trainer.iter:07d}.json"
        self._profiler.export_chrome_trace(str(path))
        self._profiler = None
        logger.info("trace of iteration %d written to %s", self.trainer.iter, path)

    def after_train(self) -> None:
        if self._profiler is not None:  # the traced step raised
            self._profiler.__exit__(None, None, None)
            self._profiler = None
