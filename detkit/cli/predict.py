"""`detkit predict`: find objects in image files, and write pictures and one JSON file.

`predictions.json` is a list with one entry per image that could be read::

    {"file": "photos/a.jpg", "picture": "a.jpg", "height": 480, "width": 640,
     "instances": [{"category": "dog", "category_id": 16, "score": 0.97, "bbox": [x, y, width,
     height]}]}

Boxes are in pixels of the upright image, rotated ones `[center x, center y, width, height, angle]`
in degrees counter-clockwise; `category_id` counts from 0 in the order of the class
names. Instances of a model that finds them also have `segmentation`, COCO's run-length encoding,
and `keypoints`, [x, y, score, ...]. Of a model that predicts a class or a segment for every pixel,
`sem_seg` and `panoptic` name png files, and `segments` lists the segments by their ids.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detkit.cli.errors import message_of, run_command
from detkit.config import CfgNode, get_cfg, score_threshold_keys
from detkit.config.user_modules import add_no_imports
from detkit.engine import DefaultPredictor, prepare
from detkit.model_zoo import find_config, published_weights
from detkit.structures import BoxMode, Instances, ModelOutput, RotatedBoxes, bitmask_to_rle
from detkit.utils.colormap import id2rgb
from detkit.utils.errors import ConfigError, DataError
from detkit.utils.events import progress_bar
from detkit.utils.image import convert_image_to_rgb, read_image
from detkit.utils.image_file import BadImageError
from detkit.utils.logger import setup_logger
from detkit.utils.media_file import find_images
from detkit.utils.text import counted, distinct_names, printable
from detkit.visualization import ColorMode, Visualizer, readable_scale

logger = logging.getLogger(__name__)

_RESULTS = "predictions.json"
# A picture in one of these formats is written in its own format, any other one as JPEG.
_PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit status: 2 also when only some images could be read.

    Args:
        argv: Words of the command line; None takes those of this process.
        prog: Name of the command in its help.
    """
    return run_command(run, _parser(prog).parse_args(argv))


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    config_help = "YAML file, or the name of a config that comes with detkit"
    add("--config-file", required=True, metavar="FILE", help=config_help)
    input_help = "image files, folders of images, or patterns (*, **)"
    add("--input", required=True, nargs="+", metavar="PATH", help=input_help)
    output_help = "folder for the pictures and predictions.json, not that of the inputs"
    add("--output", required=True, metavar="DIR", help=output_help)
    add(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="lowest score of what is shown and written, 0 to 1 (default: %(default)s)",
    )
    hide_help = "draw no names and scores into the pictures, as VIS_LABELS False"
    add("--hide-labels", action="store_true", help=hide_help)
    partial_help = "accept weights that do not fill every tensor of the model"
    add("--allow-partial", action="store_true", help=partial_help)
    add_no_imports(parser)
    opts_help = (
        "settings, such as MODEL.WEIGHTS model.pth; last. A config that comes with detkit takes the"
        " weights published for it where there are any"
    )
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help=opts_help)
    return parser


def run(args: argparse.Namespace) -> int:
    """Predict, write, and report the files that could not be read."""
    cfg = _setup(args)
    inputs = find_images(args.input)
    folder, pictures = Path(args.output).expanduser(), _picture_names(inputs)
    _prepare_output(folder, inputs, pictures)
    predictor = DefaultPredictor(cfg, allow_partial=args.allow_partial)
    # The predictor turns BGR into RGB by itself where the model wants that.
    image_format = "BGR" if cfg.INPUT.FORMAT == "RGB" else cfg.INPUT.FORMAT
    entries: list[dict[str, Any]] = []
    unreadable: list[str] = []
    for path, picture in progress_bar(list(zip(inputs, pictures, strict=True)), leave=False):
        try:
            image = read_image(str(path), image_format, max_pixels=cfg.INPUT.MAX_IMAGE_PIXELS)
        except (BadImageError, OSError) as error:
            logger.error("%s", message_of(error))
            unreadable.append(printable(str(path)))
            continue
        found = predictor(image)
        if "instances" not in found and "sem_seg" not in found:
            raise ConfigError(
                "need a model that finds instances or classifies pixels; the one of this config"
                f" gives {', '.join(found)}"
            )
        rgb = convert_image_to_rgb(image, image_format)
        height, width = rgb.shape[:2]
        scale = readable_scale((height, width))
        drawing = Visualizer(
            rgb,
            predictor.metadata,
            scale,
            ColorMode.SEGMENTATION,
            show_labels=cfg.VIS_LABELS,
        )
        drawing.draw_output(found).save(folder / picture)
        entry = {"file": str(path), "picture": picture, "height": height, "width": width}
        entry |= describe_output(found, predictor.metadata) | write_maps(found, folder, picture)
        entries.append(entry)
        counts = [
            f"{len(entry[key])} {word}{'' if len(entry[key]) == 1 else 's'}"
            for key, word in (("instances", "object"), ("segments", "segment"))
            if key in entry
        ]
        logger.info("%s: %s", path, ", ".join(counts) or "a class for every pixel")
    # An image a line: as easy to search as to parse.
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    (folder / _RESULTS).write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    if unreadable:
        others = f" The pictures of the others are in {folder}." if entries else ""
        raise DataError(
            f"{len(unreadable)} of {counted(len(inputs), 'input', 'inputs')} could not be read:"
            f" {', '.join(unreadable)}.{others}"
        )
    print(printable(str(folder.resolve())))
    return 0


