"""Results of evaluations: printed for copying, flattened for writers, compared with what was
expected.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from detkit.config import CfgNode
from detkit.utils.near_miss import did_you_mean

logger = logging.getLogger(__name__)


def print_csv_format(results: Mapping[str, Mapping[str, float]]) -> None:
    """Log the metrics of each task as lines that paste into a spreadsheet; those per class are left out.

    Args:
        results: Task -> metric -> number.
    """
    for task, metrics in results.items():
        if not isinstance(metrics, Mapping):
            logger.info("copypaste: %s=%s", task, metrics)
            continue
        overall = {name: value for name, value in metrics.items() if "-" not in name}
        logger.info("copypaste: Task: %s", task)
        logger.info("copypaste: %s", ",".join(overall))
        logger.info("copypaste: %s", ",".join(f"{value:.4f}" for value in overall.values()))


def flatten_results_dict(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested results as one dict: `{"bbox": {"AP": 40.0}}` as `{"bbox/AP": 40.0}`."""
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
        cfg: The expected results are `[[task, metric, value, tolerance], ...]`; an empty list is
            met by everything.
        results: Task -> metric -> number, of one data set, in the main process.

    Returns:
        True.

    Raises:
        ValueError: An expected result is malformed, or no such task or metric was evaluated.
        RuntimeError: A number differs by more than its tolerance, or is nan; the message lists all
            that do.
    """
    missed = [
        problem for expected in cfg.TEST.EXPECTED_RESULTS if (problem := _missed(expected, results))
    ]
    if missed:
        raise RuntimeError("results are not those in TEST.EXPECTED_RESULTS: " + "; ".join(missed))
    if cfg.TEST.EXPECTED_RESULTS:
        logger.info(
            "results are those in TEST.EXPECTED_RESULTS: %s", list(cfg.TEST.EXPECTED_RESULTS)
        )
    return True


def _missed(expected: Any, results: Mapping[str, Mapping[str, float]]) -> str:
    if not isinstance(expected, list | tuple) or len(expected) != 4:
        raise ValueError(
            f"TEST.EXPECTED_RESULTS takes [task, metric, value, tolerance], got {expected!r}"
        )
    task, metric, value, tolerance = expected
    known = flatten_results_dict(results)
    name = f"{task}/{metric}"
    if name not in known:
        raise ValueError(
            f"TEST.EXPECTED_RESULTS asks for {name}, which was not"
            f" evaluated.{did_you_mean(name, known)} There are: {', '.join(known) or 'none'}"
        )
    # Turned round, nan would pass.
    met = abs(known[name] - value) <= tolerance
    return "" if met else f"{name} is {known[name]:.4f}, expected {value} +- {tolerance}"


def metrics_table(metrics: Mapping[str, float]) -> str:
    """Return metrics as a table of one row."""
    return tabulate(
        [list(metrics.values())],
        headers=list(metrics),
        tablefmt="pipe",
        floatfmt=".3f",
        numalign="left",
    )


def per_class_table(metrics: Mapping[str, float], prefix: str = "AP-", num_columns: int = 3) -> str:
    """Return the metrics whose name starts with `prefix` as a table, several classes side by side."""
    cells = [
        cell
        for name, value in metrics.items()
        if name.startswith(prefix)
        for cell in (name[len(prefix) :], value)
    ]
    width = min(2 * num_columns, len(cells))
    rows = [cells[start : start + width] for start in range(0, len(cells), max(width, 1))]
    headers = ["class", prefix.rstrip("-")] * (width // 2)
    of_names = list(range(0, width, 2))  # a class may be called 7
    return tabulate(
        rows,
        headers=headers,
        tablefmt="pipe",
        floatfmt=".3f",
        numalign="left",
        disable_numparse=of_names,
    )
