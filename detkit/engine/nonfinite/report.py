"""What is known about a non-finite step: evidence of all processes, a message, and a JSON file."""

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detkit.engine.nonfinite.replay import BrokenStep, Replay, are_finite, replay
from detkit.structures import Instances
from detkit.utils import comm

logger = logging.getLogger(__name__)

# Losses of single batches differ by a factor of a few; a run that diverges gains a power of ten
# within some steps.
_RISE = 10.0
_LAST = 3


@dataclass(frozen=True)
class ImageEvidence:
    """One image of a batch, with its ground truth in the coordinates of the network's input."""

    file_name: str
    image_id: int | str | None
    size: list[int]
    """Height and width."""
    is_finite: bool
    boxes: list[list[float]]
    """XYXY, in pixels."""
    classes: list[int]


@dataclass(frozen=True)
class PassEvidence:
    """One of the batches of an iteration."""

    losses: dict[str, float]
    error: str
    """Message of the model's own FloatingPointError; empty without one."""
    images: list[ImageEvidence]


@dataclass(frozen=True)
class Evidence:
    """What one process knows; plain values, for the file and for the other processes."""

    process: int
    passes: list[PassEvidence]
    recent_losses: list[float]
    num_steps: int
    """Steps that this process took before."""
    broken_weights: list[str]
    """Parameters and buffers that were not finite before the step."""
    largest_weight: tuple[str, float]
    """The parameter with the largest finite absolute value, and that value."""
    broken_gradients: list[str]
    replay: Replay


class Cause(NamedTuple):
    """A cause, and the settings to look at."""

    text: str
    settings: tuple[str, ...] = ()


_TOO_FAST = (
    "SOLVER.BASE_LR lower",
    "SOLVER.WARMUP_ITERS longer",
    "SOLVER.CLIP_GRADIENTS.ENABLED True",
)


def explain(step: BrokenStep, dump_dir: str | None) -> str:
    """Replay a step, write all that is known to a file, and return a message.

    All processes must call it.

    Args:
        step: The step, which is replayed once.
        dump_dir: Where the main process writes `nonfinite_iter_ITERATION.json`; None or an empty
            name writes none.
    """
    evidence = comm.all_gather(collect(step))
    cause = find_cause(evidence)
    path = ""
    if dump_dir and comm.is_main_process():
        content = {
            "iteration": step.iteration,
            "not_finite": "loss" if step.is_loss_broken else "gradient",
            "likeliest_cause": cause.text,
            "settings_to_look_at": cause.settings,
            "parameter_groups": [
                {"lr": float(group["lr"]), "num_parameters": len(group["params"])}
                for group in step.optimizer.param_groups
            ],
            "steps_skipped_before": step.num_skipped,
            "processes": [asdict(of_process) for of_process in evidence],
        }
        path = _write(content, Path(dump_dir) / f"nonfinite_iter_{step.iteration:07d}.json")
    # The error of one process ends the others: not before the file is there.
    path = comm.all_gather(path)[0]
    return _message(step, evidence, cause, path)


def summarize(step: BrokenStep) -> str:
    """Return the non-finite losses and their images, for the log. All processes must call it."""
    found = ""
    for losses, pass_ in zip(step.losses, step.passes, strict=True):
        broken = {name: value for name, value in losses.items() if not math.isfinite(value)}
        if broken:
            if comm.get_world_size() > 1:
                found = f"in process {comm.get_rank()}: "
            found += _numbers(broken, pass_.error)
            inputs = _model_inputs(pass_.batch)
            files = [str(item["file_name"]) for item in inputs if "file_name" in item]
            if files:
                found += f" (images {', '.join(files)})"
            break
    return "; ".join(filter(None, comm.all_gather(found))) or "gradients"


def collect(step: BrokenStep) -> Evidence:
    """Return what this process knows of a step, which is replayed. All processes must call it."""
    parameters = dict(step.model.named_parameters())
    largest = ("", 0.0)
    for name, parameter in parameters.items():
        if parameter.numel() > 0:
            finite = torch.nan_to_num(parameter.detach().abs(), nan=0.0, posinf=0.0)
            largest = max(largest, (name, float(finite.max())), key=lambda item: item[1])
    # Before the replay, which also restores the buffers, for the weights after it.
    broken_gradients = [name for name, p in parameters.items() if _is_broken(p.grad)]
    replayed = replay(step)
    weights = {**parameters, **dict(step.model.named_buffers())}
    passes = []
    for losses, pass_ in zip(step.losses, step.passes, strict=True):
        images = [_image(item) for item in _model_inputs(pass_.batch)]
        passes.append(PassEvidence(losses, pass_.error, images))
    return Evidence(
        process=comm.get_rank(),
        passes=passes,
        recent_losses=list(step.recent_losses),
        num_steps=step.num_steps,
        broken_weights=[name for name, weight in weights.items() if _is_broken(weight)],
        largest_weight=largest,
        broken_gradients=broken_gradients,
        replay=replayed,
    )


