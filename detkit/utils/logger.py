"""Logging to the console and to one file per process."""

import copy
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from detkit.utils.text import printable

_COLORS = {
    logging.DEBUG: "36",
    logging.INFO: "32",
    logging.WARNING: "33",
    logging.ERROR: "31",
    logging.CRITICAL: "1;31",
}
_DATE = "%m/%d %H:%M:%S"
_seen: Counter[tuple[Any, ...]] = Counter()


class _Formatter(logging.Formatter):
    """Writes out control characters: names of files and classes may hold any."""

    def format(self, record: logging.LogRecord) -> str:
        # Lines that the message itself begins, as for a table, stay; one that begins within a name
        # could pass for a line of ours.
        kept = "\n\t" if "\n" in str(record.msg) else "\t"
        record = copy.copy(record)
        record.msg, record.args = printable(record.getMessage(), keep=kept), None
        return printable(super().format(record), keep="\n\t")  # with the traceback


class _ColorFormatter(_Formatter):
    """Colours time and logger name by the level; adds the level to warnings and errors."""

    def format(self, record: logging.LogRecord) -> str:
        head = f"[{self.formatTime(record, _DATE)} {record.name}]"
        level = f" {record.levelname}:" if record.levelno >= logging.WARNING else ""
        text = super().format(record)
        return f"\x1b[{_COLORS.get(record.levelno, '0')}m{head}{level}\x1b[0m {text}"


class _ConsoleHandler(logging.StreamHandler):
    """Prints lines above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except Exception:
            self.handleError(record)


def setup_logger(
    output: str | None = None,
    distributed_rank: int = 0,
    *,
    color: bool = True,
    name: str = "detkit",
) -> logging.Logger:
    """Configure the logger `name` and return it; a second call replaces the handlers.

    Args:
        output: A folder for `log.txt`, or a file that ends with `.txt` or `.log`; None logs to the
            console only. Ranks above 0 append `.rankN` to the name, and log to the file only.
        distributed_rank: Rank of this process.
        color: Whether to use colours on a terminal.
        name: Name of the logger; those below it inherit the configuration.
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
        console.setFormatter(
            _ColorFormatter("%(message)s") if color and sys.stdout.isatty() else plain
        )
        logger.addHandler(console)
    if output is not None:
        path = Path(output)
        if path.suffix not in (".txt", ".log"):
            path = path / "log.txt"
        if distributed_rank > 0:
            path = path.with_name(f"{path.name}.rank{distributed_rank}")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path, encoding="utf-8")
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
