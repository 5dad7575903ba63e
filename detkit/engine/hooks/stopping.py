"""`StopOnSignal`: a run that is asked to stop finishes its step and saves first."""

import contextlib
import logging
import os

from detkit.checkpoint import DetectionCheckpointer
from detkit.engine.train_loop import HookBase
from detkit.utils import comm
from detkit.utils.signals import STOPPED, asked_to_stop, name_of

logger = logging.getLogger(__name__)


class StopOnSignal(HookBase):
    """On SIGTERM, SIGINT (Ctrl-C) or SIGUSR1: finish the iteration with its hooks, save, exit with status `STOPPED`.

    A second Ctrl-C ends the process at once. Once training is finished and saved, and only
    evaluation is left, the first signal does. To be registered last, and in every process: they
    agree on the iteration after which they stop.
    """

    def __init__(self, checkpointer: DetectionCheckpointer, file_prefix: str = "model") -> None:
        """Take what saves, and the start of the file's name, which is that of periodic checkpoints."""
        self._checkpointer = checkpointer
        self._file_prefix = file_prefix
        self._received = 0
        self._handlers = contextlib.ExitStack()

    def before_train(self) -> None:
        self._received = 0
        self._handlers.enter_context(asked_to_stop(self._receive))

    def after_step(self) -> None:
        received = comm.largest(self._received)
        if not received:
            return
        iteration = self.trainer.iter
        self._checkpointer.save(f"{self._file_prefix}_{iteration:07d}", iteration=iteration)
        comm.synchronize()  # whoever ends first has the others ended, and the main process is to finish the file
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
        is_finished = self.trainer.iter >= self.trainer.max_iter
        if is_finished:
            self._handlers.close()  # after_train, which would do it, is what this leaves
            raise SystemExit(STOPPED)
        self._received = number
        # Not through a logger or a stream, which the signal may have interrupted.
        os.write(
            2,
            f"\n{name_of(number)}: stopping after this iteration; Ctrl-C twice stops at once\n".encode(),
        )
