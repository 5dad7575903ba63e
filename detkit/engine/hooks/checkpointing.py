"""Hooks that save the run: every so often, and when it is asked to stop."""

import contextlib
import logging
import os
from typing import Any

from detkit.checkpoint import DetectionCheckpointer
from detkit.checkpoint import PeriodicCheckpointer as _PeriodicCheckpointer
from detkit.engine.train_loop import HookBase
from detkit.utils import comm
from detkit.utils.signals import STOPPED, asked_to_stop, name_of

logger = logging.getLogger(__name__)


class PeriodicCheckpointer(_PeriodicCheckpointer, HookBase):
    """`detkit.checkpoint.PeriodicCheckpointer` as a hook: every `period` iterations and at the end.

    To be registered in every process, which all contribute states; the main process writes.
    """

    def before_train(self) -> None:
        self.max_iter = self.trainer.max_iter

    def after_step(self) -> None:
        self.step(self.trainer.iter)

    def state_dict(self) -> dict[str, Any]:
        return {}


class StopOnSignal(HookBase):
    """On SIGTERM, SIGINT (Ctrl-C) or SIGUSR1: finish the iteration, save, exit with `STOPPED`.

    A second Ctrl-C ends the process at once. Once training is finished and saved, and only
    evaluation is left, the first signal does. It runs behind all other hooks, which have seen the
    iteration then. To be registered in every process: they agree on the iteration after which they
    stop.
    """

    runs_last = True

    def __init__(self, checkpointer: DetectionCheckpointer, file_prefix: str = "model") -> None:
        """Keep what saves, and the start of the file's name, as for periodic checkpoints."""
        self._checkpointer = checkpointer
        self._file_prefix = file_prefix
        self._received = 0
        self._handlers = contextlib.ExitStack()

    def before_train(self) -> None:
        self._received = 0
        self._handlers.enter_context(asked_to_stop(self._receive))

    def after_step(self) -> None:
        received = comm.all_reduce_max_int(self._received)
        if not received:
            return
        iteration = self.trainer.iter
        self._checkpointer.save(f"{self._file_prefix}_{iteration:07d}", iteration=iteration)
        # The first process to end takes the others with it, and the main one has a file to finish.
        comm.synchronize()
        logger.info(
            "stopped by %s after iteration %d, which is saved; --resume goes on. Exit status %d",
            name_of(received),
            iteration,
            STOPPED,
        )
        raise SystemExit(STOPPED)

    def after_train(self) -> None:
        self._handlers.close()

    def _receive(self, number: int) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            # `after_train` of this hook, which would do it, is what the exit leaves out.
            self._handlers.close()
            raise SystemExit(STOPPED)
        self._received = number
        message = "stopping after this iteration; Ctrl-C twice stops at once"
        # Not through a logger or a stream, which the signal may have interrupted.
        os.write(2, f"\n{name_of(number)}: {message}\n".encode())
