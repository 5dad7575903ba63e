"""The likeliest cause of numbers that are not finite, in words: the first rule that the evidence
meets.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from detkit.engine.nonfinite.evidence import Evidence, ImageEvidence

# Losses of single batches differ by a factor of a few; a run that diverges gains a power of ten
# within some steps.
_RISE = 10.0
_LAST = 3
# Far above what any initialisation gives, and normed layers keep.
_LARGE_WEIGHT = 1e4
# Cropped ground truth ends at the image's border. A box of this many times its size has wrong
# units, or worse.
_LARGE_BOX = 10.0


class Cause(NamedTuple):
    """A cause, and the settings to look at."""

    text: str
    settings: tuple[str, ...]


_TOO_FAST = (
    "SOLVER.BASE_LR lower",
    "SOLVER.WARMUP_ITERS longer",
    "SOLVER.CLIP_GRADIENTS.ENABLED True",
)


def likeliest_cause(evidence: Sequence[Evidence]) -> Cause:
    """Return what one of the processes points to, the plainest evidence first."""
    for rule in _RULES:
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
    names = _some(evidence.broken_weights)
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
                " gives it: a mapper or an augmentation of your own",
                (),
            )
    return None


def _broken_normalisation(evidence: Evidence) -> Cause | None:
    output = evidence.replay.first_output
    if (
        output is None
        or not output.ran_first
        or output.has_finite_inputs
        or not any(_images(evidence))
    ):
        return None
    return Cause(
        "images are finite, and are not once they are normalised",
        ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"),
    )


def _broken_box(evidence: Evidence) -> Cause | None:
    output = evidence.replay.first_output
    if output is not None and output.module.startswith("backbone"):  # where boxes have no part yet
        return None
    for image in _images(evidence):
        for number, box in enumerate(image.boxes):
            fault = _fault_of_box(box, image.size)
            if fault:
                return Cause(
                    f"box {number} of {image.file_name or 'an image'},"
                    f" {[round(x, 2) for x in box]}, {fault}. detkit's loader leaves such boxes"
                    " out: a mapper or an augmentation of your own",
                    (),
                )
    return None


def _fault_of_box(box: Sequence[float], size: Sequence[int]) -> str:
    if not all(math.isfinite(x) for x in box):
        return "is not finite"
    width, height = box[2] - box[0], box[3] - box[1]
    if width <= 0 or height <= 0:
        return "has no area"
    if size and max(width / size[1], height / size[0]) > _LARGE_BOX:
        return f"is over {_LARGE_BOX:g} times as large as its image of {size[1]}x{size[0]}"
    return ""


def _rising_loss(evidence: Evidence) -> Cause | None:
    losses = evidence.recent_losses
    if not losses or not max(losses[-_LAST:]) > _RISE * min(losses):
        return None
    return Cause(
        f"the loss rose from {min(losses):.3g} to {max(losses[-_LAST:]):.3g} within the last"
        f" {len(losses)} steps: the learning rate is too high",
        _TOO_FAST,
    )


def _large_weight(evidence: Evidence) -> Cause | None:
    name, value = evidence.largest_weight
    if value <= _LARGE_WEIGHT:
        return None
    if evidence.num_steps:
        return Cause(
            f"weights have grown to {value:.3g} ({name}): the learning rate is too high", _TOO_FAST
        )
    return Cause(
        f"weights were as large as {value:.3g} before the first step ({name}), as they were loaded",
        ("MODEL.WEIGHTS",),
    )


def _half_precision(evidence: Evidence) -> Cause | None:
    output, gradient = evidence.replay.first_output, evidence.replay.first_gradient
    if output is not None and output.dtype == "float16" and output.has_finite_inputs:
        where = _module(output.module, output.kind)
    elif output is None and gradient is not None and gradient.dtype == "float16":
        where = f"the gradient of {_module(gradient.name)}"
    else:
        return None
    return Cause(f"an overflow in {where}: float16 ends at 65504", ("SOLVER.AMP.DTYPE bf16",))


def _module_at_fault(evidence: Evidence) -> Cause | None:
    output = evidence.replay.first_output
    if output is None:
        return None
    module = _module(output.module, output.kind)
    if not output.module:
        broken = [
            n for p in evidence.passes for n, value in p.losses.items() if not math.isfinite(value)
        ]
        return Cause(
            f"the outputs of all modules within are finite, a loss that {module} makes of them is"
            f" not: {_some(broken)}",
            (),
        )
    if output.has_finite_inputs:
        return Cause(f"{module} makes numbers that are not finite of finite ones", ())
    return Cause(
        f"what {module} is given is not finite, and no module gave it: the data, or code between"
        " modules",
        (),
    )


def _gradient_at_fault(evidence: Evidence) -> Cause | None:
    gradient = evidence.replay.first_gradient
    if gradient is None:
        return None
    where = (
        f"of {gradient.name}"
        if gradient.of == "parameter"
        else f"at the output of {_module(gradient.name)}"
    )
    return Cause(
        f"the losses are finite, their gradient is not from that {where} on backwards: an overflow"
        " behind it, or a function where it has no derivative (a root, a norm or a logarithm"
        " at 0)",
        (),
    )


def _no_module_at_fault(evidence: Evidence) -> Cause | None:
    error = evidence.replay.error
    if not error:
        return None
    if any(of_pass.error for of_pass in evidence.passes):
        return Cause(
            "the outputs of all modules are finite up to where the model stops by itself", ()
        )
    return Cause(f"not known, since the step could not be replayed ({error})", ())


_RULES = (
    _broken_weights,
    _broken_image,
    _broken_normalisation,
    _broken_box,
    _rising_loss,
    _large_weight,
    _half_precision,
    _module_at_fault,
    _gradient_at_fault,
    _no_module_at_fault,
)


def _images(evidence: Evidence) -> Iterator[ImageEvidence]:
    return (image for of_pass in evidence.passes for image in of_pass.images)


def _module(name: str, kind: str = "") -> str:
    """A module as a reader finds it."""
    if not name:
        return f"the model ({kind})" if kind else "the model"
    return f"{name} ({kind})" if kind else name


def _some(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (
        f" and {len(names) - count} more" if len(names) > count else ""
    )