def find_cause(evidence: Sequence[Evidence]) -> Cause:
    """Return the first cause that the evidence of any process shows, the plainest kind first."""
    # Rules outside: a fault of one process has spread to the gradients of all, so the plainest
    # evidence of any process counts for more than what the first process sees.
    for rule in (_broken_weights, _broken_image, _broken_box, _rising_loss, _first_place):
        for of_process in evidence:
            cause = rule(of_process)
            if cause is not None:
                return cause
    return Cause(
        "the replay of the step gave finite numbers: it does not repeat itself, as where operations"
        " add in no fixed order, other code changes weights meanwhile, or memory is faulty",
        ("DETERMINISTIC True",),
    )


def _broken_weights(evidence: Evidence) -> Cause | None:
    if not evidence.broken_weights:
        return None
    names = ", ".join(evidence.broken_weights[:3])
    if len(evidence.broken_weights) > 3:
        names += f" and {len(evidence.broken_weights) - 3} more"
    if evidence.num_steps:
        return Cause(
            f"the step before made weights infinite or nan ({names}): the learning rate is too"
            " high",
            _TOO_FAST,
        )
    return Cause(
        f"weights were infinite or nan before the first step ({names}), as they were loaded",
        ("MODEL.WEIGHTS",),
    )


def _broken_image(evidence: Evidence) -> Cause | None:
    for image in _images(evidence):
        if not image.is_finite:
            return Cause(
                f"the image of {image.file_name or 'a batch'} is not finite as the data loader"
                " gives it: a mapper or an augmentation of your own"
            )
    output = evidence.replay.first_output
    # The first module to finish gets the normalised images, before any arithmetic of the model.
    is_first_input = output is not None and output.ran_first and not output.has_finite_inputs
    if is_first_input and any(_images(evidence)):
        return Cause(
            "images are finite, and are not once they are normalised",
            ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"),
        )
    return None


def _broken_box(evidence: Evidence) -> Cause | None:
    output = evidence.replay.first_output
    if output is not None and output.module.startswith("backbone"):  # which does not see boxes
        return None
    for image in _images(evidence):
        for number, box in enumerate(image.boxes):
            fault = ""
            if not all(math.isfinite(x) for x in box):
                fault = "is not finite"
            elif box[2] <= box[0] or box[3] <= box[1]:
                fault = "has no area"
            if fault:
                return Cause(
                    f"box {number} of {image.file_name or 'an image'},"
                    f" {[round(x, 2) for x in box]}, {fault}. detkit's loader leaves such boxes"
                    " out: a mapper or an augmentation of your own"
                )
    return None


def _rising_loss(evidence: Evidence) -> Cause | None:
    losses = evidence.recent_losses
    if not losses or max(losses[-_LAST:]) <= _RISE * min(losses):
        return None
    return Cause(
        f"the loss rose from {min(losses):.3g} to {max(losses[-_LAST:]):.3g} within the last"
        f" {len(losses)} steps: the learning rate is too high",
        _TOO_FAST,
    )


def _first_place(evidence: Evidence) -> Cause | None:
    """The module or gradient in which the replay stopped being finite; or why there was none."""
    output, gradient = evidence.replay.first_output, evidence.replay.first_gradient
    if output is not None:
        module = f"{output.module or 'the model'} ({output.kind})"
        if output.has_finite_inputs and output.dtype == "float16":
            return _overflow(module)
        if not output.module:  # the whole model, which finishes last
            names = []
            for of_pass in evidence.passes:
                names += [n for n, value in of_pass.losses.items() if not math.isfinite(value)]
            return Cause(
                f"the outputs of all modules within are finite, a loss that {module} makes of them"
                f" is not: {', '.join(names)}"
            )
        if output.has_finite_inputs:
            return Cause(f"{module} makes numbers that are not finite of finite ones")
        return Cause(
            f"what {module} is given is not finite, and no module gave it: the data, or code"
            " between modules"
        )
    if gradient is not None:
        if gradient.dtype == "float16":
            return _overflow(f"the gradient of {gradient.name or 'the model'}")
        where = f"at the output of {gradient.name or 'the model'}"
        if gradient.of == "parameter":
            where = f"of {gradient.name}"
        return Cause(
            f"the losses are finite, their gradient is not from that {where} on backwards: an"
            " overflow behind it, or a function where it has no derivative (a root, a norm or a"
            " logarithm at 0)"
        )
    if evidence.replay.error:
        if any(of_pass.error for of_pass in evidence.passes):
            return Cause(
                "the outputs of all modules are finite up to where the model stops by itself"
            )
        return Cause(f"not known, since the step could not be replayed ({evidence.replay.error})")
    return None


