"""Load training images, against a mapper with Pillow in the manner of Detectron2.

What makes it fair: one 640x480 JPEG with ten objects, in the system's cache, resized to 800x1067
and flipped every other time, to a (3, H, W) uint8 tensor in BGR with boxes and classes. One thread,
as in a worker of a data loader.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from contest import IMAGE_SIZE, Contest, Setting, example_image, example_objects
from PIL import Image, ImageOps

from detkit.data import DatasetMapper
from detkit.data import transforms as T
from detkit.structures import AnnotationRecord, Boxes, BoxMode, ImageRecord, Instances, ModelInput

_SMALL_SIDE, _LARGE_SIDE = 800, 1333
_IMAGES_PER_ROUND = 10


def data_contest(setting: Setting) -> Contest:
    """Ten images from file to model input; loading runs on the CPU."""
    folder = tempfile.TemporaryDirectory(prefix="detkit-benchmark-")
    record = write_record(Path(folder.name))
    resize = T.ResizeShortestEdge([_SMALL_SIDE], _LARGE_SIDE, "choice")
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[resize, T.RandomFlip()],
        image_format="BGR",
        memory_format=torch.channels_last,
    )
    pil_mapper = PilMapper()
    return Contest(
        name="data",
        task=f"{_IMAGES_PER_ROUND} JPEG files of 640x480 to model inputs of 800x1067, one thread",
        opponent="PIL mapper (Detectron2's manner)",
        ours=lambda: _load(mapper, record, folder),
        theirs=lambda: _load(pil_mapper, record, folder),
        target=4.0,
        rounds=5 if setting.quick else 30,
        check=_require_same_shape,
    )


def jitter_contest(setting: Setting) -> Contest:
    """Ten images with large-scale jitter, against detkit's own mapper without; see `data_contest`.

    The windows are 1024x1024, so that each has 1.2 times the pixels.
    """
    contest = data_contest(setting)
    folder = tempfile.TemporaryDirectory(prefix="detkit-benchmark-")
    record = write_record(Path(folder.name))
    scale = T.ResizeScale(0.1, 2.0, 1024, 1024)
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[scale, T.FixedSizeCrop((1024, 1024)), T.RandomFlip()],
        image_format="BGR",
        memory_format=torch.channels_last,
    )
    return dataclasses.replace(
        contest,
        name="jitter",
        task=f"{_IMAGES_PER_ROUND} JPEG files of 640x480 to model inputs of 1024x1024, one thread",
        opponent="detkit without jitter",
        ours=lambda: _load(mapper, record, folder),
        theirs=contest.ours,
        target=1 / 1.5,
        check=_require_same_type,
    )


def _require_same_type(ours: ModelInput, theirs: ModelInput) -> None:
    if ours["image"].dtype != theirs["image"].dtype:
        raise ValueError(f"got {ours['image'].dtype} and {theirs['image'].dtype}")


def _require_same_shape(ours: ModelInput, theirs: ModelInput) -> None:
    if ours["image"].shape != theirs["image"].shape or ours["image"].dtype != theirs["image"].dtype:
        shapes = [(tuple(side["image"].shape), side["image"].dtype) for side in (ours, theirs)]
        raise ValueError(
            f"the two sides load different things: detkit {shapes[0]}, the PIL mapper {shapes[1]}"
        )


def _load(
    mapper: Callable[[ImageRecord], ModelInput],
    record: ImageRecord,
    folder: tempfile.TemporaryDirectory[str],
) -> ModelInput:
    """Run a mapper with one thread, and return its last output."""
    # `folder` is an argument so that the temporary directory lives as long as the contest.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [mapper(record) for _ in range(_IMAGES_PER_ROUND)][-1]
    finally:
        torch.set_num_threads(threads)


def write_record(folder: Path) -> ImageRecord:
    """Write the example image as a JPEG file, and return its record, with ten objects."""
    path = folder / "image.jpg"
    Image.fromarray(example_image()).save(path, quality=92)
    boxes, classes = example_objects(num_classes=80)
    annotations: list[AnnotationRecord] = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": category, "iscrowd": 0}
        for box, category in zip(boxes.tolist(), classes.tolist(), strict=True)
    ]
    height, width = IMAGE_SIZE
    return {
        "file_name": str(path),
        "image_id": 0,
        "height": height,
        "width": width,
        "annotations": annotations,
    }


class PilMapper:
    """The opponent: the steps of Detectron2's default mapper, with Pillow and NumPy."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def __call__(self, record: ImageRecord) -> ModelInput:
        """Return the model input of one record, resized and perhaps flipped."""
        with Image.open(record["file_name"]) as file:
            image = np.asarray(ImageOps.exif_transpose(file).convert("RGB"))[:, :, ::-1]
        old_height, old_width = image.shape[:2]
        height, width = _resized(old_height, old_width)
        image = np.asarray(
            Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        )
        is_flipped = self._rng.random() < 0.5
        if is_flipped:
            image = image[:, ::-1]
        stretch = (width / old_width, height / old_height)
        boxes = [_moved_box(a, stretch, width, is_flipped) for a in record.get("annotations", [])]
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(np.array(boxes, dtype=np.float32).reshape(-1, 4))
        instances.gt_boxes.clip((height, width))
        instances.gt_classes = torch.tensor(
            [a["category_id"] for a in record.get("annotations", [])]
        )
        tensor = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return {"image": tensor, "instances": instances[instances.gt_boxes.nonempty(1e-5)]}


def _resized(height: int, width: int) -> tuple[int, int]:
    scale = min(_SMALL_SIDE / min(height, width), _LARGE_SIDE / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def _moved_box(
    annotation: AnnotationRecord, stretch: tuple[float, float], width: int, is_flipped: bool
) -> list[float]:
    x1, y1, x2, y2 = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
    x1, x2, y1, y2 = x1 * stretch[0], x2 * stretch[0], y1 * stretch[1], y2 * stretch[1]
    return [width - x2, y1, width - x1, y2] if is_flipped else [x1, y1, x2, y2]
