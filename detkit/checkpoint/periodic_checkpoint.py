"""`PeriodicCheckpointer`: saves periodic checkpoints and keeps the newest."""

import re
from pathlib import Path
from typing import Any

from detkit.checkpoint.detection_checkpoint import DetectionCheckpointer
from detkit.utils.errors import ConfigError
from detkit.utils.file_io import PathManager


class PeriodicCheckpointer:
    """Saves `<prefix>_<iteration>.pth` every `period` iterations, and `<prefix>_final.pth`."""

    def __init__(
        self,
        checkpointer: DetectionCheckpointer,
        period: int,
        max_iter: int | None = None,
        max_to_keep: int | None = None,
        file_prefix: str = "model",
    ) -> None:
        """Set when to save.

        Args:
            checkpointer: Writes the files.
            period: Iterations between checkpoints, at least 1.
            max_iter: Iterations of the run; None saves no final checkpoint.
            max_to_keep: Number of periodic checkpoints that stay on disk, besides the final one;
                None keeps all.
            file_prefix: Start of the file names.

        Raises:
            ConfigError: `period` or `max_to_keep` is below 1.
        """
        if period < 1:
            raise ConfigError(f"period (SOLVER.CHECKPOINT_PERIOD) must be at least 1, got {period}")
        if max_to_keep is not None and max_to_keep < 1:
            raise ConfigError(
                f"max_to_keep (CHECKPOINT_KEEP) must be at least 1 or None, got {max_to_keep}"
            )
        self.checkpointer = checkpointer
        self.period = period
        self.max_iter = max_iter
        self.max_to_keep = max_to_keep
        self.file_prefix = file_prefix

    def step(self, iteration: int, **extra: Any) -> None:
        """Save if a checkpoint is due.

        Args:
            iteration: Number of the iteration that has ended, from 0.
            **extra: Further entries of the file.
        """
        extra = {"iteration": iteration, **extra}
        if (iteration + 1) % self.period == 0:
            self.checkpointer.save(f"{self.file_prefix}_{iteration:07d}", **extra)
            self._delete_older_than(iteration)
        if self.max_iter is not None and iteration >= self.max_iter - 1:
            self.checkpointer.save(f"{self.file_prefix}_final", **extra)

    def save(self, name: str, **extra: Any) -> None:
        """Save now, under the given name."""
        self.checkpointer.save(name, **extra)

    def _delete_older_than(self, iteration: int) -> None:
        """Delete all but the newest `max_to_keep` files up to this iteration."""
        # The folder is listed, so that a resumed run counts the files from before. Files of later
        # iterations belong to another run.
        if self.max_to_keep is None or not self.checkpointer.save_to_disk:
            return
        pattern = re.compile(rf"{re.escape(self.file_prefix)}_(\d{{7,}})\.pth")
        numbered = []
        for path in self.checkpointer.get_all_checkpoint_files():
            match = pattern.fullmatch(Path(path).name)
            if match and int(match[1]) <= iteration:
                numbered.append((int(match[1]), path))
        for _, path in sorted(numbered)[: -self.max_to_keep]:
            PathManager.rm(path)
