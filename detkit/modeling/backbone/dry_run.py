"""One forward pass without data, to learn which shapes a network gives.

Legend: C channels, H and W height and width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from detkit.layers import ShapeSpec
from detkit.modeling.backbone.backbone import Backbone
from detkit.utils.modes import preserved_modes
from detkit.utils.near_miss import did_you_mean

logger = logging.getLogger(__name__)

T = TypeVar("T")

# In units of the coarsest stride. Eight cells tell a stride from its double also where a
# convolution without padding takes a cell or two away; unequal sides tell height from width.
_CELLS = (8, 12)


class OutputShapeError(ValueError):
    """A backbone gives other features than its `output_shape` says."""


def dry_forward(module: nn.Module, image_size: tuple[int, int], channels: int = 3) -> Any:
    """Return what a module gives for two images of (H, W), with no memory or arithmetic behind the numbers.

    The module runs as in evaluation, on the meta device, with stand-ins for its parameters and
    buffers: statistics, modes and the state of random number generators stay as they are. A module
    that the meta device cannot run takes images of zeros instead.
    """

    def use(stand_ins: dict[str, Tensor], images: Tensor) -> Any:
        with torch.no_grad():
            return torch.func.functional_call(module, stand_ins, (images,))

    return _with_stand_ins(module, image_size, channels, use)


def parameters_behind(
    module: nn.Module, image_size: tuple[int, int], channels: int = 3
) -> list[set[str]]:
    """Return, for each map that a module gives (in a list, or a dict's values), the parameters that
    it depends on.
    """

    def use(stand_ins: dict[str, Tensor], images: Tensor) -> list[set[str]]:
        leaves = {name: stand_ins[name].requires_grad_() for name, _ in module.named_parameters()}
        with torch.enable_grad():
            outputs = torch.func.functional_call(module, stand_ins, (images,))
            maps = outputs.values() if isinstance(outputs, Mapping) else outputs
            return [_leaves_behind(value, leaves) for value in maps]

    return _with_stand_ins(module, image_size, channels, use)


def _leaves_behind(value: Tensor, leaves: Mapping[str, Tensor]) -> set[str]:
    gradients = torch.autograd.grad(
        value.sum(), list(leaves.values()), retain_graph=True, allow_unused=True
    )
    return {name for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}


def _with_stand_ins(
    module: nn.Module,
    image_size: tuple[int, int],
    channels: int,
    use: Callable[[dict[str, Tensor], Tensor], T],
) -> T:
    """Return what `use` makes of copies of the module's tensors and of images: on the meta device,
    else its own.
    """
    tensors = dict([*module.named_parameters(), *module.named_buffers()])

    def on(device: torch.device | str) -> T:
        stand_ins = {
            name: tensor.detach().to(device, copy=True) for name, tensor in tensors.items()
        }
        return use(stand_ins, torch.zeros(2, channels, *image_size, device=device))

    with preserved_modes(module), torch.random.fork_rng(devices=[]):
        module.eval()
        try:
            return on("meta")
        except OutputShapeError:
            raise
        except Exception:
            # Whatever it was: data-dependent control flow, tensors that are no buffers, kernels for
            # one device only.
            return on(next((tensor.device for tensor in tensors.values()), torch.device("cpu")))


def check_output_shape(backbone: Backbone, channels: int) -> None:
    """Compare what a backbone, and each backbone within it, gives with what it declares.

    Nothing is checked where all of them are detkit's own, or where the forward pass fails for
    another reason: it may need the device that the model is moved to later.

    Args:
        backbone: Not changed.
        channels: C of its images.

    Raises:
        OutputShapeError: A feature is missing, not declared, or of other channels or stride; the
            message names it.
    """
    parts = [module for module in backbone.modules() if isinstance(module, Backbone)]
    if all(type(part).__module__.startswith("detkit.") for part in parts):
        return
    unit = max(
        [
            1,
            *(part.size_divisibility for part in parts),
            *(s for part in parts for s in _strides(part)),
        ]
    )
    height, width = (cells * unit for cells in _CELLS)
    if side := backbone.padding_constraints.get("square_size", 0):
        height = width = side
    # Inner ones report before the features go on to a layer that would fail on them.
    handles = [part.register_forward_hook(_compare) for part in parts]
    try:
        dry_forward(backbone, (height, width), channels)
    except OutputShapeError:
        raise
    except Exception as error:
        size = f"{height}x{width}"
        logger.warning(
            "output_shape of %s is not checked: it fails on %s: %s",
            type(backbone).__name__,
            size,
            error,
        )
    finally:
        for handle in handles:
            handle.remove()


def _compare(part: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
    assert isinstance(part, Backbone)
    name, declared = type(part).__name__, part.output_shape()
    if not isinstance(outputs, Mapping):
        raise OutputShapeError(
            f"{name}.forward must give features by name, a dict: got {type(outputs).__name__}"
        )
    for feature in declared:
        if feature not in outputs:
            hint = did_you_mean(feature, outputs)
            raise OutputShapeError(
                f"{name}.output_shape declares {feature!r}, forward gives only"
                f" {list(outputs)}.{hint}"
            )
    for feature, value in outputs.items():
        if feature not in declared:
            hint = did_you_mean(feature, declared)
            raise OutputShapeError(
                f"{name}.forward gives {feature!r}, output_shape declares {list(declared)}.{hint}"
            )
        image_size = inputs[0].shape[-2:] if inputs and isinstance(inputs[0], Tensor) else None
        if problem := _difference(declared[feature], value, image_size):
            raise OutputShapeError(f"{name}.output_shape declares {feature!r} with {problem}")


def _difference(declared: ShapeSpec, value: Tensor, image_size: torch.Size | None) -> str:
    """Say in what a feature is not what was declared; empty where it is."""
    if declared.channels is not None and value.shape[1] != declared.channels:
        return (
            f"{declared.channels} channels, forward gives {value.shape[1]}: shape"
            f" {tuple(value.shape)}"
        )
    if not declared.stride or image_size is None:
        return ""
    if value.dim() != 4:
        return (
            f"stride {declared.stride}, forward gives no map (N, C, H, W): shape"
            f" {tuple(value.shape)}"
        )
    cells = value.shape[-2:]
    if all(
        abs(side - image_side / declared.stride) <= 1
        for side, image_side in zip(cells, image_size, strict=True)
    ):
        return ""
    found = sorted(
        {image_side / max(side, 1) for side, image_side in zip(cells, image_size, strict=True)}
    )
    return (
        f"stride {declared.stride}, forward gives stride"
        f" {' and '.join(f'{stride:g}' for stride in found)}: a map of {cells[0]}x{cells[1]} for an"
        f" image of {image_size[0]}x{image_size[1]}"
    )


def _strides(part: Backbone) -> list[int]:
    return [shape.stride for shape in part.output_shape().values() if shape.stride]
