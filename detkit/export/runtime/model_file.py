"""Exported model files: what they say of themselves, checked, and the library that runs them.

A file may come from anywhere: nothing in it is believed before it is checked, and nothing in its
metadata is run.

Legend: N images, C channels, H x W pixels.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from detkit.utils.errors import MissingFileError, MissingPackageError, UserError
from detkit.utils.text import printable

FORMAT = 1
"""Version of the metadata that this code reads."""
KEY = "detkit"
"""Name of the metadata in a file."""
PRECISION_KEY = ("runtime_options", "INFERENCE_PRECISION_HINT")
"""Where a file of OpenVINO says what it is to be computed in."""
ENDINGS = (".onnx", ".xml")
"""Of the files that can be run: ONNX, and OpenVINO's, which has a `.bin` beside it."""
WRITTEN_ENDINGS = (*ENDINGS, ".pt2")
"""Of all files that `detkit export` writes; torch runs the last."""
OUTPUTS = (
    "boxes", "scores", "classes", "num_detections", "masks", "keypoints", "sem_seg",
)  # fmt: skip
"""Names of what a model may return."""
MAX_DETECTIONS = 10_000
"""Objects per image that a file may ask for: each may be a mask of the whole image."""

_MAX_CHARACTERS = 16_000_000  # a hundred thousand class names
_MAX_NAMES = 100_000
_MAX_NAME = 1000
_MAX_SIDE = 100_000

Arrays = dict[str, np.ndarray]
"""Name of an input or an output -> array."""


class ModelFileError(UserError, ValueError):
    """A file that is no exported model, or one that cannot be run."""


@dataclass(frozen=True)
class ModelMetadata:
    """What an exported model says of itself; names and colours as in `detkit.data.Metadata`."""

    architecture: str
    outputs: tuple[str, ...]
    input_format: str
    """Order of the channels, as INPUT.FORMAT."""
    channels: int
    dtype: str
    """Of the pixels that the model takes: "uint8" or "float32"."""
    resize_rule: str
    """INPUT.RESIZE: "detectron2" or "torchvision"."""
    min_size: int
    max_size: int
    max_detections: int = MAX_DETECTIONS
    """Rows of an image in the outputs are at most as many."""
    score_threshold: float = 0.0
    """Score below which the model returns nothing."""
    mask_threshold: float = 0.5
    mask_pasted: bool = False
    panoptic: Mapping[str, float] | None = None
    """`overlap_threshold`, `stuff_area_limit` and `instances_score_threshold` of the merging."""
    thing_classes: tuple[str, ...] = ()
    stuff_classes: tuple[str, ...] = ()
    thing_colors: tuple[tuple[float, ...], ...] = ()
    stuff_colors: tuple[tuple[float, ...], ...] = ()
    keypoint_names: tuple[str, ...] = ()
    keypoint_connection_rules: tuple[tuple[str, str, tuple[float, ...]], ...] = ()
    ignore_label: int = 255
    document: Mapping[str, Any] = field(default_factory=dict)
    """All of it, also what is not checked: versions, the hash of the weights, ..."""


