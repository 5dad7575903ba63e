"""`detkit predict`: find objects in images and videos, and write pictures, JSON and other formats.

`predictions.json` is a list with one entry per image that could be read, and per frame of a video::

    {"file": "photos/a.jpg", "picture": "a.jpg", "height": 480, "width": 640,
     "instances": [{"category": "dog", "category_id": 16, "score": 0.97, "bbox": [x, y, width,
     height]}]}

Boxes are in pixels of the upright image, rotated ones `[center x, center y, width, height, angle]`
in degrees counter-clockwise; `category_id` counts from 0 in the order of the class
names. Instances of a model that finds them also have `segmentation`, COCO's run-length encoding,
and `keypoints`, [x, y, score, ...]. Of a model that predicts a class or a segment for every pixel,
`sem_seg` and `panoptic` name png files, and `segments` lists the segments by their ids. Frames have
`frame`, their number, and `seconds`.

Under torchrun, the processes share the inputs out, and write together what one would write alone.
"""

import argparse
import functools
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image

from detkit.cli.command import imported
from detkit.cli.errors import message_of, run_command
from detkit.cli.parsers import PARSERS
from detkit.cli.prediction_files import (
    FORMATS,
    RESULTS,
    WRITTEN,
    PredictionLog,
    digest,
    write_json,
)
from detkit.config import CfgNode, get_cfg
from detkit.export.runtime import WRITTEN_ENDINGS
from detkit.utils.colormap import id2rgb
from detkit.utils.errors import ConfigError, DataError, MissingFileError
from detkit.utils.logger import progress_bar, setup_logger
from detkit.utils.media_file import CAMERA, Video, VideoWriter, find_images, is_video
from detkit.utils.text import counted, did_you_mean, distinct_names, printable
from detkit.visualization import COLOR_MODES, VideoVisualizer, Visualizer, readable_scale
from detkit.visualization.plain_values import mask_list, to_array, to_integers

# torch takes seconds to load, and models of other runtimes do without: see `detkit.export.runtime`.
if TYPE_CHECKING:
    from detkit.engine import Prediction, Predictor
    from detkit.structures import Instances, ModelOutput

logger = logging.getLogger(__name__)

