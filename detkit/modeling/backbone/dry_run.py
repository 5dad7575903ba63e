"""A forward pass without data, to find out the shapes that a network returns.

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
from detkit.utils.errors import UserError
from detkit.utils.module_state import preserved_modes
from detkit.utils.text import did_you_mean

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Size of the image, in units of the coarsest stride. Eight cells tell a stride from its double also
# where a convolution without padding removes a cell or two; unequal sides tell height from width.
_CELLS = (8, 12)


class OutputShapeError(UserError, ValueError):
    """A backbone returns other features than its `output_shape` declares."""


def dry_forward(module: nn.Module, image_size: tuple[int, int], channels: int = 3) -> Any:
    """Return the output of a module for two images of (H, W), without memory or arithmetic.

    The module runs as in evaluation, on the meta device, with stand-ins for its parameters and
    buffers: statistics, modes and the state of random number generators do not change. A module
    that cannot run on the meta device gets images of zeros on its own.
    """

    def use(stand_ins: dict[str, Tensor], images: Tensor) -> Any:
        with torch.no_grad():
            return torch.func.functional_call(module, stand_ins, (images,))

    return _with_stand_ins(module, image_size, channels, use)


def parameters_behind(
    module: nn.Module, image_size: tuple[int, int], channels: int = 3
) -> list[set[str]]:
    """Return the names of the parameters that each output of a module depends on.

    Args:
        module: Returns maps in a list, or as the values of a dict.
        image_size: (H, W) of the images to try.
        channels: C of the images.
    """

    def use(stand_ins: dict[str, Tensor], images: Tensor) -> list[set[str]]:
        names = [name for name, _ in module.named_parameters()]
        leaves = [stand_ins[name].requires_grad_() for name in names]
        behind = []
        with torch.enable_grad():
            outputs = torch.func.functional_call(module, stand_ins, (images,))
            for value in outputs.values() if isinstance(outputs, Mapping) else outputs:
                # A parameter that the map does not depend on has no gradient. The sum is any scalar
                # of the map; the graph is retained because maps share most of it.
                gradients = torch.autograd.grad(
                    value.sum(), leaves, retain_graph=True, allow_unused=True
                )
                pairs = zip(names, gradients, strict=True)
                behind.append({name for name, gradient in pairs if gradient is not None})
        return behind

    return _with_stand_ins(module, image_size, channels, use)


def _with_stand_ins(
    module: nn.Module,
    image_size: tuple[int, int],
    channels: int,
    use: Callable[[dict[str, Tensor], Tensor], T],
) -> T:
    """Return `use(copies of the module's tensors, images)` on the meta device, else on its own."""
    tensors = dict([*module.named_parameters(), *module.named_buffers()])

    # Copies, so that neither gradients nor changes in place reach the module itself.
    def on(device: torch.device | str) -> T:
        stand_ins = {name: t.detach().to(device, copy=True) for name, t in tensors.items()}
        return use(stand_ins, torch.zeros(2, channels, *image_size, device=device))

    with preserved_modes(module), torch.random.fork_rng(devices=[]):
        module.eval()
        try:
            return on("meta")
        except OutputShapeError:
            raise
        except Exception:
            # Anything: data-dependent control flow, tensors that are not buffers, kernels for one
            # device only.
            return on(next((tensor.device for tensor in tensors.values()), torch.device("cpu")))


def check_output_shape(backbone: Backbone, channels: int) -> None:
    """Check that a backbone, and each backbone within it, returns the features it declares.

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
    # The coarsest map has the fewest cells, so it sets the size of the image.
    unit = 1
    for part in parts:
        strides = [shape.stride or 0 for shape in part.output_shape().values()]
        unit = max(unit, part.size_divisibility, *strides)
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
        logger.warning(
            "output_shape of %s is not checked: it fails on %dx%d: %s",
            type(backbone).__name__,
            height,
            width,
            error,
        )
    finally:
        for handle in handles:
            handle.remove()


def _compare(part: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
    """Forward hook that raises an OutputShapeError where a backbone's output differs."""
    assert isinstance(part, Backbone)
    name, declared = type(part).__name__, part.output_shape()
    if not isinstance(outputs, Mapping):
        raise OutputShapeError(
            f"{name}.forward must return features by name, a dict: got {type(outputs).__name__}"
        )
    for feature in declared:
        if feature not in outputs:
            hint = did_you_mean(feature, outputs)
            raise OutputShapeError(
                f"{name}.output_shape declares {feature!r}, forward returns only"
                f" {list(outputs)}.{hint}"
            )
    image_size = inputs[0].shape[-2:] if inputs and isinstance(inputs[0], Tensor) else None
    for feature, value in outputs.items():
        # A map that is not declared is one that nobody asks for.
        if feature not in declared:
            continue
        if problem := _difference(declared[feature], value, image_size):
            raise OutputShapeError(f"{name}.output_shape declares {feature!r} with {problem}")


def _difference(declared: ShapeSpec, value: Tensor, image_size: torch.Size | None) -> str:
    """Return how a feature differs from its declaration; empty if it does not."""
    shape = tuple(value.shape)
    if declared.channels is not None and shape[1] != declared.channels:
        return f"{declared.channels} channels, forward returns {shape[1]}: shape {shape}"
    if not declared.stride or image_size is None:
        return ""
    if len(shape) != 4:
        return f"stride {declared.stride}, forward returns no map (N, C, H, W): shape {shape}"
    found, is_other = set(), False
    for side, image_side in zip(shape[2:], image_size, strict=True):
        # One cell more or less is rounding, or a convolution without padding.
        is_other = is_other or abs(side - image_side / declared.stride) > 1
        found.add(image_side / max(side, 1))
    if not is_other:
        return ""
    strides = " and ".join(f"{stride:g}" for stride in sorted(found))
    return (
        f"stride {declared.stride}, forward returns stride {strides}: a map of"
        f" {shape[2]}x{shape[3]} for an image of {image_size[0]}x{image_size[1]}"
    )
