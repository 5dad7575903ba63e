"""The graph of a detector: what `torch.export` records of it, with tensors in and out.

Legend: N images, C channels, H x W pixels of the input, D detections per image, R detections over
    the batch.
"""

import contextlib
import copy
import io
import os
from collections.abc import Iterator
from pathlib import Path
from traceback import extract_tb
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import UserError as RecordingError
from torch.fx.experimental import _config as _symbols
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._pytree import tree_unflatten
from torch.utils._sympy.value_ranges import ValueRanges

from detkit.layers import Conv2d, DeformConv, ModulatedDeformConv
from detkit.layers.conv import fold
from detkit.layers.norm import fixed_norm
from detkit.modeling import GeneralizedRCNN, PanopticFPN, ProposalNetwork, SemanticSegmentor
from detkit.modeling.meta_arch.dense_detector import DenseDetector
from detkit.structures import ImageList, Instances, RowImages, paste_masks_in_image
from detkit.structures.image_list import padded_size
from detkit.utils.errors import UserError
from detkit.utils.overriding import is_overridden

# Methods of a model that the graph does not call: it has tensors where they have lists.
_NOT_CALLED = (
    "forward",
    "inference",
    "preprocess_image",
    "_postprocess",
    "_decode_per_level_predictions",
)


class ExportError(UserError, RuntimeError):
    """A model that a format cannot hold."""


class DetectorGraph(nn.Module):
    """A detector as a function of tensors: normalise, pad, detect, and fill rows up to D.

    It calls the parts of the model as `inference` does, with lists of one element that stand for
    the whole batch; see `detkit.structures.batch_boxes`.
    """

    def __init__(self, model: nn.Module, max_detections: int, paste: bool = False) -> None:
        """Take a copy of the model, with norms folded into convolutions.

        Args:
            model: A `Detector` in eval mode, on the CPU.
            max_detections: D
            paste: Whether masks cover the image instead of their box.

        Raises:
            ExportError: The model has steps of its own that the graph would leave out.
        """
        super().__init__()
        _check_steps(model)
        self.model: Any = copy.deepcopy(model).requires_grad_(False)
        # RoIAlign on channels-last maps is slow in an exported program.
        self.model.to(memory_format=torch.contiguous_format)
        self.model.batch_in(torch.contiguous_format)
        fold_norms(self.model)
        self.max_detections = max_detections
        self.paste = paste

    def forward(self, images: Tensor, image_sizes: Tensor) -> dict[str, Tensor]:
        """Return the outputs by name; see `docs/deploy.md`.

        Args:
            images: (N, C, H, W), each in its top left corner.
            image_sizes: (N, 2) int64 height and width of each.
        """
        batch = self.preprocess(images, image_sizes)
        model = self.model
        if isinstance(model, DenseDetector):
            features = model._head_features(batch)
            found = model.forward_inference(batch, features, model.head(features))
            return self._instances(found[0], images)
        features = model.backbone(batch.tensor)
        if isinstance(model, ProposalNetwork):
            proposals, _ = model.proposal_generator(batch, features, None)
            return self._instances(proposals[0], images)
        outputs: dict[str, Tensor] = {}
        if isinstance(model, GeneralizedRCNN):
            outputs = self._instances(model.find_instances(batch, features, [])[0], images)
        if isinstance(model, (PanopticFPN, SemanticSegmentor)):
            scores, _ = model.sem_seg_head(features, None)
            outputs["sem_seg"] = scores[:, :, : images.shape[2], : images.shape[3]]
        return outputs

    def preprocess(self, images: Tensor, image_sizes: Tensor) -> ImageList:
        """Normalise, clear what lies beside the images, and pad as the backbone needs."""
        model = self.model
        height, width = images.shape[2:]
        x = (images - model.pixel_mean).div_(model.pixel_std)
        is_row = torch.arange(height) < image_sizes[:, :1]
        is_column = torch.arange(width) < image_sizes[:, 1:]
        x = x.masked_fill(~(is_row[:, None, :, None] & is_column[:, None, None, :]), 0.0)
        backbone = model.backbone
        padded = padded_size(
            [(height, width)], backbone.size_divisibility, backbone.padding_constraints
        )
        x = F.pad(x, [0, padded[1] - width, 0, padded[0] - height])
        return ImageList(x, image_sizes)

    def _instances(self, found: Instances, batch: Tensor) -> dict[str, Tensor]:
        """Return the fields of the R detections as tables of D rows per image."""
        images: Any = found.image_size
        counts, place = _places(images, self.max_detections)
        num_rows = counts.shape[0] * self.max_detections

        def table(values: Tensor) -> Tensor:
            rows = values.new_zeros(num_rows, *values.shape[1:]).index_copy(0, place, values)
            return rows.unflatten(0, (counts.shape[0], self.max_detections))

        if found.has("proposal_boxes"):
            boxes, scores = found.proposal_boxes, found.objectness_logits
            outputs = {"boxes": table(boxes.tensor), "scores": table(scores)}
            return {**outputs, "num_detections": counts}
        # Those of dense detectors may reach beyond the image.
        found.pred_boxes.clip(())
        outputs = {
            "boxes": table(found.pred_boxes.tensor),
            "scores": table(found.scores),
            "classes": table(found.pred_classes),
            "num_detections": counts,
        }
        if found.has("pred_masks"):
            masks = found.pred_masks[:, 0]
            if self.paste:
                size = (batch.shape[2], batch.shape[3])
                masks = paste_masks_in_image(masks, found.pred_boxes, size).byte()
            outputs["masks"] = table(masks).bool() if self.paste else table(masks)
        if found.has("pred_keypoints"):
            outputs["keypoints"] = table(found.pred_keypoints)
        return outputs


