"""What one process knows about a step that is not finite: plain values, for a file and for the
other processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detkit.engine.nonfinite.replay import Replay, replay
from detkit.engine.nonfinite.step import BrokenStep
from detkit.engine.nonfinite.verdict import are_finite
from detkit.structures import Instances
from detkit.utils import comm


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
    """What a model said that found numbers that are not finite by itself; empty otherwise."""
    images: list[ImageEvidence]


@dataclass(frozen=True)
class Evidence:
    """What one process knows."""

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


def collect(step: BrokenStep) -> Evidence:
    """Look at the weights, the gradients and the batches of a step, and replay it. All processes
    must call it.
    """
    named = dict(step.model.named_parameters())
    gradients = [name for name, parameter in named.items() if _is_broken(parameter.grad)]
    replayed = replay(step)  # which also gives the buffers back as they were
    weights = {**named, **dict(step.model.named_buffers())}
    return Evidence(
        process=comm.get_rank(),
        passes=[
            PassEvidence(losses, pass_.error, [_image(item) for item in _model_inputs(pass_.batch)])
            for losses, pass_ in zip(step.verdict.losses, step.passes, strict=True)
        ],
        recent_losses=list(step.recent_losses),
        num_steps=step.num_steps,
        broken_weights=[name for name, weight in weights.items() if _is_broken(weight)],
        largest_weight=_largest(named),
        broken_gradients=gradients,
        replay=replayed,
    )


def file_names(batch: Any) -> list[str]:
    """Return the files of a batch of model inputs; none for batches of another kind."""
    return [str(item["file_name"]) for item in _model_inputs(batch) if "file_name" in item]


def _model_inputs(batch: Any) -> list[Mapping[str, Any]]:
    return (
        [item for item in batch if isinstance(item, Mapping)]
        if isinstance(batch, list | tuple)
        else []
    )


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


def _is_broken(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and not are_finite([tensor])


def _largest(named: Mapping[str, nn.Parameter]) -> tuple[str, float]:
    sizes = {
        name: float(torch.nan_to_num(parameter.detach().abs(), nan=0.0, posinf=0.0).max())
        for name, parameter in named.items()
        if parameter.numel() > 0
    }
    return max(sizes.items(), key=lambda item: item[1], default=("", 0.0))