def read_metadata(text: str, path: str) -> ModelMetadata:
    """Read and check the metadata of a model.

    Args:
        text: JSON.
        path: Of the file, for messages.

    Raises:
        ModelFileError: It is not what `detkit export` writes; the message names the entry.
    """
    if len(text) > _MAX_CHARACTERS:
        raise ModelFileError(f"{path}: its metadata has {len(text)} characters, which is too many")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: its metadata is no JSON: {error}") from error
    root = _Entries(document, "", path)
    version = root.integer("format", 0, _MAX_SIDE)
    if version != FORMAT:
        raise ModelFileError(
            f"{path} has metadata of version {version}, this detkit reads version {FORMAT}: export"
            " the model again, or use the detkit that wrote it"
        )
    image, resize = root.section("input"), root.section("resize")
    outputs = root.names("outputs")
    unknown = sorted(set(outputs) - set(OUTPUTS))
    if unknown or not outputs:
        raise root.error("outputs", f"some of {', '.join(OUTPUTS)}")
    for name, needed in _NEEDED.items():
        if name in outputs and not needed <= set(outputs):
            raise root.error("outputs", f"with {', '.join(sorted(needed))} where {name} is")
    merging = None
    if root.get("panoptic") is not None:
        if not {"classes", "masks", "sem_seg"} <= set(outputs):
            raise root.error("outputs", "with classes, masks and sem_seg to be merged")
        entries = root.section("panoptic")
        merging = {
            "overlap_threshold": entries.number("overlap_threshold", 0, 1),
            "stuff_area_limit": entries.number("stuff_area_limit", 0, 2**62),
            "instances_score_threshold": entries.number("instances_score_threshold", 0, 1),
        }
    rule = resize.choice("rule", ("detectron2", "torchvision"))
    dtype = image.choice("dtype", ("uint8", "float32"))
    if rule == "torchvision" and dtype == "uint8":
        raise image.error("dtype", "float32, as the resize of torchvision makes fractions")
    rules = []
    for rule_i in root.sequence("keypoint_connection_rules"):
        if not isinstance(rule_i, list) or len(rule_i) != 3:
            raise root.error("keypoint_connection_rules", "lists of two names and a colour")
        start, end, color = rule_i
        key = "keypoint_connection_rules"
        rules.append((root.name(key, start), root.name(key, end), root.color(key, color)))
    return ModelMetadata(
        architecture=root.name("architecture", root.get("architecture")),
        outputs=outputs,
        input_format=image.choice("format", _INPUT_FORMATS),
        channels=image.integer("channels", 1, 1000),
        dtype=dtype,
        resize_rule=rule,
        min_size=resize.integer("min_size", 0, _MAX_SIDE),
        max_size=resize.integer("max_size", 1, 2**63 - 1),
        max_detections=root.integer("max_detections", 1, MAX_DETECTIONS, MAX_DETECTIONS),
        score_threshold=root.number("score_threshold", 0, 1, 0.0),
        mask_threshold=root.number("mask_threshold", 0, 1, 0.5),
        mask_pasted=root.get("mask_pasted") is True,
        panoptic=merging,
        thing_classes=root.names("thing_classes"),
        stuff_classes=root.names("stuff_classes"),
        thing_colors=root.colors("thing_colors"),
        stuff_colors=root.colors("stuff_colors"),
        keypoint_names=root.names("keypoint_names"),
        keypoint_connection_rules=tuple(rules),
        ignore_label=root.integer("ignore_label", -1, 2**31, 255),
        document=document,
    )


# Output -> those without which it has no meaning.
_NEEDED = {
    "boxes": {"scores", "num_detections"},
    "scores": {"boxes"},
    "classes": {"boxes"},
    "num_detections": {"boxes"},
    "masks": {"boxes"},
    "keypoints": {"boxes"},
}
_INPUT_FORMATS = ("BGR", "RGB", "L", "RGBA", "CMYK", "YCbCr", "HSV", "RAW")


