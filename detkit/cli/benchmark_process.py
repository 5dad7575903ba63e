"""One side of a contest in a process of its own.

Two programs in one process share what belongs to it: the memory allocator with its settings,
caches, threads. In a process each, both meet what their users meet.
"""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch


class OwnProcess:
    """Called like the function that `build(*args)` gives, which lives in another process.

    Arguments and results travel by pickle, and so does `build` by its name: it must be a function
    of a module. What it gives should be small, since its way back is within the time that is
    measured. The process ends with this object.
    """

    def __init__(self, build: Callable[..., Callable[[], Any]], *args: Any) -> None:
        """Start the process, and wait until everything is built.

        Raises:
            RuntimeError: Something failed there; its traceback is the message.
        """
        # Not a fork: the threads of OpenMP do not survive one.
        context = multiprocessing.get_context("spawn")
        self._pipe, other_end = context.Pipe()
        arguments = (other_end, build, args, torch.get_num_threads())
        context.Process(target=_serve, args=arguments, daemon=True).start()
        other_end.close()
        self._receive()

    def __call__(self) -> Any:
        """Run the function once, and give its result."""
        self._pipe.send(True)
        return self._receive()

    def _receive(self) -> Any:
        try:
            result, error = self._pipe.recv()
        except EOFError:
            raise RuntimeError(
                "a process of the benchmark died: killed for its memory, perhaps"
            ) from None
        if error:
            raise RuntimeError(f"a process of the benchmark failed:\n{error}")
        return result


def _serve(
    pipe: Connection,
    build: Callable[..., Callable[[], Any]],
    args: tuple[Any, ...],
    num_threads: int,
) -> None:
    torch.set_num_threads(num_threads)
    try:
        run = build(*args)
        pipe.send((None, ""))
        while pipe.recv():
            pipe.send((run(), ""))
    except (EOFError, KeyboardInterrupt):  # the other end was closed: nothing is wanted any more
        return
    except Exception:
        pipe.send((None, traceback.format_exc()))
