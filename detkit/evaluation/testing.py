"""Results of evaluations: as tables, for spreadsheets, for writers, and against expectations."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from detkit.config import CfgNode
from detkit.utils.errors import ConfigError, UserError
from detkit.utils.logger import FILE_ONLY
from detkit.utils.text import did_you_mean, printable

logger = logging.getLogger(__name__)


class UnexpectedResultsError(UserError, RuntimeError):
    """Results that differ from `TEST.EXPECTED_RESULTS`."""


def print_csv_format(results: Mapping[str, Mapping[str, float]]) -> None:
    """Log the metrics of each task, without those per class, as lines for a spreadsheet.

    Args:
        results: Task -> metric -> number.
    """
    for task, metrics in results.items():
        if not isinstance(metrics, Mapping):
            logger.info("copypaste: %s=%s", task, metrics, extra=FILE_ONLY)
            continue
        overall = _overall(metrics)
        logger.info("copypaste: Task: %s", task, extra=FILE_ONLY)
        logger.info("copypaste: %s", ",".join(overall), extra=FILE_ONLY)
        logger.info(
            "copypaste: %s", ",".join(f"{value:.4f}" for value in overall.values()), extra=FILE_ONLY
        )


def flatten_results_dict(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested results as one dict.

    Example:
        >>> flatten_results_dict({"bbox": {"AP": 40.0, "AP50": 60.0}})
        {'bbox/AP': 40.0, 'bbox/AP50': 60.0}
    """
    flat: dict[str, Any] = {}
    for name, value in results.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}/{inner}": v for inner, v in flatten_results_dict(value).items()})
        else:
            flat[name] = value
    return flat


def verify_results(cfg: CfgNode, results: Mapping[str, Mapping[str, float]]) -> bool:
    """Compare results with `TEST.EXPECTED_RESULTS`.

    Args:
        cfg: The expected results are `[[task, metric, value, tolerance], ...]`; every result meets
            an empty list.
        results: Task -> metric -> number, of one data set, in the main process.

    Returns:
        True.

    Raises:
        ConfigError: An expected result is malformed, or no such task or metric was evaluated.
        UnexpectedResultsError: A number differs by more than its tolerance, or is nan; the message
            lists all that do.
    """
    known = flatten_results_dict(results)
    missed = []
    for expected in cfg.TEST.EXPECTED_RESULTS:
        if not isinstance(expected, list | tuple) or len(expected) != 4:
            raise ConfigError(
                f"TEST.EXPECTED_RESULTS takes [task, metric, value, tolerance], got {expected!r}"
            )
        task, metric, value, tolerance = expected
        name = f"{task}/{metric}"
        if name not in known:
            raise ConfigError(
                f"TEST.EXPECTED_RESULTS asks for {name}, which was not evaluated."
                f"{did_you_mean(name, known)} There are: {', '.join(known) or 'none'}"
            )
        # Not `> tolerance`, which nan would pass.
        if not abs(known[name] - value) <= tolerance:
            missed.append(f"{name} is {known[name]:.4f}, expected {value} +- {tolerance}")
    if missed:
        raise UnexpectedResultsError(
            f"results are not those in TEST.EXPECTED_RESULTS: {'; '.join(missed)}"
        )
    if cfg.TEST.EXPECTED_RESULTS:
        logger.info(
            "results are those in TEST.EXPECTED_RESULTS: %s", list(cfg.TEST.EXPECTED_RESULTS)
        )
    return True


def write_json(path: Path, content: Any, what: str) -> None:
    """Write a result file, and log what it holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    logger.info("wrote %s to %s", what, path, extra=FILE_ONLY)


def metrics_table(metrics: Mapping[str, float]) -> str:
    """Return the metrics, without those per class, as a table of one row."""
    overall = _overall(metrics)
    return table([list(overall.values())], list(overall))


def per_class_table(metrics: Mapping[str, float], prefix: str = "AP-", num_columns: int = 3) -> str:
    """Return the metrics whose name starts with `prefix` as a table, several classes in a row."""
    cells: list[str | float] = []
    for name, value in metrics.items():
        if name.startswith(prefix):
            cells += [name[len(prefix) :], value]
    width = min(2 * num_columns, len(cells))
    rows = [cells[start : start + width] for start in range(0, len(cells), max(width, 1))]
    headers = ["class", prefix.rstrip("-")] * (width // 2)
    return table(rows, headers, name_columns=range(0, width, 2))


def table(
    rows: Sequence[Sequence[str | float]],
    headers: Sequence[str],
    name_columns: Sequence[int] = (),
) -> str:
    """Return a table in Markdown, numbers with three decimals.

    Args:
        rows: Its cells.
        headers: One per column.
        name_columns: Indices of the columns that hold names.
    """
    cells = [[printable(c) if isinstance(c, str) else c for c in row] for row in rows]
    return tabulate(
        cells,
        headers=headers,
        tablefmt="pipe",
        floatfmt=".3f",
        numalign="left",
        # A class may be called "007", which would be printed as 7.000.
        disable_numparse=list(name_columns),
    )


def _overall(metrics: Mapping[str, float]) -> dict[str, float]:
    # Metrics per class are the ones called "AP-person".
    return {name: value for name, value in metrics.items() if "-" not in name}
