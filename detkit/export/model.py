"""From a trained model to files of it."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detkit import __version__
from detkit.config import CfgNode, find_architecture
from detkit.data import Metadata
from detkit.data.transforms.build import resize_rule
from detkit.export.formats import FORMATS, require, write_formats
from detkit.export.graph import DetectorGraph, exported_program, output_names
from detkit.export.runtime.model_file import MAX_DETECTIONS
from detkit.modeling import PanopticFPN, ProposalNetwork
from detkit.utils.errors import ConfigError
from detkit.utils.file_io import PathManager
from detkit.utils.text import did_you_mean

# Of the data set's metadata, what names and draws results.
_COPIED = (
    "thing_classes",
    "stuff_classes",
    "thing_colors",
    "stuff_colors",
    "keypoint_names",
    "keypoint_flip_map",
    "keypoint_connection_rules",
    "ignore_label",
)


def export_model(
    model: nn.Module,
    metadata: Metadata,
    cfg: CfgNode,
    formats: Sequence[str],
    folder: str | Path,
    *,
    input_dtype: str = "",
    paste: bool = False,
) -> list[Path]:
    """Write a trained model as files that other runtimes read.

    Args:
        model: The model, on the CPU.
        metadata: Names of its classes.
        cfg: Its config; MODEL.WEIGHTS has filled it.
        formats: Some of `FORMATS`.
        folder: Where to write; created if needed.
        input_dtype: Of the images, "uint8" or "float32". The default is that of the resize:
            torchvision's gives floats.
        paste: Whether masks cover the image instead of their box.

    Returns:
        The files, one for each format.

    Raises:
        ConfigError: A format is unknown, the config has a part that no format has, or asks for
            more objects than the runtime takes.
        MissingPackageError: A format needs a package that is not installed.
        ExportError: A part of the model cannot be exported; the message names it.
    """
    check_export(cfg, formats)
    is_rpn = isinstance(model, ProposalNetwork)
    key = "MODEL.RPN.POST_NMS_TOPK_TEST" if is_rpn else "TEST.DETECTIONS_PER_IMAGE"
    most = cfg.get_by_full_key(key)
    if most > MAX_DETECTIONS:
        raise ConfigError(
            f"{key} {most}: an exported model returns at most {MAX_DETECTIONS} objects per image"
        )
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)  # before what takes long
    if not input_dtype:
        input_dtype = "float32" if resize_rule(cfg) == "torchvision" else "uint8"
    program = exported_program(DetectorGraph(model, most, paste), getattr(torch, input_dtype))
    document = {
        **describe(model, metadata, cfg),
        "outputs": output_names(program),
        "max_detections": most,
    }
    document["input"]["dtype"] = input_dtype
    document["mask_pasted"] = paste
    return write_formats(program, document, formats, folder)


def check_export(cfg: CfgNode, formats: Sequence[str]) -> None:
    """Check what can be checked before there is a model; see `export_model`."""
    for name in formats:
        if name not in FORMATS:
            known = ", ".join(FORMATS)
            raise ConfigError(
                f"the format must be one of {known}, got {name!r}.{did_you_mean(name, FORMATS)}"
            )
    if cfg.MODEL.ROTATED_BOXES:
        raise ConfigError("MODEL.ROTATED_BOXES: no format can suppress rotated boxes")
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ConfigError("MODEL.LOAD_PROPOSALS: an exported model has images as its only input")
    if cfg.TEST.AUG.ENABLED:
        raise ConfigError("TEST.AUG.ENABLED: test-time augmentation cannot be exported")
    if cfg.TEST.NMS.METHOD != "hard":
        raise ConfigError(
            f"TEST.NMS.METHOD {cfg.TEST.NMS.METHOD}: no format has soft suppression, only hard"
        )
    for name in formats:
        packages, extra = FORMATS[name]
        for package in packages:
            require(package, extra)


def describe(model: Any, metadata: Metadata, cfg: CfgNode) -> dict[str, Any]:
    """Return what an exported file says of itself, as JSON values; see `docs/deploy.md`."""
    architecture = find_architecture(type(model).__name__)
    keys = architecture.score_thresholds if architecture else ()
    document: dict[str, Any] = {
        "format": 1,
        "detkit": __version__,
        "torch": torch.__version__,
        "architecture": cfg.MODEL.META_ARCHITECTURE,
        "input": {"format": cfg.INPUT.FORMAT, "channels": len(model.pixel_mean)},
        "resize": {
            "rule": resize_rule(cfg),
            "min_size": cfg.INPUT.MIN_SIZE_TEST,
            "max_size": cfg.INPUT.MAX_SIZE_TEST,
        },
        "size_divisibility": model.backbone.size_divisibility,
        "mask_threshold": 0.5,
        "precision": "float32",
        "weights_sha256": _hash_of_file(cfg.MODEL.WEIGHTS),
    }
    if keys:
        document["score_threshold"] = cfg.get_by_full_key(keys[0])
    if architecture and architecture.nms_threshold:
        document["nms_threshold"] = cfg.get_by_full_key(architecture.nms_threshold)
    if isinstance(model, PanopticFPN) and model.combine_on:
        document["panoptic"] = {
            "overlap_threshold": model.combine_overlap_thresh,
            "stuff_area_limit": model.combine_stuff_area_thresh,
            "instances_score_threshold": model.combine_instances_score_thresh,
        }
    names = {key: metadata.get(key) for key in _COPIED if metadata.get(key) is not None}
    return document | names


def _hash_of_file(path: str) -> str:
    digest = hashlib.sha256()
    with Path(PathManager.get_local_path(path)).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
