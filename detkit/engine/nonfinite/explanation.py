"""What is said about a step that is not finite: a message for the error, and a file with everything
that is known.
"""

import dataclasses
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detkit.engine.nonfinite.cause import Cause, likeliest_cause
from detkit.engine.nonfinite.evidence import Evidence, PassEvidence, collect, file_names
from detkit.engine.nonfinite.step import BrokenStep
from detkit.engine.nonfinite.verdict import is_finite
from detkit.utils import comm

logger = logging.getLogger(__name__)


def explain(step: BrokenStep, dump_dir: str | None) -> str:
    """Find out why a step is not finite, write it to a file, and give it in short. All processes must call it.

    Args:
        step: What is known; it is replayed once.
        dump_dir: Where the main process writes `nonfinite_iter_ITERATION.json`; None, or an empty
            name, for no file.
    """
    evidence = comm.all_gather(collect(step))
    cause = likeliest_cause(evidence)
    path = ""
    if dump_dir and comm.is_main_process():
        path = _write(
            _content(step, evidence, cause),
            Path(dump_dir) / f"nonfinite_iter_{step.iteration:07d}.json",
        )
    # The error of one process ends the others: not before the file is there.
    path = comm.all_gather(path)[0]
    return _message(step, evidence, cause, path)


def in_short(step: BrokenStep) -> str:
    """Return what is not finite and the images, for a line in the log. All processes must call it."""
    return "; ".join(filter(None, comm.all_gather(_found_here(step)))) or "gradients"


def _found_here(step: BrokenStep) -> str:
    for losses, pass_ in zip(step.verdict.losses, step.passes, strict=True):
        if not is_finite(losses):
            where = f"in process {comm.get_rank()}: " if comm.get_world_size() > 1 else ""
            files = file_names(pass_.batch)
            broken = {name: value for name, value in losses.items() if not math.isfinite(value)}
            return (
                where
                + _numbers(broken, pass_.error)
                + (f" (images {', '.join(files)})" if files else "")
            )
    return ""


def _message(step: BrokenStep, evidence: Sequence[Evidence], cause: Cause, path: str) -> str:
    of_process, of_pass = _most_telling(evidence)
    process = _of_process(of_process.process)
    numbers = _numbers(of_pass.losses, of_pass.error)
    if step.verdict.is_loss_broken:
        found, passes = (
            f"loss{process} is not finite at iteration {step.iteration}: {numbers}",
            [of_pass],
        )
    else:
        found = (
            f"the gradient is not finite at iteration {step.iteration}, though the losses{process}"
            f" are: {numbers}"
        )
        passes = of_process.passes
    where = _where(of_process)
    files = [image.file_name for of_pass in passes for image in of_pass.images if image.file_name]
    skipped = (
        f"{step.num_skipped} steps were skipped before (SOLVER.SKIP_NONFINITE_STEPS)"
        if step.num_skipped
        else ""
    )
    sentences = [
        found,
        f"Likeliest cause: {cause.text}",
        f"Settings to look at: {', '.join(cause.settings)}" if cause.settings else "",
        where if where not in cause.text else "",
        f"Images of the batch: {', '.join(files)}" if files else "",
        "The weights are as they were before this step",
        skipped,
        f"All that is known: {path}" if path else "",
    ]
    return " ".join(f"{sentence}." for sentence in sentences if sentence)


def _most_telling(evidence: Sequence[Evidence]) -> tuple[Evidence, PassEvidence]:
    """The process and the pass that the message is about: with the first loss, or gradient, that is
    not finite.
    """
    for of_process in evidence:
        for of_pass in of_process.passes:
            if not is_finite(of_pass.losses):
                return of_process, of_pass
    with_gradient = (of_process for of_process in evidence if of_process.replay.first_gradient)
    of_process = next(with_gradient, evidence[0])
    return of_process, of_process.passes[0]


def _where(evidence: Evidence) -> str:
    output, gradient = evidence.replay.first_output, evidence.replay.first_gradient
    if output is not None and output.module:
        return (
            f"The first module whose output is not finite, in a replay: {output.module}"
            f" ({output.kind})"
        )
    if gradient is not None:
        return (
            f"The first gradient that is not finite, in a replay: that of {gradient.of}"
            f" {gradient.name}".rstrip()
        )
    return ""


def _numbers(losses: Mapping[str, float], error: str) -> str:
    if error:  # its first sentence: the others are the model's guesses at the cause
        return error.split(". ")[0].rstrip(".")
    return ", ".join(f"{name}={value:.4g}" for name, value in losses.items())


def _of_process(rank: int) -> str:
    return f" of process {rank}" if comm.get_world_size() > 1 else ""


def _content(step: BrokenStep, evidence: Sequence[Evidence], cause: Cause) -> dict[str, Any]:
    return {
        "iteration": step.iteration,
        "not_finite": "loss" if step.verdict.is_loss_broken else "gradient",
        "likeliest_cause": cause.text,
        "settings_to_look_at": cause.settings,
        "parameter_groups": [
            {"lr": float(group["lr"]), "num_parameters": len(group["params"])}
            for group in step.optimizer.param_groups
        ],
        "steps_skipped_before": step.num_skipped,
        "processes": [dataclasses.asdict(of_process) for of_process in evidence],
    }


def _write(content: Mapping[str, Any], path: Path) -> str:
    """Write a file and give its path; without one, the reason is in the log, and the run's own
    error goes on.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_plain(content), indent=1, allow_nan=False)
        # A box on one line.
        text = re.sub(r"\[[-+.,\de\s]+\]", lambda numbers: " ".join(numbers[0].split()), text)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        logger.error("%s could not be written: %s", path, error)
        return ""
    return str(path)


def _plain(value: Any) -> Any:
    """Values as JSON has them; nan and inf, which it lacks, as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
