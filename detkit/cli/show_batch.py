"""`detkit show-batch`: write what a model is fed in training, with its annotations drawn."""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detkit.cli.errors import run_command
from detkit.cli.parsers import PARSERS
from detkit.config import CfgNode, get_cfg
from detkit.data import Metadata, MetadataCatalog
from detkit.engine import DefaultTrainer, prepare
from detkit.model_zoo import find_config
from detkit.utils.errors import ConfigError
from detkit.utils.image import convert_image_to_rgb
from detkit.utils.logger import progress_bar, setup_logger
from detkit.utils.remote_files import stem_of
from detkit.utils.text import printable
from detkit.visualization import COLOR_MODES, VisImage, Visualizer, readable_scale


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit status; see `detkit.cli.command.main`."""
    return run_command(run, PARSERS["show-batch"](prog).parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Load samples, write a picture of each, and print the folder."""
    if args.max_images < 1:
        raise ConfigError(f"--max-images must be at least 1, got {args.max_images}")
    setup_logger()
    cfg = get_cfg()
    cfg.merge_from_file(find_config(args.config_file))
    cfg.merge_from_list(args.opts)
    prepare(cfg)
    cfg.freeze()
    loader = DefaultTrainer.build_train_loader(cfg)
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    folder = Path(args.output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    samples = itertools.islice(itertools.chain.from_iterable(loader), args.max_images)
    for number, sample in enumerate(progress_bar(samples, total=args.max_images, leave=False)):
        stem = stem_of(sample["file_name"])
        draw_sample(sample, metadata, cfg).save(folder / f"{number:03d}_{stem}.png")
    print(printable(str(folder.resolve())))


def draw_sample(sample: dict[str, Any], metadata: Metadata, cfg: CfgNode) -> VisImage:
    """Return the picture of a model input, as large as the model sees it, or larger to be read."""
    pixels = sample["image"].permute(1, 2, 0).numpy()
    if cfg.INPUT.FORMAT != "RAW":
        pixels = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    rgb = convert_image_to_rgb(pixels, cfg.INPUT.FORMAT)
    scale = readable_scale(pixels.shape[:2])
    mode = COLOR_MODES[cfg.VIS_COLORS]
    drawing = Visualizer(rgb, metadata, scale, mode, show_labels=cfg.VIS_LABELS)
    if "sem_seg" in sample:
        drawing.draw_sem_seg(sample["sem_seg"])
    instances = sample.get("instances")
    if instances is None:
        return drawing.get_output()
    classes = instances.gt_classes.tolist()
    names = metadata.get("thing_classes") or []
    return drawing.overlay_instances(
        boxes=instances.gt_boxes,
        labels=[names[k] if k < len(names) else str(k) for k in classes],
        masks=instances.gt_masks if instances.has("gt_masks") else None,
        keypoints=instances.gt_keypoints if instances.has("gt_keypoints") else None,
        assigned_colors=drawing.instance_colors(classes, len(classes)),
    )
