"""Copies of exported ONNX files that compute in fewer bits: int8, float16, bfloat16.

Source of int8: Jacob et al. 2018, arXiv 1712.05877; the steps are those of
`onnxruntime.quantization`.
"""

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from detkit.config import CfgNode
from detkit.data import DatasetCatalog
from detkit.export.formats import complete_files, require, write_openvino
from detkit.export.runtime import ExportedPredictor
from detkit.export.runtime.model_file import KEY, Arrays
from detkit.utils.errors import ConfigError
from detkit.utils.image import read_image

logger = logging.getLogger(__name__)

# What the time goes into. Boxes are computed from the outputs of these in floating point.
_OPERATORS = ("Conv", "Gemm", "MatMul")
_OPERATORS_IN_HALF = (*_OPERATORS, "ConvTranspose")
# In float16 where all that they take is.
_BETWEEN = ("Add", "MaxPool", "Relu")


# More images widen the ranges by single outliers, and take longer.
_NUM_IMAGES = 32


# Option -> the precision in the metadata, and the formats whose runtimes have it.
PRECISIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "int8": ("int8", ("onnx", "openvino")),
    "fp16": ("float16", ("onnx", "openvino")),
    "bf16": ("bfloat16", ("openvino",)),
}


def check_copies(option: str, formats: Sequence[str]) -> list[str]:
    """Return those of the formats that have a precision; see `write_copies`.

    Raises:
        ConfigError: None of them has, or model.onnx is not among them, which copies start from.
    """
    having = [name for name in formats if name in PRECISIONS[option][1]]
    if not having:
        known = ", ".join(f"--{o} of {' and '.join(n)}" for o, (_, n) in PRECISIONS.items())
        raise ConfigError(f"--{option}: {' and '.join(formats)} cannot do that; there is {known}")
    if "onnx" not in formats:
        raise ConfigError(f"--{option} makes copies of model.onnx: add --format onnx")
    return having


def write_copies(
    path: Path, option: str, formats: Sequence[str], images: Iterable[np.ndarray] = ()
) -> list[Path]:
    """Write copies of an ONNX file beside it, such as `model_fp16.onnx` and `model_fp16.xml`.

    Args:
        path: A file that `detkit export` wrote.
        option: One of `PRECISIONS`.
        formats: Those of the copies, among the ones that have the precision.
        images: For int8, see `quantize_onnx`.

    Returns:
        The files, in the order of the formats.

    Raises:
        ConfigError: There are no images.
        MissingPackageError: A library is not installed.
    """
    with complete_files(path.parent) as scratch:
        written = {"onnx": scratch / f"{path.stem}_{option}.onnx"}
        if option == "int8":
            document = quantize_onnx(path, written["onnx"], images)
        elif option == "fp16":
            document = halve_onnx(path, written["onnx"])
        else:
            # OpenVINO computes a graph of float32 in what the file asks for.
            shutil.copyfile(path, written["onnx"])
            document = {**ExportedPredictor(path).metadata.document, "precision": "bfloat16"}
        if "openvino" in formats:
            written["openvino"] = write_openvino(written["onnx"], document, scratch)
        if "onnx" not in formats:
            written["onnx"].unlink()
    return [path.with_name(written[name].name) for name in formats]


