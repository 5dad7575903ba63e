"""What a user sees when something goes wrong: one message for their mistakes, a traceback for ours.

Which is which is not told by the type of the exception: a KeyError may be a misspelt name of the
user's or a bug in the model, and users raise ValueError in their own modules. It is told by who
raised it. Our convention is that a `raise` in detkit carries a message written for the reader (what
was required, what came, where), so such an error is shown as its message. Everything that Python,
torch or the user's own code raised keeps its traceback, because there the place is the information.
Two more cases need none: errors of the operating system about a file, whose text names it, and
Ctrl-C.
"""

import dis
import os
import re
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from detkit.utils.errors import UserError

# How torch's data loader begins the text of what a worker process raised: its traceback there, then
# its message.
_WORKER = re.compile(r"Caught \w+ in DataLoader worker process")
_INTERRUPTED = 128 + 2  # what a shell reports for a process that SIGINT ended


def run_command(function: Callable[..., Any], *args: Any) -> int:
    """Call `function` and give an exit status: 0, 2 for a mistake of the user's, 130 after Ctrl-C.

    The environment variable DETKIT_TRACEBACK=1 lets every error through with its traceback.

    Args:
        function: Its result counts as the exit status when it is a number, and is not used
            otherwise.
        *args: Passed on.
    """
    try:
        status = function(*args)
    except KeyboardInterrupt:
        print(
            "\ninterrupted; checkpoints written so far are whole, --resume continues from the"
            " last one",
            file=sys.stderr,
        )
        return _INTERRUPTED
    except Exception as error:
        if os.environ.get("DETKIT_TRACEBACK") == "1" or not is_written_for_users(error):
            raise
        print(
            f"error: {message_of(error)}\n(DETKIT_TRACEBACK=1 shows where it was raised)",
            file=sys.stderr,
        )
        return 2
    return status if isinstance(status, int) else 0


def is_written_for_users(error: Exception) -> bool:
    """Whether an error's message says it all: detkit raised it deliberately, or the system about a
    named file.
    """
    if isinstance(error, UserError):
        return True
    if isinstance(error, OSError) and error.filename is not None:
        return True
    if _WORKER.match(str(error)):
        # Rebuilt by torch in this process, so nothing tells how it was raised there; what can go
        # wrong with a sample comes as an error of detkit's own or as a file that is not there.
        return isinstance(error, OSError) or _is_of_detkit(type(error).__module__)
    return not isinstance(error, AssertionError) and _is_raised_by_detkit(error.__traceback__)


def message_of(error: Exception) -> str:
    """The text of an error, without the quotes that KeyError and the number that the system puts
    around it.
    """
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if _WORKER.match(str(error)):
        return re.split(rf"^(?:[\w.]+\.)?{type(error).__name__}: ", str(error), flags=re.MULTILINE)[
            -1
        ].strip()
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    return str(error)


def _is_raised_by_detkit(traceback: TracebackType | None) -> bool:
    """Whether the innermost frame is detkit's and stopped at a `raise`, not at an operation that
    failed there.
    """
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    frame = traceback.tb_frame
    return (
        _is_of_detkit(str(frame.f_globals.get("__name__")))
        and frame.f_code.co_code[traceback.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    )


def _is_of_detkit(module: str) -> bool:
    return module.partition(".")[0] == "detkit"
