"""The formats of exported models: how each is written, from the graph that torch has recorded."""

import ast
import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from traceback import walk_tb
from typing import Any

import torch
from torch.export import ExportedProgram

from detkit.export.graph import ExportError
from detkit.export.runtime.model_file import KEY, PRECISION_KEY
from detkit.layers.nms import nms_mask_by_offsets
from detkit.utils.errors import MissingPackageError

# Format -> the packages that write it, and the extra that installs them.
FORMATS: dict[str, tuple[tuple[str, ...], str]] = {
    "onnx": (("onnx", "onnxscript"), "onnx"),
    "torch_export": ((), ""),
    "openvino": (("onnx", "onnxscript", "openvino"), "onnx,openvino"),
}
# The first with RoIAlign as of 16, and DeformConv of 19.
_OPSET = 20
# Operator of ONNX that OpenVINO lacks -> the key that asks for it.
_KEYS = {"DeformConv": "MODEL.RESNETS.DEFORM_ON_PER_STAGE"}


def require(package: str, extra: str) -> Any:
    """Import an optional package.

    Raises:
        MissingPackageError: It is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingPackageError(
            f"the export needs {package.partition('.')[0]}, which is not installed: pip install"
            f" 'detkit-vision[{extra}]'"
        ) from error


def write_formats(
    program: ExportedProgram, metadata: Mapping[str, Any], formats: Sequence[str], folder: Path
) -> list[Path]:
    """Write the model in each format, and return the file of each to open.

    Args:
        program: The recorded graph; not to be used again, since conversion to ONNX changes it.
        metadata: What the files say of themselves.
        formats: Some of `FORMATS`.
        folder: It exists. Files of these names are replaced once all are complete.
    """
    written: dict[str, Path] = {}
    with complete_files(folder) as scratch:
        if "torch_export" in formats:
            written["torch_export"] = _write_torch_export(program, metadata, scratch)
        if "onnx" in formats or "openvino" in formats:
            written["onnx"] = _write_onnx(program, metadata, scratch)
        if "openvino" in formats:
            written["openvino"] = write_openvino(written["onnx"], metadata, scratch)
        if "onnx" not in formats and "onnx" in written:
            written["onnx"].unlink()
    return [folder / written[name].name for name in formats]


@contextmanager
def complete_files(folder: Path) -> Iterator[Path]:
    """Give a folder whose files move into `folder` at the end of the block, unless it fails."""
    with TemporaryDirectory(prefix=".detkit-", dir=folder) as scratch:
        yield Path(scratch)
        for file in sorted(Path(scratch).iterdir()):
            file.replace(folder / file.name)


def _write_torch_export(
    program: ExportedProgram, metadata: Mapping[str, Any], folder: Path
) -> Path:
    """Write `model.pt2`, which `torch.export.load` reads after `import torchvision`.

    Its guards know only batches and maps of more than one: `program.module(check_guards=False)`.
    """
    # The operator of detkit is replaced, so that the file does not need it.
    with warnings.catch_warnings():
        # Torchvision's description of its operators has an old name of torch's.
        warnings.simplefilter("ignore", FutureWarning)
        plain = program.run_decompositions({torch.ops.detkit.nms_mask.default: nms_mask_by_offsets})
    path = folder / "model.pt2"
    torch.export.save(plain, path, extra_files={f"{KEY}.json": json.dumps(metadata)})
    return path


def _write_onnx(program: ExportedProgram, metadata: Mapping[str, Any], folder: Path) -> Path:
    """Write `model.onnx`, with its metadata in `metadata_props`."""
    path = folder / "model.onnx"
    onnx_program = _onnx_program(program, metadata)
    onnx_program.model.metadata_props[KEY] = json.dumps(metadata)
    # In one file: weights of up to 2 GB fit.
    onnx_program.save(path, external_data=False)
    return path


def _onnx_program(program: ExportedProgram, metadata: Mapping[str, Any]) -> Any:
    # It warns of empty lists in torch's own functions.
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    try:
        return torch.onnx.export(
            program,
            dynamo=True,
            opset_version=_OPSET,
            input_names=["images", "image_sizes"],
            output_names=metadata["outputs"],
            custom_translation_table={
                torch.ops.detkit.nms_mask.default: _onnx_nms_mask,
                torch.ops.aten.sort.stable: _onnx_sort,
            },
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        missing = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(error))
        if missing is None:
            raise
        raise ExportError(
            f"{_module_of(error)}: ONNX has no counterpart of its operator {missing[1]}"
        ) from error


def _module_of(error: BaseException) -> str:
    """Return the name of the module of the model whose operator torch cannot convert to ONNX."""
    cause: BaseException | None = error
    while cause is not None:
        # The message names a node of torch's own graph, in which operators are in parts.
        for frame, _ in walk_tb(cause.__traceback__):
            node = frame.f_locals.get("node")
            if isinstance(node, torch.fx.Node):
                return _innermost(name for name, _ in node.meta.get("nn_module_stack", {}).values())
        cause = cause.__cause__
    return "the model"


def _innermost(modules: Iterable[str]) -> str:
    """Return the last of the modules that an operator lies in, by its name in the model."""
    # The graph holds the model as `model`.
    named = [name.removeprefix("model.") for name in modules if name not in ("", "model")]
    return named[-1] if named else "the model"


def _onnx_sort(x: Any, *, stable: bool = False, dim: int = -1, descending: bool = False) -> Any:
    """Return the values of `x` along a dimension in order, and their indices."""
    op: Any = require("onnxscript", "onnx").opset20

    # Of equal values, the first is the first in the result.
    length = op.Gather(op.Shape(x), op.Constant(value_ints=[dim]))
    return op.TopK(x, length, axis=dim, largest=int(descending), sorted=1)


def _onnx_nms_mask(boxes: Any, scores: Any, groups: Any, iou_threshold: float) -> Any:
    """Return `nms_mask`: suppression in a table with a row per group.

    Offsets that keep groups apart need float64, which NonMaxSuppression does not take.
    """
    op: Any = require("onnxscript", "onnx").opset20

    zero, one = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    count = op.Shape(scores)
    by_group, order = op.TopK(groups, count, axis=0, largest=0, sorted=1)
    # There is one entry more than boxes, at `count`, so that nothing is empty.
    num_groups = op.ReduceMax(op.Concat(groups, zero, axis=0), keepdims=1) + one
    no_sizes = op.Expand(zero, num_groups)
    ones = op.Expand(one, count)
    sizes = op.ScatterElements(no_sizes, groups, ones, axis=0, reduction="add")
    width = op.ReduceMax(sizes, keepdims=1) + one
    starts = op.CumSum(sizes, op.Constant(value_int=0), exclusive=1)
    positions = op.Range(
        op.Constant(value_int=0), op.Squeeze(count, zero), op.Constant(value_int=1)
    )
    places = by_group * width + positions - op.Gather(starts, by_group)
    flat_table = op.ScatterElements(op.Expand(count, num_groups * width), places, order, axis=0)
    table = op.Reshape(flat_table, op.Concat(num_groups, width, axis=0))
    no_box = op.CastLike(op.ConstantOfShape(op.Constant(value_ints=[1, 4])), boxes)
    lowest = op.CastLike(op.Constant(value_floats=[torch.finfo(torch.float32).min]), scores)
    selected = op.NonMaxSuppression(
        op.Gather(op.Concat(boxes, no_box, axis=0), table),
        op.Unsqueeze(op.Gather(op.Concat(scores, lowest, axis=0), table), one),
        width,
        op.Constant(value_floats=[float(iou_threshold)]),
        # Scores must be above it.
        op.Constant(value_floats=[torch.finfo(torch.float32).min]),
    )
    # Rows of `selected` are (row, 0, column).
    index = op.GatherND(table, op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1))
    stays = op.ScatterElements(
        op.Expand(zero, count + one), index, op.Expand(one, op.Shape(index)), axis=0
    )
    return op.Cast(op.Slice(stays, zero, count, zero), to=9)


def write_openvino(onnx_file: Path, metadata: Mapping[str, Any], folder: Path) -> Path:
    """Write an ONNX file in OpenVINO's format, an `.xml` and a `.bin`, and return the `.xml`.

    Raises:
        ExportError: OpenVINO lacks an operator of the file.
    """
    openvino = require("openvino", "openvino")
    # Where it fails, it leaves the root logger at ERROR, with a handler and a filter of its own.
    root = logging.getLogger()
    before = root.level, root.handlers[:], root.filters[:]
    try:
        model = openvino.convert_model(onnx_file)
    except require("openvino.frontend", "openvino").OpConversionFailure as error:
        missing = re.search(r"No conversion rule found for operations: (\w+)-\d+", str(error))
        if missing is None:
            raise
        operator = missing[1]
        of_key = f" ({_KEYS[operator]})" if operator in _KEYS else ""
        raise ExportError(
            f"{_onnx_module_with(onnx_file, operator)}: OpenVINO has no counterpart of ONNX's"
            f" operator {operator}{of_key}; the formats onnx and torch_export have it"
        ) from error
    finally:
        root.setLevel(before[0])
        root.handlers[:], root.filters[:] = before[1:]
    _keep_antialiasing(model)
    model.set_rt_info(json.dumps(metadata), [KEY])
    if metadata["precision"] == "bfloat16":
        model.set_rt_info("bf16", list(PRECISION_KEY))
    path = folder / f"{onnx_file.stem}.xml"
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


def _keep_antialiasing(model: Any) -> None:
    """Let a model of OpenVINO resize with antialiasing where ONNX does.

    Its modes of ONNX's names read the attribute and ignore it; those of Pillow's numbers have it.
    """
    modes = {"cubic": "bicubic_pillow", "linear_onnx": "bilinear_pillow"}
    for node in model.get_ops():
        if node.get_type_name() == "Interpolate":
            attributes = node.get_attributes()
            if attributes["antialias"] and attributes["mode"] in modes:
                node.set_attribute("mode", modes[attributes["mode"]])


def _onnx_module_with(onnx_file: Path, operator: str) -> str:
    """Return the name of the module of the model that a file of torch calls an operator in."""
    for node in require("onnx", "onnx").load(onnx_file, load_external_data=False).graph.node:
        if node.op_type == operator:
            # torch writes a list in Python's syntax: '', names of modules, and that of the call.
            notes = {entry.key: entry.value for entry in node.metadata_props}
            return _innermost(ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))[:-1])
    return "the model"
