"""int8 copies of exported ONNX files, calibrated with images.

Source: Jacob et al. 2018, arXiv 1712.05877; the steps are those of `onnxruntime.quantization`.
"""

import json
import logging
from collections.abc import Iterable, Iterator
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


# More images widen the ranges by single outliers, and take longer.
_NUM_IMAGES = 32


def write_int8(path: Path, formats: Iterable[str], images: Iterable[np.ndarray]) -> list[Path]:
    """Write int8 copies of an ONNX file beside it, `model_int8.onnx` and `model_int8.xml`.

    Args:
        path: A file that `detkit export` wrote.
        formats: "onnx", "openvino" or both, which runs the same ranges.
        images: See `quantize_onnx`.

    Returns:
        The files, in the order of the formats.

    Raises:
        ConfigError: There are no images, or a format is another one.
        MissingPackageError: A library is not installed.
    """
    formats = list(formats)
    unknown = [name for name in formats if name not in ("onnx", "openvino")]
    if unknown:
        raise ConfigError(f"--int8: {unknown[0]} has no int8, only onnx and openvino")
    with complete_files(path.parent) as scratch:
        written = {"onnx": scratch / f"{path.stem}_int8.onnx"}
        document = quantize_onnx(path, written["onnx"], images)
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


def _batches(predictor: ExportedPredictor, images: Iterable[np.ndarray]) -> Iterator[Arrays]:
    """Yield the inputs of the graph for one image after the other."""
    count = 0
    for image in images:
        count += 1
        yield predictor.inputs_of([image])
    if count == 0:
        raise ConfigError("--calibrate: the data set has no images")
    logger.info("int8: ranges of activations taken on %d images", count)
