"""Log lines: one handler for the console, one file per process."""

import logging
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

_COLORS = {
    logging.DEBUG: "36",
    logging.INFO: "32",
    logging.WARNING: "33",
    logging.ERROR: "31",
    logging.CRITICAL: "1;31",
}
_DATE = "%m/%d %H:%M:%S"
_seen: Counter[tuple[Any, ...]] = Counter()


class _ColorFormatter(logging.Formatter):
    """Colours time and logger name by the level; spells out warnings and errors."""

    def format(self, record: logging.LogRecord) -> str:
        head = f"[{self.formatTime(record, _DATE)} {record.name}]"
        level = f" {record.levelname}:" if record.levelno >= logging.WARNING else ""
        text = super().format(record)
        return f"\x1b[{_COLORS.get(record.levelno, '0')}m{head}{level}\x1b[0m {text}"


class _ConsoleHandler(logging.StreamHandler):
    """Prints around a progress bar instead of through it."""

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
    """Set up the logger `name` and return it. A second call replaces the handlers.

    Args:
        output: A folder, which gets `log.txt`, or a file that ends in `.txt` or `.log`; None logs
            to the console only. Ranks above 0 add `.rankN` to the name, and log to the file only.
        distributed_rank: Rank of this process.
        color: Colour the console when it is a terminal.
        name: Root of the loggers to set up.
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    plain = logging.Formatter("[%(asctime)s %(name)s] %(levelname)s: %(message)s", datefmt=_DATE)
    if distributed_rank == 0:
        console = _ConsoleHandler(sys.stdout)
        console.setFormatter(
            _ColorFormatter("%(message)s") if color and sys.stdout.isatty() else plain
        )
        logger.addHandler(console)
    if output is not None:
        file = logging.FileHandler(_log_file(Path(output), distributed_rank), encoding="utf-8")
        file.setFormatter(plain)
        logger.addHandler(file)
    return logger


def _log_file(output: Path, rank: int) -> Path:
    path = output if output.suffix in (".txt", ".log") else output / "log.txt"
    if rank > 0:
        path = path.with_name(f"{path.name}.rank{rank}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def log_first_n(
    level: int, message: str, n: int = 1, *, key: Any = None, name: str = "detkit"
) -> None:
    """Log a message the first n times only.

    Args:
        level: See `logging`, for example `logging.WARNING`.
        message: The text.
        n: How often, counted over the whole process.
        key: What counts as the same message; None is the text itself.
        name: The logger to use.
    """
    counted = (name, message if key is None else key)
    _seen[counted] += 1
    if _seen[counted] <= n:
        logging.getLogger(name).log(level, message)
