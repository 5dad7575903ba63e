"""Hooks that measure time: of each iteration, and of each operation in some of them."""

import datetime
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from detkit.engine.train_loop import HookBase, TrainerBase

logger = logging.getLogger(__name__)


class IterationTimer(HookBase):
    """Stores the seconds of each iteration as `time`, and logs the speed of the run at its end.

    `time` covers the step with its data, and not what hooks do after it. On a GPU it is right on
    average only, since a step returns before the device has done all of its work.
    """

    def __init__(self, warmup_iter: int = 3) -> None:
        """Set how many iterations to leave out of the speed.

        Args:
            warmup_iter: The first iterations, which start workers and fill caches.
        """
        self._warmup_iter = warmup_iter
        self._train_start = self._step_start = time.perf_counter()
        self._durations: list[float] = []

    def before_train(self) -> None:
        self._train_start = time.perf_counter()
        self._durations = []

    def before_step(self) -> None:
        self._step_start = time.perf_counter()

    def after_step(self) -> None:
        seconds = time.perf_counter() - self._step_start
        if self.trainer.iter - self.trainer.start_iter >= self._warmup_iter:
            self.trainer.storage.put_scalar("time", seconds)
            self._durations.append(seconds)

    def after_train(self) -> None:
        if not self._durations:
            return
        total, count = sum(self._durations), len(self._durations)
        whole = time.perf_counter() - self._train_start
        logger.info(
            "trained %d iterations in %s, %.4f s each; %s went into everything else",
            count,
            datetime.timedelta(seconds=int(total)),
            total / count,
            datetime.timedelta(seconds=int(whole - total)),
        )


class TorchMemoryStats(HookBase):
    """Logs how much of a GPU's memory is used, every so many iterations, for a start."""

    def __init__(self, period: int = 20, max_runs: int = 10) -> None:
        """Set when to log.

        Args:
            period: Iterations between two lines.
            max_runs: Largest number of lines.
        """
        self._period = period
        self._max_runs = max_runs
        self._runs = 0

    def after_step(self) -> None:
        if self._runs >= self._max_runs or not torch.cuda.is_available():
            return
        next_iter = self.trainer.iter + 1
        if next_iter % self._period and next_iter != self.trainer.max_iter:
            return
        amounts = (
            ("allocated", torch.cuda.memory_allocated()),
            ("largest allocated", torch.cuda.max_memory_allocated()),
            ("reserved", torch.cuda.memory_reserved()),
            ("largest reserved", torch.cuda.max_memory_reserved()),
        )
        text = ", ".join(f"{name} {amount / 2**20:.0f} MB" for name, amount in amounts)
        logger.info("memory of the GPU at iteration %d: %s", self.trainer.iter, text)
        torch.cuda.reset_peak_memory_stats()
        self._runs += 1


class TorchProfiler(HookBase):
    """Writes a Chrome trace (`chrome://tracing`, Perfetto) for each chosen iteration.

    Example:
        >>> hook = TorchProfiler(lambda trainer: 10 <= trainer.iter < 13, "output/traces")
    """

    def __init__(
        self,
        enable_predicate: Callable[[TrainerBase], bool],
        output_dir: str,
        *,
        activities: Sequence[ProfilerActivity] | None = None,
        save_tensorboard: bool = True,
    ) -> None:
        """Set what to trace.

        Args:
            enable_predicate: Whether to trace the iteration that is about to run.
            output_dir: Folder of the traces.
            activities: What is measured; None for the CPU, and the GPU if there is one.
            save_tensorboard: Detectron2's; TensorBoard has lost its page for traces.
        """
        self._activities = activities
        self._enable_predicate = enable_predicate
        self._output_dir = Path(output_dir)
        self._profiler: Any = None

    def before_step(self) -> None:
        if not self._enable_predicate(self.trainer):
            return
        activities = list(self._activities or [ProfilerActivity.CPU])
        if self._activities is None and torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
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


class AutogradProfiler(TorchProfiler):
    """A `TorchProfiler` under Detectron2's older name."""

    def __init__(
        self,
        enable_predicate: Callable[[TrainerBase], bool],
        output_dir: str,
        *,
        use_cuda: bool = True,
    ) -> None:
        """Set what to trace; `use_cuda` says whether a GPU is measured too."""
        activities = None if use_cuda else [ProfilerActivity.CPU]
        super().__init__(enable_predicate, output_dir, activities=activities)