def _check_steps(model: nn.Module) -> None:
    name = type(model).__name__
    bases = (GeneralizedRCNN, DenseDetector, ProposalNetwork, SemanticSegmentor)
    if not isinstance(model, bases):
        known = ", ".join(base.__name__ for base in bases)
        raise ExportError(f"{name} cannot be exported: it must be one of {known}, or a subclass")
    for step in _NOT_CALLED:
        if hasattr(model, step) and is_overridden(getattr(model, step)):
            raise ExportError(
                f"{name}.{step} is not called in an exported graph, which works on tensors of the"
                " whole batch: do its work in a part of the model (backbone, head), or after the"
                " file, and export the model without it"
            )


def _places(images: RowImages, max_detections: int) -> tuple[Tensor, Tensor]:
    """Return how many rows each image has, (N,), and the row of each in tables of D, (R,).

    Args:
        images: Those of R rows, rising.
        max_detections: D
    """
    is_of_image = images.index == torch.arange(images.sizes.shape[0])[:, None]
    counts = is_of_image.sum(dim=1)
    starts = counts.cumsum(0) - counts
    rank = torch.arange(images.index.shape[0]) - starts[images.index]
    return counts, images.index * max_detections + rank


def fold_norms(model: nn.Module) -> None:
    """Fold norms with fixed statistics into the convolutions before them, in place."""
    layer: Any
    for layer in model.modules():
        is_known = type(layer) in (Conv2d, DeformConv, ModulatedDeformConv)
        norm = fixed_norm(layer.norm) if is_known else None
        if norm is None or getattr(layer, "is_standardized", False):
            continue
        weight, bias = fold(layer.weight, layer.bias, norm)
        layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
        layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        layer.norm = None


# Images that features are computed of where they depend on the size in ways that torch cannot prove
# to be none: of less than a cell, between, and of several windows. (batch, height, width)
_TRIED_SIZES = ((1, 9, 7), (3, 70, 130), (1, 200, 300), (2, 500, 290))


def exported_program(
    graph: DetectorGraph, input_dtype: torch.dtype
) -> torch.export.ExportedProgram:
    """Record the graph, for any number of images of any size.

    Raises:
        ExportError: A module cannot be recorded, or computes otherwise for some sizes.
    """
    with torch.no_grad(), _naming_the_module(graph.model):
        features = _Features(graph)
        try:
            _recorded(features, graph, input_dtype)
        except RecordingError as error:
            if not str(error).startswith("Constraints violated"):
                raise
        else:
            return _recorded(graph, graph, input_dtype)
        program = _recorded(features, graph, input_dtype, is_proven=False)
        _check_sizes(features, program, input_dtype)
        return _recorded(graph, graph, input_dtype, is_proven=False)


class _Features(nn.Module):
    """The maps of the backbone."""

    def __init__(self, graph: DetectorGraph) -> None:
        super().__init__()
        # Not as `graph`, which is what torch calls its own.
        self.detector = graph

    def forward(self, images: Tensor, image_sizes: Tensor) -> dict[str, Tensor]:
        """Return the maps by name; see `DetectorGraph.forward`."""
        batch = self.detector.preprocess(images, image_sizes)
        return self.detector.model.backbone(batch.tensor)


