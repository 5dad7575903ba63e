"""Logging to the console and to one file per process.

The file gets everything, with the names of the loggers. The console is for reading: a record logged
with `extra=FILE_ONLY` is left out there, one with `extra={"console": text}` is shown as that text
alone, and one with `extra=ONCE` is shown the first time only.
"""

import copy
import logging
import logging.handlers
import os
import shutil
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from tabulate import tabulate
from tqdm import tqdm

from detkit.utils.errors import UserError
from detkit.utils.text import printable

_COLORS = {
    logging.DEBUG: "36",
    logging.INFO: "32",
    logging.WARNING: "33",
    logging.ERROR: "31",
    logging.CRITICAL: "1;31",
}
_DATE = "%m/%d %H:%M:%S"
FILE_ONLY = {"console": ""}
ONCE = {"once": True}
# Columns of a terminal to use: longer lines of text are hard to read.
_MAX_COLUMNS = 120
# Classes of a table on the console; longer ones are for the file alone.
MAX_CLASSES = 30

_seen: Counter[tuple[Any, ...]] = Counter()
_last_logged: dict[tuple[str, str], float] = {}


def use_color(stream: TextIO) -> bool:
    """Return whether to write colours: to a terminal that has them, unless $NO_COLOR is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def error_head(stream: TextIO) -> str:
    """Return the word before the message of a user's mistake, red where there are colours."""
    return "\x1b[31merror:\x1b[0m" if use_color(stream) else "error:"


def shown_if_short(num_classes: int) -> dict[str, str] | None:
    """Return the `extra` with which to log a table that has an entry per class."""
    return None if num_classes <= MAX_CLASSES else FILE_ONLY


class _Formatter(logging.Formatter):
    """Writes out control characters: names of files and classes may hold any."""

    def format(self, record: logging.LogRecord) -> str:
        # Lines that the message itself begins, as for a table, stay; one that begins within a name
        # could pass for a line of ours.
        kept = "\n\t" if "\n" in str(record.msg) else "\t"
        record = copy.copy(record)
        record.msg, record.args = printable(record.getMessage(), keep=kept), None
        return printable(super().format(record), keep="\n\t")  # with the traceback


class _ConsoleFormatter(_Formatter):
    """Formats as `[12:30:59] text`, with the level of warnings and errors.

    On a terminal, the time has the colour of the level, and lines are broken between words.
    """

    def __init__(self, *, is_terminal: bool, color: bool) -> None:
        super().__init__("%(message)s")
        self._is_terminal = is_terminal
        self._color = color

    def format(self, record: logging.LogRecord) -> str:
        head = f"[{self.formatTime(record, '%H:%M:%S')}]"
        if record.levelno >= logging.WARNING:
            head += f" {record.levelname}:"
        record = copy.copy(record)
        if text := getattr(record, "console", ""):
            record.msg, record.args = text, None
            record.exc_info = record.exc_text = None
        # A user's mistake, or an error of the system about a file such as a full disk, is told in
        # words. The log file has the traceback of every error.
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, UserError) or getattr(error, "filename", None) is not None:
            record.exc_info = record.exc_text = None
        text = f"{head} {super().format(record)}"
        if self._is_terminal:
            text = "\n".join(map(_wrapped, text.split("\n")))
        if self._color:
            colored = f"\x1b[{_COLORS.get(record.levelno, '0')}m{head}\x1b[0m"
            text = text.replace(head, colored, 1)
        return text


