"""What mappers written for Detectron2 call, in its own forms.

The other names of Detectron2's module (`transform_instance_annotations`,
`annotations_to_instances`, ...) are those of `detkit.data`: see `detkit.utils.detectron2_names`.

Legend: H and W height and width, C channels, K keypoints or classes.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detkit.data.annotations import boxes_of, transform_keypoints
from detkit.data.catalog import MetadataCatalog
from detkit.data.data_report import count_images_per_class
from detkit.data.proposals import transformed_proposals
from detkit.data.transforms import CropTransform, Transform
from detkit.data.transforms.crop import draw_start_around
from detkit.structures import AnnotationRecord, ImageRecord
from detkit.utils.errors import ConfigError
from detkit.utils.image import RGB_TO_YUV, upright_pixels
from detkit.utils.image import read_image as _read_image
from detkit.utils.image_file import MAX_IMAGE_PIXELS, opened_image, read_image_bytes


def read_image(file_name: str, format: str | None = None) -> np.ndarray:
    """Read an image file, turned upright.

    Args:
        file_name: Path or address.
        format: See `detkit.utils.image.read_image`, whose default is BGR; None for the channels as
            they are stored, mostly RGB; "YUV-BT.601" for luma in [0, 1] and colour differences.

    Returns:
        (H, W, C); without a format also (H, W).
    """
    if format == "YUV-BT.601":
        return _read_image(file_name, "RGB") / 255 @ RGB_TO_YUV.T
    if format is not None:
        return _read_image(file_name, format)
    with opened_image(read_image_bytes(file_name), file_name, MAX_IMAGE_PIXELS) as image:
        return upright_pixels(image)


def convert_PIL_to_numpy(image: Image.Image, format: str | None) -> np.ndarray:
    """Return a PIL image as an array (H, W, C) in a format of `read_image`; None keeps its mode."""
    if format is not None:
        image = image.convert("RGB" if format in ("BGR", "YUV-BT.601") else format)
    pixels = np.asarray(image)
    if format == "YUV-BT.601":
        return pixels / 255 @ RGB_TO_YUV.T
    if format == "L":
        pixels = pixels[:, :, None]
    return pixels[:, :, ::-1] if format == "BGR" else pixels


def apply_exif_orientation(image: Image.Image) -> Image.Image:
    """Return a PIL image turned upright by the orientation in its metadata."""
    return Image.fromarray(upright_pixels(image))


def transform_proposals(
    dataset_dict: dict[str, Any],
    image_shape: tuple[int, int],
    transforms: Transform,
    *,
    proposal_topk: int,
    min_box_size: float = 0,
) -> None:
    """Replace the proposals of a record by `proposals`, transformed as its image was.

    Args:
        dataset_dict: Changed in place. A record without proposals is left as it is.
        image_shape: (height, width) of the transformed image.
        transforms: What was done to the image.
        proposal_topk: Largest number of proposals.
        min_box_size: See `transformed_proposals`.
    """
    if "proposal_boxes" not in dataset_dict:
        return
    dataset_dict["proposals"] = transformed_proposals(
        cast(ImageRecord, dataset_dict), image_shape, transforms, proposal_topk, min_box_size
    )
    for key in ("proposal_boxes", "proposal_objectness_logits", "proposal_bbox_mode"):
        dataset_dict.pop(key, None)


def transform_keypoint_annotations(
    keypoints: Sequence[float],
    transforms: Transform,
    image_size: tuple[int, int],
    keypoint_hflip_indices: np.ndarray | None = None,
) -> np.ndarray:
    """Return the keypoints of one annotation, [x, y, visibility, ...], as (K, 3), transformed.

    See `transform_keypoints`.
    """
    points = np.asarray(keypoints, dtype=np.float64).reshape(1, -1, 3)
    return transform_keypoints(points, transforms, image_size, keypoint_hflip_indices)[0]


class OutsideImageError(ValueError, AssertionError):
    """A window or an object that is not in its image; Detectron2 raises the second."""


def gen_crop_transform_with_instance(
    crop_size: tuple[int, int], image_size: tuple[int, int], instance: AnnotationRecord
) -> CropTransform:
    """Draw a window of a size that holds the centre of an object.

    Args:
        crop_size: (height, width) of the window.
        image_size: (height, width) of the image.
        instance: An annotation.

    Raises:
        OutsideImageError: The window is larger than the image, or the centre lies outside of it.
    """
    (crop_h, crop_w), (height, width) = crop_size, image_size
    x1, y1, x2, y2 = boxes_of([instance])[0]
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    if crop_h > height or crop_w > width:
        raise OutsideImageError(f"a window of {crop_size} does not fit into {image_size}")
    if not (0 <= x <= width and 0 <= y <= height):
        raise OutsideImageError(f"the centre ({x}, {y}) of the object lies outside {image_size}")
    y0, x0 = draw_start_around(y, crop_h, height), draw_start_around(x, crop_w, width)
    return CropTransform(x0, y0, crop_w, crop_h, width, height)


def check_metadata_consistency(key: str, dataset_names: str | Sequence[str]) -> None:
    """Check that data sets which are used together have the same metadata under a key.

    Raises:
        AttributeError: One lacks it.
        ConfigError: They differ.
    """
    names = [dataset_names] if isinstance(dataset_names, str) else dataset_names
    values = [getattr(MetadataCatalog.get(name), key) for name in names]
    for name, value in zip(names, values, strict=True):
        if value != values[0]:
            raise ConfigError(
                f"data sets that are used together need the same {key}: {names[0]!r} has"
                f" {values[0]}, {name!r} has {value}"
            )


def get_fed_loss_cls_weights(
    dataset_names: str | Sequence[str], freq_weight_power: float = 1.0
) -> Tensor:
    """Return the weights of the classes of a federated loss: images of a class, to a power.

    Args:
        dataset_names: Data sets whose metadata have the same `class_image_count`, as LVIS has it.
        freq_weight_power: The exponent.

    Returns:
        (K,) float32.
    """
    names = [dataset_names] if isinstance(dataset_names, str) else list(dataset_names)
    counts = count_images_per_class(names[:1], len(MetadataCatalog.get(names[0]).thing_classes))
    check_metadata_consistency("class_image_count", names)
    return torch.tensor(counts, dtype=torch.float32) ** freq_weight_power