def _recorded(
    module: nn.Module, graph: DetectorGraph, input_dtype: torch.dtype, is_proven: bool = True
) -> torch.export.ExportedProgram:
    """Record a module; if `is_proven`, torch refuses one that branches on a size."""
    channels, square = len(graph.model.pixel_mean), _square_size(graph)
    # Nothing is computed. The smallest of the maps must have more than one cell: export takes a
    # size of 1 for fixed.
    height, width = (square - 9, square - 17) if square else (1001, 1303)
    images = torch.zeros(2, channels, height, width, dtype=input_dtype)
    sizes = torch.tensor([[height, width], [height - 1, width - 1]])
    dim = torch.export.Dim
    most = square or None
    batch: Any = dim("batch", min=1)
    sides: dict[int, Any] = {
        2: dim("height", min=1, max=most),
        3: dim("width", min=1, max=most),
    }
    if not is_proven:
        batch = dim.DYNAMIC(min=1)
        sides = dict.fromkeys(sides, dim.DYNAMIC(min=1, max=most))
    # Otherwise export makes cases of dimensions of one, such as that of a batch of one image.
    oblivious = _symbols.patch(  # pyright: ignore[reportAttributeAccessIssue]
        backed_size_oblivious=True
    )
    # Of what it cannot record, torch prints all that went before.
    with oblivious, contextlib.redirect_stderr(io.StringIO()):
        program = torch.export.export(
            module,
            (images, sizes),
            dynamic_shapes={"images": {0: batch, **sides}, "image_sizes": {0: batch}},
            strict=False,
        )
    if not is_proven:
        # Of a branch on whether a map has one cell, torch makes a least size, whatever it leads to.
        for symbol, range_ in program.range_constraints.items():
            if str(symbol).startswith("s"):  # sizes of inputs; others begin with "u"
                program.range_constraints[symbol] = ValueRanges(1, range_.upper)
    return program


def _square_size(graph: DetectorGraph) -> int:
    return graph.model.backbone.padding_constraints.get("square_size", 0)


def _check_sizes(
    features: _Features, program: torch.export.ExportedProgram, input_dtype: torch.dtype
) -> None:
    """Check that what was recorded of one size is what the backbone computes of others."""
    model, square = features.detector.model, _square_size(features.detector)
    module = program.module(check_guards=False)
    generator = torch.Generator().manual_seed(0)
    for batch, *size in _TRIED_SIZES:
        height, width = (min(side, square or side) for side in size)
        shape = (batch, len(model.pixel_mean), height, width)
        images = torch.randint(0, 256, shape, generator=generator).to(input_dtype)
        sizes = torch.tensor([[height, width]] * batch)
        try:
            expected = features(images, sizes)
        except Exception:  # the backbone itself takes no such images
            continue
        reason = None
        try:
            found = module(images, sizes)
        except Exception as error:  # torch has many kinds
            found, reason = {}, error
        if not all(_is_like(found.get(name), values) for name, values in expected.items()):
            raise ExportError(
                f"backbone ({type(model.backbone).__name__}) cannot be exported for images of all"
                " sizes: what it computes depends on the size, as with windows that are larger"
                f" than the map (seen for {height} x {width}). Images that are padded to a square"
                " of one size can be: MODEL.FPN.SQUARE_PAD"
            ) from reason


def _is_like(found: Tensor | None, expected: Tensor) -> bool:
    tolerance = 1e-3 * float(expected.abs().max())
    return (
        found is not None
        and found.shape == expected.shape
        and torch.allclose(found, expected, rtol=0, atol=tolerance)
    )


@contextlib.contextmanager
def _naming_the_module(model: nn.Module) -> Iterator[None]:
    """Turn an error into one that names the module whose forward raised it."""
    names = {module: name for name, module in model.named_modules()}
    entered: list[nn.Module] = []

    def enter(module: nn.Module, *_: Any) -> None:
        entered.append(module)

    def leave(*_: Any) -> None:
        entered.pop()

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # torch.export has many kinds
        module = next((m for m in reversed(entered) if names.get(m)), model)
        lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        # Of violated constraints, the first line says nothing.
        reason = next((line.strip(" -") for line in lines if line.startswith("  - ")), lines[0])
        if "specialized integer" in reason:
            reason = "how many objects there are is not known here; write x.shape[0] for len(x)"
        raise ExportError(
            f"{names.get(module) or 'the model'} ({type(module).__name__}) cannot be exported:"
            f" {reason[:500]}{_place_of(error)}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def _place_of(error: Exception) -> str:
    """Return the line outside of torch in which an error was raised, in brackets."""
    torch_folder = str(Path(torch.__file__).parent) + os.sep
    for frame in reversed(extract_tb(error.__traceback__)):
        if not frame.filename.startswith(torch_folder) and frame.name != "__len__":
            return f" ({frame.filename}:{frame.lineno}: {frame.line})"
    return ""


def output_names(program: torch.export.ExportedProgram) -> list[str]:
    """Return the names of the outputs, in the order in which the formats have them."""
    spec = program.call_spec.out_spec
    assert spec is not None
    return list(tree_unflatten(range(spec.num_leaves), spec))