class _Entries:
    """An object of the JSON, with a getter that checks for each kind of value."""

    def __init__(self, values: Any, prefix: str, path: str) -> None:
        self._prefix, self._path = prefix, path
        if not isinstance(values, dict):
            raise self.error("", "an object")
        self._values = values

    def error(self, key: str, wanted: str) -> ModelFileError:
        name = f"{self._prefix}{key}".rstrip(".")
        message = f"{self._path}: its metadata{f', {name!r},' if name else ''} must be {wanted}"
        if key in getattr(self, "_values", ()):
            message += f", is {printable(repr(self._values[key])[:80])}"
        return ModelFileError(message)

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def section(self, key: str) -> "_Entries":
        return _Entries(self.get(key), f"{self._prefix}{key}.", self._path)

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self._values.get(key, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:
            raise self.error(key, f"a number from {low} to {high}")
        return value

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.number(key, low, high, default)
        if not isinstance(value, int):
            raise self.error(key, "a whole number")
        return value

    def choice(self, key: str, choices: Sequence[str]) -> str:
        value = self.get(key)
        if not isinstance(value, str) or value not in choices:
            raise self.error(key, f"one of {', '.join(choices)}")
        return value

    def sequence(self, key: str) -> list[Any]:
        value = self._values.get(key) or []
        if not isinstance(value, list) or len(value) > _MAX_NAMES:
            raise self.error(key, f"a list of at most {_MAX_NAMES}")
        return value

    def name(self, key: str, value: Any) -> str:
        if not isinstance(value, str) or len(value) > _MAX_NAME:
            raise self.error(key, f"text of at most {_MAX_NAME} characters")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        return tuple(self.name(key, value) for value in self.sequence(key))

    def color(self, key: str, value: Any) -> tuple[float, ...]:
        is_color = (
            isinstance(value, list)
            and len(value) == 3
            and all(isinstance(v, (int, float)) and 0 <= v <= 255 for v in value)
        )
        if not is_color:
            raise self.error(key, "colours of three numbers from 0 to 255")
        return tuple(value)

    def colors(self, key: str) -> tuple[tuple[float, ...], ...]:
        return tuple(self.color(key, value) for value in self.sequence(key))


def open_model(
    path: str | os.PathLike[str], num_threads: int | None = None
) -> tuple[ModelMetadata, Callable[[Arrays], Arrays]]:
    """Open an exported model.

    Args:
        path: A `.onnx` file, or the `.xml` of OpenVINO with its `.bin` beside it.
        num_threads: Threads that the model runs in; None for as many as there are cores.

    Returns:
        Its metadata, and a function from inputs to outputs by name.

    Raises:
        MissingFileError: There is no such file.
        MissingPackageError: The library that runs it is not installed.
        ModelFileError: It is no exported model.
    """
    file = Path(path).expanduser()
    if file.suffix.lower() not in ENDINGS:
        hint = ": torch runs that, see docs/deploy.md" if file.suffix == ".pt2" else ""
        raise ModelFileError(
            f"an exported model is a .onnx file, or OpenVINO's .xml; got {file}{hint}"
        )
    if not file.is_file():
        raise MissingFileError(f"no such model file: {file}")
    open_file = _open_onnx if file.suffix.lower() == ".onnx" else _open_openvino
    text, names, run = open_file(str(file), num_threads)
    if text is None:
        raise ModelFileError(
            f"{file} has no metadata of detkit: write it by `detkit export`, as other programs'"
            " files do not tell how images are resized and what the outputs mean"
        )
    metadata = read_metadata(text, str(file))
    missing = sorted(set(metadata.outputs) - set(names))
    if missing:
        raise ModelFileError(
            f"{file}: its metadata names the outputs {', '.join(metadata.outputs)}, but the model"
            f" has no {', '.join(missing)}"
        )
    return metadata, run


def _not_runnable(path: str, library: str, error: Exception | str) -> ModelFileError:
    return ModelFileError(f"{path} is no model that {library} can run: {one_line(error)}")


def one_line(error: Exception | str) -> str:
    """Return the start of a message of onnxruntime or openvino, which may have many lines."""
    return " ".join(str(error).split())[:300]


def _open_onnx(
    path: str, num_threads: int | None
) -> tuple[str | None, list[str], Callable[[Arrays], Arrays]]:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingPackageError(
            f"running {path} needs onnxruntime: pip install 'detkit-vision[onnx]', or onnxruntime"
            " alone"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # without warnings of the optimizer
    options.intra_op_num_threads = num_threads or 0
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    available = onnxruntime.get_available_providers()
    providers = [name for name in wanted if name in available]
    try:
        session = onnxruntime.InferenceSession(path, options, providers=providers)
        text = session.get_modelmeta().custom_metadata_map.get(KEY)
    except Exception as error:  # its own classes, one per status; text that is not UTF-8
        raise _not_runnable(path, "onnxruntime", error) from error
    names = [output.name for output in session.get_outputs()]
    inputs = {i.name for i in session.get_inputs()}

    def run(arrays: Arrays) -> Arrays:
        # An input that the graph does not need may be gone.
        given = {name: array for name, array in arrays.items() if name in inputs}
        found: Any = session.run(None, given)
        return dict(zip(names, found, strict=True))

    return text, names, run


def _open_openvino(
    path: str, num_threads: int | None
) -> tuple[str | None, list[str], Callable[[Arrays], Arrays]]:
    try:
        import openvino
    except ImportError as error:
        raise MissingPackageError(
            f"running {path} needs openvino: pip install 'detkit-vision[openvino]', or openvino"
            " alone"
        ) from error
    core = openvino.Core()
    settings: dict[str, Any] = {}
    if num_threads:
        settings["INFERENCE_NUM_THREADS"] = num_threads
    try:
        with Path(path).open("rb") as file:
            # Otherwise the readers of other programs try, and print what they think of it.
            if b"<net" not in file.read(4096):
                raise _not_runnable(path, "openvino", "it does not start with <net>")
        model = core.read_model(path)
        text = model.get_rt_info([KEY]).astype(str) if model.has_rt_info([KEY]) else None
        # float32 unless the file asks, also where the processor would be faster in bfloat16.
        key = list(PRECISION_KEY)
        in_half = model.has_rt_info(key) and model.get_rt_info(key).astype(str) == "bf16"
        settings["INFERENCE_PRECISION_HINT"] = "bf16" if in_half else "f32"
        compiled = core.compile_model(model, "CPU", settings)
    except (RuntimeError, UnicodeDecodeError) as error:
        raise _not_runnable(path, "openvino", error) from error
    names = [output.get_any_name() for output in compiled.outputs]
    inputs = {name for i in compiled.inputs for name in i.get_names()}

    def run(arrays: Arrays) -> Arrays:
        given = {name: array for name, array in arrays.items() if name in inputs}
        results = compiled(given)
        return {name: results[i] for i, name in enumerate(names)}

    return text, names, run