# A picture in one of these formats is written in its own format, any other one as JPEG.
_PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit status: 2 also when only some images could be read.

    Args:
        argv: Words of the command line; None takes those of this process.
        prog: Name of the command in its help.
    """
    args = PARSERS["predict"](prog).parse_args(argv)
    if args.model.lower().endswith(WRITTEN_ENDINGS):
        return run_command(run, args)
    launch = imported("detkit.engine").launch
    return run_command(launch, run, 1, 1, 0, "auto", (args,))


def run(args: argparse.Namespace) -> int:
    """Predict, write, and report the files that could not be read."""
    for option, number in (("batch-size", args.batch_size), ("max-images", args.max_images)):
        if number is not None and number < 1:
            raise ConfigError(f"--{option} must be at least 1, got {number}")
    comm, load, model_digest = _model_of(args)
    inputs = _inputs(args.input)[: args.max_images]
    folder, pictures = Path(args.output).expanduser(), _picture_names(inputs)
    log = PredictionLog(folder)
    predictor = load()
    keep = _class_filter(args.classes, predictor.metadata)
    done: set[int] = set()
    if comm.is_main_process():
        written = [name for kind in args.save for name in WRITTEN.get(kind, pictures)]
        _prepare_output(folder, inputs, written)
        settings = {
            "config": model_digest,
            "--input": digest(inputs),
            "--classes": args.classes,
            "--batch-size": args.batch_size,
            "--max-images": args.max_images,
            "--save": "pictures" in args.save,
        }
        done = log.start(settings, args.resume or comm.get_num_restarts() > 0)
    done = comm.all_gather(done)[0]
    writer = _Writer(folder, predictor, keep, log, inputs, pictures, args)
    with log.opened(comm.get_rank()):
        writer.predict(_share(inputs, done, args.batch_size, comm))
    comm.synchronize()
    if not comm.is_main_process():
        return 0
    write_json(log.entries(), folder / RESULTS)
    names = _all_names(predictor.metadata)
    for kind in dict.fromkeys(args.save):
        if kind in FORMATS:
            FORMATS[kind](log, folder, names)
    log.remove()
    if log.failed:
        names = ", ".join(printable(inputs[number]) for number in sorted(log.failed))
        others = f" The results of the others are in {folder}."
        raise DataError(
            f"{len(log.failed)} of {counted(len(inputs), 'input', 'inputs')} could not be read:"
            f" {names}.{others if len(log.failed) < len(inputs) else ''}"
        )
    print(printable(str(folder.resolve())))
    return 0


class _Alone:
    """What `detkit.utils.comm`, which imports torch, answers in the only process of a run."""

    is_main_process = staticmethod(lambda: True)
    get_rank = get_num_restarts = staticmethod(lambda: 0)
    get_world_size = staticmethod(lambda: 1)
    all_gather = staticmethod(lambda value: [value])
    synchronize = staticmethod(lambda: None)


def _model_of(args: argparse.Namespace) -> "tuple[Any, Callable[[], Predictor], str]":
    """Return the processes of the run, what loads the model, and a digest of its settings."""
    if not args.model.lower().endswith(WRITTEN_ENDINGS):
        from detkit.engine import Predictor
        from detkit.utils import comm

        cfg = _setup(args)
        load = functools.partial(Predictor, cfg, allow_partial=args.allow_partial)
        return comm, load, digest([cfg.dump()])
    from detkit.cli.exported_stream import ExportedStream

    setup_logger()
    if args.config_file or args.opts:
        given = "--config-file" if args.config_file else args.opts[0]
        raise ConfigError(f"an exported model has its settings in the file: {given} has no effect")
    if not 0 <= args.confidence_threshold <= 1:
        raise ConfigError(
            f"--confidence-threshold must lie between 0 and 1, got {args.confidence_threshold}"
        )
    if args.tile is not None or args.overlap is not None:
        raise ConfigError("--tile and --overlap are for checkpoints: an exported model takes none")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("an exported model runs in one process: start it without torchrun")
    predictor: Any = ExportedStream(
        args.model, score_threshold=args.confidence_threshold, show_labels=not args.hide_labels
    )
    document = json.dumps(predictor.metadata.document, sort_keys=True)
    return _Alone, lambda: predictor, digest([document, str(args.confidence_threshold)])


def _setup(args: argparse.Namespace) -> CfgNode:
    from detkit.engine import prepare
    from detkit.engine.predictor import config_of_checkpoint, set_score_threshold
    from detkit.model_zoo import find_config, published_weights

    setup_logger()
    config_file = find_config(args.config_file) if args.config_file else None
    # As with a config file, where weights have always been given by their key.
    weights = dict(zip(args.opts[::2], args.opts[1::2], strict=False)).get("MODEL.WEIGHTS")
    model = args.model or (None if config_file else weights)
    if model:
        cfg = config_of_checkpoint(model, config_file)
    elif config_file:
        cfg = get_cfg()
        cfg.merge_from_file(config_file)
        # What training starts from, such as a backbone, finds no objects.
        cfg.MODEL.WEIGHTS = published_weights(config_file) or cfg.MODEL.WEIGHTS
    else:
        raise ConfigError("give --model, a checkpoint or an exported model, or --config-file")
    for key, value in (("TEST.TILES.SIZE", args.tile), ("TEST.TILES.OVERLAP", args.overlap)):
        if value is not None:
            cfg.merge_from_list([key, value])
    cfg.VIS_LABELS = not args.hide_labels and cfg.VIS_LABELS
    cfg.merge_from_list(args.opts)
    if args.overlap is not None and not cfg.TEST.TILES.SIZE:
        raise ConfigError("--overlap is that of tiles: give their size (--tile), too")
    prepare(cfg)  # imports the user's models, which may declare thresholds of their own
    # Already here, so that less goes through non-maximum suppression.
    set_score_threshold(cfg, args.confidence_threshold)
    cfg.merge_from_list(args.opts)  # once more: the user's own thresholds win
    cfg.freeze()
    return cfg


def _inputs(names: Sequence[str]) -> list[str]:
    """Return the files, addresses and cameras, each once."""
    found: dict[str, None] = {}
    for name in names:
        try:
            is_file = "://" not in name and not name.startswith(CAMERA)
            found.update(dict.fromkeys(map(str, find_images([name])) if is_file else [name]))
        except MissingFileError as error:
            raise MissingFileError(f"--input {error}") from error
    return list(found)


def _share(inputs: Sequence[str], done: set[int], batch_size: int, comm: Any) -> list[list[int]]:
    """Return what this process has to do: chunks of images that make batches, then videos.

    Chunks do not depend on how many processes there are, or on what is done: a batch is the same
    in each case, and so are the last digits of what comes out of it.
    """
    size = 1 if batch_size == 1 else 2 * batch_size  # `chunk_size` of the predictor
    images = [i for i, name in enumerate(inputs) if not is_video(name)]
    units = [images[start : start + size] for start in range(0, len(images), size)]
    units += [[i] for i, name in enumerate(inputs) if is_video(name)]
    left = [unit for unit in units if not done.issuperset(unit)]
    return left[comm.get_rank() :: comm.get_world_size()]


def _class_filter(names: Sequence[str], metadata: Any) -> set[int] | None:
    known = _all_names(metadata)
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--classes: the model has no class {name!r}.{did_you_mean(name, known)}"
            )
    return {known.index(name) for name in names} or None


def _all_names(metadata: Any) -> list[str]:
    return list(getattr(metadata, "thing_classes", None) or [])


class _Writer:
    """Predicts a share of the inputs, and writes their pictures and their entries of the log."""

    def __init__(
        self,
        folder: Path,
        predictor: "Predictor",
        keep: set[int] | None,
        log: PredictionLog,
        inputs: Sequence[str],
        pictures: Sequence[str],
        args: argparse.Namespace,
    ) -> None:
        self._folder, self._predictor, self._keep, self._log = folder, predictor, keep, log
        self._inputs, self._pictures = inputs, pictures
        self._numbers = {name: number for number, name in enumerate(inputs)}
        self._names = distinct_names([Path(name).stem or "video" for name in inputs])
        self._draws, self._batch_size = "pictures" in args.save, args.batch_size
        self._most_frames = args.max_images
        self._num_done = 0

    def predict(self, units: Sequence[Sequence[int]]) -> None:
        """Predict chunks of images, then videos, and log the speed."""
        names = [self._inputs[number] for unit in units for number in unit]
        images = [name for name in names if not is_video(name)]
        start = time.perf_counter()
        with progress_bar(total=len(images) or None, unit="image", leave=False) as bar:
            for prediction in self._stream(images):
                self._add_image(prediction)
                bar.update()
            for name in names[len(images) :]:
                self._add_video(name, bar)
        seconds = time.perf_counter() - start
        count = counted(self._num_done, "image", "images")
        logger.info("%s in %.1f s: %.1f per second", count, seconds, self._num_done / seconds)

    def _stream(self, inputs: Sequence[str]) -> "Iterator[Prediction]":
        def failed(source: Any, error: Exception) -> None:
            self._failed(source.name, error)

        return self._predictor.stream(inputs, batch_size=self._batch_size, on_error=failed)

    def _failed(self, name: str, error: Exception) -> None:
        logger.error("%s", message_of(error))
        self._log.add(self._numbers[name], message_of(error))

    def _add_image(self, prediction: "Prediction") -> None:
        number = self._numbers[prediction.source]
        output, entry = self._described(prediction, self._pictures[number])
        if self._draws:
            rgb = prediction.image
            drawing = Visualizer(
                rgb,
                self._predictor.metadata,
                readable_scale(rgb.shape[:2]),
                COLOR_MODES[self._predictor.cfg.VIS_COLORS],
                show_labels=self._predictor.cfg.VIS_LABELS,
            )
            drawing.draw_output(output).save(self._folder / self._pictures[number])
        self._log.add(number, entry)
        logger.info("%s: %s", prediction.source, _counts(entry))

    def _add_video(self, name: str, bar: Any) -> None:
        number = self._numbers[name]
        drawing = VideoVisualizer(
            self._predictor.metadata, show_labels=self._predictor.cfg.VIS_LABELS
        )
        try:
            with ExitStack() as stack:
                video = Video(name)
                if self._draws:
                    path = self._folder / self._pictures[number]
                    written = stack.enter_context(VideoWriter(path, video.rate))
                frames = self._predictor.stream(video, batch_size=self._batch_size)
                for prediction in itertools.islice(frames, self._most_frames):
                    output, entry = self._described(prediction, self._pictures[number])
                    if self._draws:
                        written.write(_drawn_frame(drawing, prediction.image, output))
                    self._log.add(number, entry, prediction.frame)
                    bar.update()
        except (DataError, OSError) as error:
            self._failed(name, error)
        else:
            self._log.add(number, None)

    def _described(self, prediction: "Prediction", picture: str) -> "tuple[ModelOutput, Any]":
        """Return what is to be shown, and the entry of an image."""
        output = prediction.output
        if "instances" not in output and "sem_seg" not in output:
            raise ConfigError(
                "need a model that finds instances or classifies pixels; the one of this config"
                f" gives {', '.join(output)}"
            )
        if self._keep is not None and "instances" in output:
            found = output["instances"]
            kept = [i for i, k in enumerate(found.pred_classes.tolist()) if k in self._keep]
            output = cast("ModelOutput", {**output, "instances": found[kept]})
        height, width = prediction.image_size
        number = self._numbers[prediction.source]
        entry: dict[str, Any] = {"file": prediction.source, "name": self._names[number]}
        map_name = picture
        if prediction.frame is not None:
            entry |= {"frame": prediction.frame, "seconds": round(prediction.seconds or 0, 4)}
            map_name = f"{picture}_{prediction.frame:06d}"
        if self._draws:
            entry["picture"] = picture
        entry |= {"height": height, "width": width}
        entry |= describe_output(output, self._predictor.metadata)
        entry |= write_maps(output, self._folder, map_name)
        self._num_done += 1
        return output, entry


def _drawn_frame(drawing: VideoVisualizer, frame: Any, output: "ModelOutput") -> Any:
    if "panoptic_seg" in output:
        return drawing.draw_panoptic_seg_predictions(frame, *output["panoptic_seg"]).get_image()
    if "sem_seg" in output:
        frame = drawing.draw_sem_seg(frame, output["sem_seg"].argmax(0)).get_image()
    if "instances" in output:
        return drawing.draw_instance_predictions(frame, output["instances"]).get_image()
    return frame


def _counts(entry: dict[str, Any]) -> str:
    counts = [
        counted(len(entry[key]), word, f"{word}s")
        for key, word in (("instances", "object"), ("segments", "segment"))
        if key in entry
    ]
    return ", ".join(counts) or "a class for every pixel"


def _picture_names(inputs: Sequence[str]) -> list[str]:
    """Return a file name for each picture; equal names from different folders are numbered."""
    names = []
    for name in inputs:
        path = Path(name.replace(":", "_") if is_video(name) else name)
        suffix = path.suffix if path.suffix.lower() in _PICTURE_SUFFIXES else ".jpg"
        names.append(f"{path.stem}{'.mp4' if is_video(name) else suffix}")
    return distinct_names(names)


def _prepare_output(folder: Path, inputs: Sequence[str], written: Sequence[str]) -> None:
    """Make the folder of the output, and refuse one whose files would be overwritten.

    Raises:
        ConfigError: It is the folder of an input, or holds files or folders of the names `written`
            that no earlier prediction wrote: the labels of a data set, for one.
    """
    place = folder.resolve()
    paths = [Path(name) for name in inputs if "://" not in name]
    if any(place in (path.parent.resolve(), path.resolve().parent) for path in paths):
        raise ConfigError(
            f"--output {folder} is the folder of the inputs, whose files the pictures could"
            " overwrite: give another folder"
        )
    results = folder / RESULTS
    if not results.exists():
        if taken := [name for name in written if (folder / name).exists()]:
            raise ConfigError(
                f"--output {folder} already holds {counted(len(taken), 'name', 'names')} that would"
                f" be written, such as {taken[0]}, and no {RESULTS} of an earlier prediction: give"
                " another folder, or remove what may be overwritten"
            )
        folder.mkdir(parents=True, exist_ok=True)
        # From the start, so that what an interrupted prediction leaves may be overwritten.
        results.write_text("[]\n", encoding="utf-8")


def describe_output(output: "ModelOutput", metadata: Any) -> dict[str, Any]:
    """Return `instances` and `segments`, where the model predicts them, as lists and numbers."""
    described: dict[str, Any] = {}
    if "instances" in output:
        described["instances"] = _describe_instances(output["instances"], metadata)
    if "panoptic_seg" in output:
        described["segments"] = []
        for info in output["panoptic_seg"][1]:
            classes = "thing_classes" if info["isthing"] else "stuff_classes"
            segment = {"category": _name(metadata, classes, info["category_id"]), **info}
            if "score" in segment:
                segment["score"] = round(segment["score"], 4)
            described["segments"].append(segment)
    return described


def write_maps(output: "ModelOutput", folder: Path, name: str) -> dict[str, str]:
    """Write the label maps of an image, and return their files relative to the folder.

    Args:
        output: For one image.
        folder: Where `sem_seg/NAME.png` goes, grey, a class per pixel, and `panoptic/NAME.png`,
            a segment id per pixel as COCO's colours: red + 256 green + 65536 blue.
        name: A different one for every image.
    """
    maps: dict[str, np.ndarray] = {}
    if "sem_seg" in output:
        labels = to_integers(output["sem_seg"].argmax(0))
        maps["sem_seg"] = labels.astype(np.uint8 if len(output["sem_seg"]) <= 256 else np.uint16)
    if "panoptic_seg" in output:
        maps["panoptic"] = id2rgb(to_integers(output["panoptic_seg"][0]))
    files = {kind: f"{kind}/{name}.png" for kind in maps}
    for kind, file in files.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(maps[kind]).save(folder / file)
    return files


def _describe_instances(instances: "Instances", metadata: Any) -> list[dict[str, Any]]:
    fields = instances.get_fields()
    boxes = to_array(fields["pred_boxes"])
    if boxes.shape[-1] == 4:
        boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    classes, scores = fields["pred_classes"].tolist(), fields["scores"].tolist()
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
    if "pred_masks" in fields:
        for entry, mask in zip(found, mask_list(fields["pred_masks"]), strict=True):
            entry["segmentation"] = _run_lengths(mask)
    if "pred_keypoints" in fields:
        for entry, keypoints in zip(found, to_array(fields["pred_keypoints"]), strict=True):
            entry["keypoints"] = [round(value, 3) for value in keypoints.reshape(-1).tolist()]
    return found


def _run_lengths(mask: Any) -> dict[str, Any]:
    if isinstance(mask, dict):  # already, where a model detects in tiles
        return mask
    # As `bitmask_to_rle`, whose package imports torch.
    from pycocotools import mask as coco_mask

    rle: Any = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


def _name(metadata: Any, classes: str, category: int) -> str:
    names = getattr(metadata, classes, None) or []
    return names[category] if category < len(names) else str(category)