def _setup(args: argparse.Namespace) -> CfgNode:
    if not 0 <= args.confidence_threshold <= 1:
        raise ConfigError(
            f"--confidence-threshold must lie between 0 and 1, got {args.confidence_threshold}"
        )
    setup_logger()
    cfg = get_cfg()
    config_file = find_config(args.config_file)
    cfg.merge_from_file(config_file)
    # What training starts from, such as a backbone, finds no objects.
    cfg.MODEL.WEIGHTS = published_weights(config_file) or cfg.MODEL.WEIGHTS
    cfg.VIS_LABELS = not args.hide_labels and cfg.VIS_LABELS
    cfg.merge_from_list(args.opts)
    prepare(cfg)  # imports the user's models, which may declare thresholds of their own
    # Already here, so that less goes through non-maximum suppression.
    for key in score_threshold_keys(cfg.MODEL.META_ARCHITECTURE):
        cfg.merge_from_list([key, args.confidence_threshold])
    cfg.merge_from_list(args.opts)  # once more: the user's own thresholds win
    cfg.freeze()
    return cfg


def _picture_names(inputs: Sequence[Path]) -> list[str]:
    """Return a file name for each picture; equal names from different folders are numbered."""
    names = []
    for path in inputs:
        suffix = path.suffix if path.suffix.lower() in _PICTURE_SUFFIXES else ".jpg"
        names.append(f"{path.stem}{suffix}")
    return distinct_names(names)


def _prepare_output(folder: Path, inputs: Sequence[Path], pictures: Sequence[str]) -> None:
    """Make the folder of the pictures, and refuse one in which they would overwrite others.

    Raises:
        ConfigError: It is the folder of an input, or holds files of these names that no earlier
            prediction wrote.
    """
    place = folder.resolve()
    if any(place in (path.parent.resolve(), path.resolve().parent) for path in inputs):
        raise ConfigError(
            f"--output {folder} is the folder of the inputs, whose files the pictures could"
            " overwrite: give another folder"
        )
    results = folder / _RESULTS
    if not results.exists():
        taken = [name for name in pictures if (folder / name).exists()]
        if taken:
            raise ConfigError(
                f"--output {folder} already holds {len(taken)} of the {len(pictures)} pictures,"
                f" such as {taken[0]}, and no {_RESULTS} of an earlier prediction: give another"
                " folder, or remove what may be overwritten"
            )
        folder.mkdir(parents=True, exist_ok=True)
        # From the start, so that what an interrupted prediction leaves may be overwritten.
        results.write_text("[]\n", encoding="utf-8")


def describe_output(output: ModelOutput, metadata: Any) -> dict[str, Any]:
    """Return `instances` and `segments`, where the model predicts them, as lists and numbers."""
    described: dict[str, Any] = {}
    if "instances" in output:
        described["instances"] = _describe_instances(output["instances"].to("cpu"), metadata)
    if "panoptic_seg" in output:
        described["segments"] = []
        for info in output["panoptic_seg"][1]:
            classes = "thing_classes" if info["isthing"] else "stuff_classes"
            segment = {"category": _name(metadata, classes, info["category_id"]), **info}
            if "score" in segment:
                segment["score"] = round(segment["score"], 4)
            described["segments"].append(segment)
    return described


def write_maps(output: ModelOutput, folder: Path, name: str) -> dict[str, str]:
    """Write the label maps of an image, and return their files relative to the folder.

    Args:
        output: For one image.
        folder: Where `sem_seg/NAME.png` goes, grey, a class per pixel, and `panoptic/NAME.png`,
            a segment id per pixel as COCO's colours: red + 256 green + 65536 blue.
        name: A different one for every image.
    """
    maps: dict[str, np.ndarray] = {}
    if "sem_seg" in output:
        labels = output["sem_seg"].argmax(dim=0).cpu().numpy()
        maps["sem_seg"] = labels.astype(np.uint8 if len(output["sem_seg"]) <= 256 else np.uint16)
    if "panoptic_seg" in output:
        maps["panoptic"] = id2rgb(output["panoptic_seg"][0].cpu().numpy())
    files = {kind: f"{kind}/{name}.png" for kind in maps}
    for kind, file in files.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(maps[kind]).save(folder / file)
    return files


def _describe_instances(instances: Instances, metadata: Any) -> list[dict[str, Any]]:
    boxes = instances.pred_boxes.tensor
    if not isinstance(instances.pred_boxes, RotatedBoxes):
        boxes = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    classes, scores = instances.pred_classes.tolist(), instances.scores.tolist()
    found: list[dict[str, Any]] = []
    # Rounded to a hundredth of a pixel: sixteen digits would make the file three times as large.
    for category, score, box in zip(classes, scores, boxes.tolist(), strict=True):
        found.append(
            {
                "category": _name(metadata, "thing_classes", category),
                "category_id": category,
                "score": round(score, 4),
                "bbox": [round(value, 2) for value in box],
            }
        )
    if instances.has("pred_masks"):
        for entry, mask in zip(found, instances.pred_masks.numpy(), strict=True):
            entry["segmentation"] = bitmask_to_rle(mask)
    if instances.has("pred_keypoints"):
        flat = instances.pred_keypoints.flatten(1).tolist()
        for entry, keypoints in zip(found, flat, strict=True):
            entry["keypoints"] = [round(value, 3) for value in keypoints]
    return found


def _name(metadata: Any, classes: str, category: int) -> str:
    names = getattr(metadata, classes, None) or []
    return names[category] if category < len(names) else str(category)