def _overflow(where: str) -> Cause:
    return Cause(f"an overflow in {where}: float16 ends at 65504", ("SOLVER.AMP.DTYPE bf16",))


def _message(step: BrokenStep, evidence: Sequence[Evidence], cause: Cause, path: str) -> str:
    of_process, of_pass = _most_telling(evidence)
    process = f" of process {of_process.process}" if comm.get_world_size() > 1 else ""
    numbers = _numbers(of_pass.losses, of_pass.error)
    passes = [of_pass]
    if step.is_loss_broken:
        found = f"loss{process} is not finite at iteration {step.iteration}: {numbers}"
    else:
        passes = of_process.passes
        found = (
            f"the gradient is not finite at iteration {step.iteration}, though the losses{process}"
            f" are: {numbers}"
        )
    sentences = [found, f"Likeliest cause: {cause.text}"]
    if cause.settings:
        sentences.append(f"Settings to look at: {', '.join(cause.settings)}")
    output, gradient = of_process.replay.first_output, of_process.replay.first_gradient
    if output is not None and output.module:
        sentences.append(
            f"The first module whose output is not finite, in a replay: {output.module}"
            f" ({output.kind})"
        )
    elif gradient is not None:
        sentences.append(
            f"The first gradient that is not finite, in a replay: that of {gradient.of}"
            f" {gradient.name}".rstrip()
        )
    files = [image.file_name for p in passes for image in p.images if image.file_name]
    if files:
        sentences.append(f"Images of the batch: {', '.join(files)}")
    sentences.append("The weights are as they were before this step")
    if step.num_skipped:
        sentences.append(
            f"{step.num_skipped} steps were skipped before (SOLVER.SKIP_NONFINITE_STEPS)"
        )
    if path:
        sentences.append(f"All that is known: {path}")
    return " ".join(f"{sentence}." for sentence in sentences)


def _most_telling(evidence: Sequence[Evidence]) -> tuple[Evidence, PassEvidence]:
    """Return process and pass of the first loss, or else gradient, that is not finite."""
    for of_process in evidence:
        for of_pass in of_process.passes:
            if not all(math.isfinite(value) for value in of_pass.losses.values()):
                return of_process, of_pass
    with_gradient = (of_process for of_process in evidence if of_process.replay.first_gradient)
    of_process = next(with_gradient, evidence[0])
    return of_process, of_process.passes[0]


def _numbers(losses: Mapping[str, float], error: str) -> str:
    if error:  # its first sentence: the others are the model's guesses at the cause
        return error.split(". ")[0].rstrip(".")
    return ", ".join(f"{name}={value:.4g}" for name, value in losses.items())


def _model_inputs(batch: Any) -> list[Mapping[str, Any]]:
    """Return the items of a batch that are model inputs; none for batches of another kind."""
    if not isinstance(batch, list | tuple):
        return []
    return [item for item in batch if isinstance(item, Mapping)]


def _image(item: Mapping[str, Any]) -> ImageEvidence:
    image, instances = item.get("image"), item.get("instances")
    fields = instances.get_fields() if isinstance(instances, Instances) else {}
    return ImageEvidence(
        file_name=str(item.get("file_name", "")),
        image_id=item.get("image_id"),
        size=list(image.shape[-2:]) if isinstance(image, Tensor) else [],
        is_finite=not _is_broken(image),
        boxes=fields["gt_boxes"].tensor.tolist() if "gt_boxes" in fields else [],
        classes=fields["gt_classes"].tolist() if "gt_classes" in fields else [],
    )


def _images(evidence: Evidence) -> Iterator[ImageEvidence]:
    return (image for of_pass in evidence.passes for image in of_pass.images)


def _is_broken(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and not are_finite([tensor])


def _write(content: Mapping[str, Any], path: Path) -> str:
    """Write a file and return its path; empty if that fails, so that the run's own error shows."""
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
    """Return a value as JSON has it; nan and inf, which it lacks, as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
