"""`detkit predict`: find objects in image files, and write what was found as pictures and as one JSON file.

`predictions.json` is a list with one entry per image that could be read::

    {"file": "photos/a.jpg", "picture": "a.jpg", "height": 480, "width": 640,
     "instances": [{"category": "dog", "category_id": 16, "score": 0.97, "bbox": [x, y, width,
     height]}]}

Boxes are in pixels of the upright image; `category_id` counts from 0 in the order of the class
names. Instances of a model that finds them also have `segmentation`, COCO's run-length encoding,
and `keypoints`, [x, y, score, ...]. Where a model tells a class or a segment for every pixel,
`sem_seg` and `panoptic` name png files of them, and `segments` says what the ids in the latter are.
"""

import argparse
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detkit.cli.errors import message_of, run_command
from detkit.cli.prediction_entry import describe_output, write_maps
from detkit.config import CfgNode, get_cfg, import_user_modules, score_threshold_keys
from detkit.engine import DefaultPredictor
from detkit.model_zoo import find_config
from detkit.structures import ModelOutput
from detkit.utils.image import convert_image_to_rgb, read_image
from detkit.utils.image_file import BadImageError
from detkit.utils.logger import setup_logger
from detkit.visualization import ColorMode, Visualizer, readable_scale

logger = logging.getLogger(__name__)

# A picture in one of these formats is written in its own format, any other one as JPEG.
_PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and give its exit status: 2 also when some, but not all, images could be read.

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
    add(
        "--config-file",
        required=True,
        metavar="FILE",
        help="YAML file, or the name of a config that comes with detkit",
    )
    add(
        "--input",
        required=True,
        nargs="+",
        metavar="PATH",
        help="image files, folders of images, or patterns (*, **)",
    )
    add(
        "--output",
        required=True,
        metavar="DIR",
        help="folder for the pictures and predictions.json; made if absent",
    )
    add(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="lowest score of what is shown and written, 0 to 1 (default: %(default)s)",
    )
    add(
        "--allow-partial",
        action="store_true",
        help="accept weights that do not fill every tensor of the model",
    )
    add(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="settings, such as MODEL.WEIGHTS model.pth; last",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Predict, write, and report the files that could not be read."""
    cfg = _setup(args)
    inputs = find_images(args.input)
    predictor = DefaultPredictor(cfg, allow_partial=args.allow_partial)
    # The predictor turns BGR into RGB by itself where the model wants that.
    image_format = "BGR" if cfg.INPUT.FORMAT == "RGB" else cfg.INPUT.FORMAT
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    unreadable: list[str] = []
    for path, picture in zip(inputs, _picture_names(inputs), strict=True):
        try:
            image = read_image(str(path), image_format, max_pixels=cfg.INPUT.MAX_IMAGE_PIXELS)
        except (BadImageError, OSError) as error:
            logger.error("%s", message_of(error))
            unreadable.append(str(path))
            continue
        found = _checked(predictor(image))
        _draw(image, image_format, predictor.metadata, found, folder / picture)
        height, width = image.shape[:2]
        entry = {"file": str(path), "picture": picture, "height": height, "width": width}
        entry |= describe_output(found, predictor.metadata) | write_maps(found, folder, picture)
        entries.append(entry)
        logger.info("%s: %s", path, _summary(entry))
    # An image a line: as easy to search as to parse.
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    (folder / "predictions.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    if unreadable:
        raise ValueError(
            f"{len(unreadable)} of {len(inputs)} inputs could not be read: {', '.join(unreadable)}."
            f" The others are in {folder}."
        )
    print(folder.resolve())
    return 0


def _summary(entry: dict[str, Any]) -> str:
    counts = [
        f"{len(entry[key])} {word}"
        for key, word in (("instances", "objects"), ("segments", "segments"))
        if key in entry
    ]
    return ", ".join(counts) or "a class for every pixel"


def _setup(args: argparse.Namespace) -> CfgNode:
    if not 0 <= args.confidence_threshold <= 1:
        raise ValueError(
            f"--confidence-threshold must lie between 0 and 1, got {args.confidence_threshold}"
        )
    setup_logger()
    cfg = get_cfg()
    cfg.merge_from_file(find_config(args.config_file))
    cfg.merge_from_list(args.opts)
    import_user_modules(cfg.IMPORTS)  # whose models may declare thresholds of their own
    # Already here, so that less goes through non-maximum suppression.
    for key in score_threshold_keys(cfg.MODEL.META_ARCHITECTURE):
        cfg.merge_from_list([key, args.confidence_threshold])
    cfg.merge_from_list(args.opts)  # once more: the user's own thresholds win
    cfg.freeze()
    return cfg


def find_images(inputs: Iterable[str]) -> list[Path]:
    """Return the files that paths, folders and patterns stand for, in order, each once.

    A file that is named is given whether it is an image or not, so that the reader can say what is
    wrong with it. Of a folder or pattern, the files with an image's suffix are given.

    Raises:
        FileNotFoundError: A path is not there, or a folder or pattern holds no image.
    """
    found: dict[Path, None] = {}
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_file():
            found[path] = None
            continue
        candidates = path.iterdir() if path.is_dir() else _glob(path)
        images = sorted(
            p
            for p in candidates
            if p.is_file() and p.suffix.lower() in Image.registered_extensions()
        )
        if not images:
            raise FileNotFoundError(
                f"--input {name}: {'no image in this folder' if path.is_dir() else 'no such file'}"
            )
        found.update(dict.fromkeys(images))
    return list(found)


def _glob(pattern: Path) -> Iterable[Path]:
    """Files that fit a pattern, relative or absolute; none where the path holds no `*`, `?` or `[`."""
    fixed = next((i for i, part in enumerate(pattern.parts) if any(c in part for c in "*?[")), None)
    if fixed is None:
        return []
    return Path(*pattern.parts[:fixed]).glob(str(Path(*pattern.parts[fixed:])))


def _picture_names(inputs: Sequence[Path]) -> list[str]:
    """A file name for each picture; equal names from different folders are numbered."""
    names: dict[str, None] = {}
    for path in inputs:
        suffix = path.suffix if path.suffix.lower() in _PICTURE_SUFFIXES else ".jpg"
        name, number = f"{path.stem}{suffix}", 2
        while name in names:
            name, number = f"{path.stem}_{number}{suffix}", number + 1
        names[name] = None
    return list(names)


def _checked(output: ModelOutput) -> ModelOutput:
    if "instances" not in output and "sem_seg" not in output:
        raise ValueError(
            "need a model that finds instances or classifies pixels; the one of this config gives"
            f" {', '.join(output)}"
        )
    return output


def _draw(
    image: np.ndarray, image_format: str, metadata: Any, output: ModelOutput, path: Path
) -> None:
    rgb = convert_image_to_rgb(image, image_format)
    Visualizer(rgb, metadata, readable_scale(rgb.shape[:2]), ColorMode.SEGMENTATION).draw_output(
        output
    ).save(path)