def calibration_images(cfg: CfgNode, dataset_name: str) -> Iterator[np.ndarray]:
    """Return up to 32 images from all over a data set, as the predictor takes them."""
    records = DatasetCatalog.get(dataset_name)
    order = "BGR" if cfg.INPUT.FORMAT == "RGB" else cfg.INPUT.FORMAT
    chosen = records[:: max(1, len(records) // _NUM_IMAGES)][:_NUM_IMAGES]
    most = cfg.INPUT.MAX_IMAGE_PIXELS
    return (read_image(record["file_name"], order, max_pixels=most) for record in chosen)


def quantize_onnx(path: Path, output: Path, images: Iterable[np.ndarray]) -> dict[str, Any]:
    """Write a copy of an ONNX file whose convolutions and matrix products run in int8.

    Weights get a scale per channel, activations one per tensor: the range that they take on the
    images.

    Args:
        path: A file that `detkit export` wrote.
        output: The file to write.
        images: As `ExportedPredictor` takes them; some ten to a hundred, like those to come.

    Returns:
        The metadata of the copy.

    Raises:
        ConfigError: There are no images.
        MissingPackageError: onnx or onnxruntime is not installed.
    """
    onnx = require("onnx", "onnx")
    quantization = require("onnxruntime.quantization", "onnx")
    shape_inference = require("onnxruntime.quantization.shape_inference", "onnx")
    predictor = ExportedPredictor(path)

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = _batches(predictor, images)

        def get_next(self) -> Arrays | None:
            return next(self._batches, None)

    with TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        # Constants are folded first, so that weights are seen as weights. Shapes of detections are
        # known at run time only, and symbolic inference stumbles over them.
        shape_inference.quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            output,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(_OPERATORS),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
    model = onnx.load(output)
    document = {**predictor.metadata.document, "precision": "int8"}
    onnx.helper.set_model_props(model, {KEY: json.dumps(document)})
    onnx.save(model, output)
    return document


def halve_onnx(path: Path, output: Path) -> dict[str, Any]:
    """Write a copy of an ONNX file whose convolutions and matrix products run in float16.

    Inputs, outputs and all else stay in float32. That is why the steps are here: the conversion of
    onnxruntime rounds what passes between operators that it leaves in float32, such as boxes.

    Args:
        path: A file that `detkit export` wrote.
        output: The file to write.

    Returns:
        The metadata of the copy.

    Raises:
        MissingPackageError: onnx or onnxruntime is not installed.
    """
    onnx = require("onnx", "onnx")
    document = {**ExportedPredictor(path).metadata.document, "precision": "float16"}
    model = onnx.load(path)
    graph = model.graph
    nodes, initializers = list(graph.node), list(graph.initializer)
    weights = {x.name: x for x in initializers if x.data_type == onnx.TensorProto.FLOAT}
    halves: dict[str, str] = {}  # of a value in float32, the name of the same in float16
    only_half: set[str] = set()  # values that no operator has made in float32 yet
    del graph.node[:]

    def cast(source: str, target: str, dtype: int) -> None:
        graph.node.append(onnx.helper.make_node("Cast", [source], [target], to=dtype))

    for node in nodes:
        is_half = node.op_type in _OPERATORS_IN_HALF or (
            node.op_type in _BETWEEN and only_half.issuperset(node.input)
        )
        for i, name in enumerate(node.input):
            if not is_half and name in only_half:
                cast(halves[name], name, onnx.TensorProto.FLOAT)
                only_half.remove(name)
            elif is_half and name:
                if name not in halves:
                    halves[name] = f"{name}_float16"
                    if name in weights:
                        half = onnx.numpy_helper.to_array(weights[name]).astype(np.float16)
                        initializers.append(onnx.numpy_helper.from_array(half, halves[name]))
                    else:
                        cast(name, halves[name], onnx.TensorProto.FLOAT16)
                node.input[i] = halves[name]
        if is_half:
            halves |= {name: f"{name}_float16" for name in node.output}
            only_half.update(node.output)
            node.output[:] = [halves[name] for name in node.output]
        graph.node.append(node)
    for value in graph.output:
        if value.name in only_half:
            cast(halves[value.name], value.name, onnx.TensorProto.FLOAT)
    used = {name for node in graph.node for name in node.input}
    del graph.initializer[:]
    graph.initializer.extend(x for x in initializers if x.name in used)
    onnx.helper.set_model_props(model, {KEY: json.dumps(document)})
    onnx.save(model, output)
    return document


def _batches(predictor: ExportedPredictor, images: Iterable[np.ndarray]) -> Iterator[Arrays]:
    """Yield the inputs of the graph for one image after the other."""
    count = 0
    for image in images:
        count += 1
        yield predictor.inputs_of([image])
    if count == 0:
        raise ConfigError("--calibrate: the data set has no images")
    logger.info("int8: ranges of activations taken on %d images", count)