def _wrapped(line: str) -> str:
    width = min(shutil.get_terminal_size().columns, _MAX_COLUMNS)
    if len(line) <= width or line.startswith(("|", " ")):  # a table, a traceback
        return line
    return textwrap.fill(
        line, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


class _ConsoleHandler(logging.StreamHandler):
    """Prints what is meant for the console, above a progress bar."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "console", None) == "":
            return
        if getattr(record, "once", False):
            if record.getMessage() in self._shown:
                return
            self._shown.add(record.getMessage())
        try:
            tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except Exception:
            self.handleError(record)


class _FileHandler(logging.handlers.WatchedFileHandler):
    """Starts its file again if somebody has deleted it, or its whole folder."""

    _is_broken = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # of looking for the file, on a network share for example
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Tell once, in a line, that the file cannot be written, as on a full disk."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._is_broken:
            self._is_broken = True
            reason = printable(f"{self.baseFilename} cannot be written: {error.strerror or error}")
            print(error_head(sys.stderr), reason, file=sys.stderr)

    def _open(self) -> TextIO:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()


def setup_logger(
    output: str | None = None,
    distributed_rank: int = 0,
    *,
    color: bool = True,
    name: str = "detkit",
    abbrev_name: str | None = None,
) -> logging.Logger:
    """Configure the logger `name` and return it; a second call replaces the handlers.

    Args:
        output: A folder for `log.txt`, or a file that ends with `.txt` or `.log`; None logs to the
            console only. Ranks above 0 append `.rankN` to the name, and log to the file only.
        distributed_rank: Rank of this process.
        color: Whether to use colours where `use_color` says so.
        name: Name of the logger; those below it inherit the configuration.
        abbrev_name: Detectron2's; the console shows no names.
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    plain = _Formatter("[%(asctime)s %(name)s] %(levelname)s: %(message)s", datefmt=_DATE)
    if distributed_rank == 0:
        console = _ConsoleHandler(sys.stdout)
        color = color and use_color(sys.stdout)
        console.setFormatter(_ConsoleFormatter(is_terminal=sys.stdout.isatty(), color=color))
        logger.addHandler(console)
    if output is not None:
        path = Path(output)
        if path.suffix not in (".txt", ".log"):
            path = path / "log.txt"
        if distributed_rank > 0:
            path = path.with_name(f"{path.name}.rank{distributed_rank}")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _FileHandler(path, encoding="utf-8")
        file.setFormatter(plain)
        logger.addHandler(file)
    return logger


def log_first_n(
    level: int, message: str, n: int = 1, *, key: Any = None, name: str = "detkit"
) -> None:
    """Log a message the first n times only.

    Args:
        level: See `logging`, for example `logging.WARNING`.
        message: The text.
        n: Number of times, counted over the whole process.
        key: Identifies the message; None for its text.
        name: The logger to use.
    """
    counted = (name, message if key is None else key)
    _seen[counted] += 1
    if _seen[counted] <= n:
        logging.getLogger(name).log(level, message)


def log_every_n(level: int, message: str, n: int = 1, *, name: str = "detkit") -> None:
    """Log a message the first time, and each n-th time after; arguments as in `log_first_n`."""
    counted = (name, message, "every_n")
    _seen[counted] += 1
    if n == 1 or _seen[counted] % n == 1:
        logging.getLogger(name).log(level, message)


def log_every_n_seconds(level: int, message: str, n: float = 1, *, name: str = "detkit") -> None:
    """Log a message unless it was logged less than n seconds ago; see `log_first_n`."""
    counted, now = (name, message), time.monotonic()
    last = _last_logged.get(counted)
    if last is None or now - last >= n:
        logging.getLogger(name).log(level, message)
        _last_logged[counted] = now


def create_small_table(small_dict: Mapping[str, Any]) -> str:
    """Return a few numbers as a table of two rows: names and values."""
    return tabulate(
        [tuple(small_dict.values())],
        headers=list(small_dict),
        tablefmt="pipe",
        floatfmt=".3f",
        stralign="center",
        numalign="center",
    )


def log_api_usage(identifier: str) -> None:
    """Note that a part of the API is used; nothing is sent anywhere."""
    logging.getLogger("detkit").debug("uses %s", identifier)


def progress_bar(
    iterable: Iterable[Any] | None = None, *, disable: bool = False, **settings: Any
) -> Any:
    """Return tqdm's progress bar, which shows nothing where the output is not a terminal.

    Args:
        iterable: What to go through; None for a bar that is updated by hand.
        disable: Whether to show nothing on a terminal either.
        **settings: Further arguments of `tqdm`.
    """
    disable = disable or not sys.stdout.isatty()
    return tqdm(iterable, file=sys.stdout, disable=disable, dynamic_ncols=True, **settings)
