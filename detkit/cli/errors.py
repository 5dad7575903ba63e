"""What a user sees when something goes wrong: one message for their mistakes, a traceback for ours.

A `UserError` (`detkit.utils.errors`) carries a message that says everything, and so does an error
of the operating system about a named file. Every other exception keeps its traceback, because there
the place is the information.
"""

import errno
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from detkit.config.cfg_node import strict_values
from detkit.utils.errors import UserError
from detkit.utils.logger import error_head
from detkit.utils.text import printable

# torch's data loader raises an error of a worker process again, as the same type with one text: the
# name of the worker, its traceback, and the message at the end.
_WORKER = re.compile(r"Caught \w+ in DataLoader worker process")
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
_MAX_MESSAGE = 4000  # characters: a name or value in it may be of any length
_INTERRUPTED = 128 + 2  # what a shell reports for a process that SIGINT ended


def run_command(function: Callable[..., Any], *args: Any) -> int:
    """Call `function` and return an exit status: 0, 2 after a user's mistake, 130 after Ctrl-C.

    The environment variable DETKIT_TRACEBACK=1 lets every error through with its traceback.

    Args:
        function: Its result is the exit status when it is a number, and is not used otherwise.
        *args: Passed on.
    """
    try:
        with strict_values():
            status = function(*args)
    except KeyboardInterrupt:
        print(
            "\ninterrupted; a command that has --resume continues from what it has written",
            file=sys.stderr,
        )
        return _INTERRUPTED
    except (UserError, OSError) as error:
        if os.environ.get("DETKIT_TRACEBACK") == "1" or not is_written_for_users(error):
            raise
        message = message_of(error)
        if len(message) > _MAX_MESSAGE:
            message = f"{message[: _MAX_MESSAGE // 2]} [...] {message[-_MAX_MESSAGE // 2 :]}"
        if not message.isascii() and sys.getfilesystemencoding() != "utf-8":
            message += "\nnames that are not ASCII are not found in this locale: set PYTHONUTF8=1"
        # What begins a line of its own is indented: it may be within a name.
        message = printable(message, keep="\n\t").replace("\n", "\n  ")
        print(error_head(sys.stderr), message, file=sys.stderr)
        return 2
    return status if isinstance(status, int) else 0


def is_written_for_users(error: Exception) -> bool:
    """Return whether the message of an error is all that a user needs."""
    if isinstance(error, UserError):
        return True
    # An OSError of a worker has lost its file name as an attribute, but not in its text. One of
    # `write` never has a name, on a full disk for example.
    return isinstance(error, OSError) and (
        error.filename is not None
        or error.errno in _DISK_IS_FULL
        or _WORKER.match(str(error)) is not None
    )


def message_of(error: Exception) -> str:
    """Return the text of an error without what Python, the system or a data loader adds to it."""
    if isinstance(error, FileExistsError) and error.filename is not None:
        return f"{error.filename} is a file, and a folder is needed there"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in _DISK_IS_FULL:
        return f"a result could not be written: {error.strerror}"
    if _WORKER.match(str(error)):
        kind = rf"^(?:[\w.]+\.)?{type(error).__name__}: "
        return re.split(kind, str(error), flags=re.MULTILINE)[-1].strip()
    if isinstance(error, KeyError) and error.args:  # its text has quotes around it
        return str(error.args[0])
    return str(error)
