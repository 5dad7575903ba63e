"""Proposals made beforehand by another model, for Fast R-CNN without a proposal network.

A file holds, for N images, `ids` (or Detectron's `indexes`), `boxes` (a list of (P, 4) arrays),
`objectness_logits` (or `scores`, a list of (P,) arrays) and `bbox_mode` (without it, XYXY in
absolute pixels).

Legend: P proposals of one image.
"""

import pickle
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from detkit.checkpoint.array_unpickler import UnsafePickleError, load_array_pickle
from detkit.data import transforms as T
from detkit.structures import Boxes, BoxMode, ImageRecord, Instances
from detkit.utils.errors import ConfigError, DataError, MissingFileError
from detkit.utils.file_io import PathManager, require_regular_file

# Detectron's names for the same things.
_OLD_NAMES = {"indexes": "ids", "scores": "objectness_logits"}
_REQUIRED = ("ids", "boxes", "objectness_logits")


def load_proposals_into_dataset(
    records: Sequence[ImageRecord], proposal_file: str
) -> list[ImageRecord]:
    """Return the records with the proposals of a file.

    Args:
        records: Not changed.
        proposal_file: A pickle, as Detectron2 writes it; nothing in it is run.

    Returns:
        Records with `proposal_boxes` and `proposal_objectness_logits`, in falling order of the
        latter, and `proposal_bbox_mode`.

    Raises:
        MissingFileError: The file does not exist.
        DataError: The file does not hold proposals, or lacks an image.
    """
    content = _read(proposal_file)
    # As text: an id may be an integer in the data set and text in the file, or the reverse.
    places = {str(image_id): index for index, image_id in enumerate(content["ids"])}
    missing = [record for record in records if str(record["image_id"]) not in places]
    if missing:
        raise DataError(
            f"proposal file {proposal_file} has no proposals for {len(missing)} of {len(records)}"
            f" images, first for image id {missing[0]['image_id']!r} ({missing[0]['file_name']});"
            f" it has {len(places)} images. Was it made for another data set?"
        )
    try:
        mode = BoxMode(int(content.get("bbox_mode", BoxMode.XYXY_ABS)))
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"proposal file {proposal_file} has a wrong bbox_mode: {error}") from error
    with_proposals = []
    farthest = 0.0
    for record in records:
        index = places[str(record["image_id"])]
        where = f"proposal file {proposal_file}, image id {record['image_id']!r}:"
        try:
            boxes = np.asarray(content["boxes"][index], dtype=np.float32)
            logits = np.asarray(content["objectness_logits"][index], dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise DataError(f"{where} boxes and scores must be numbers: {error}") from error
        # No proposals may come as an empty list, which NumPy gives the shape (0,).
        boxes = boxes.reshape(-1, 4) if boxes.size == 0 else boxes
        if boxes.ndim != 2 or boxes.shape[1] != 4 or logits.shape != boxes.shape[:1]:
            raise DataError(
                f"proposal file {proposal_file} needs (P, 4) boxes and (P,) scores for image id"
                f" {record['image_id']!r}, has {boxes.shape} and {logits.shape}"
            )
        if not np.isfinite(boxes).all() or np.isnan(logits).any():
            raise DataError(f"{where} has boxes that are not finite, or scores that are NaN")
        farthest = max(farthest, float(np.abs(boxes).max(initial=0.0)))
        order = logits.argsort()[::-1]
        record = record.copy()
        record["proposal_boxes"] = boxes[order]
        record["proposal_objectness_logits"] = logits[order]
        record["proposal_bbox_mode"] = mode
        with_proposals.append(record)
    if 0 < farthest <= 1 and mode in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
        raise DataError(
            f"all boxes of proposal file {proposal_file} lie within the first pixel: they are"
            " probably fractions of the image; multiply them by its width and height"
        )
    return with_proposals


def _read(proposal_file: str) -> dict[str, Any]:
    require_regular_file(proposal_file, "proposal file")
    try:
        with PathManager.open(proposal_file, "rb") as file:
            content = load_array_pickle(cast(Any, file))
    except FileNotFoundError as error:
        raise MissingFileError(
            f"proposal file {proposal_file} (DATASETS.PROPOSAL_FILES_*) does not exist"
        ) from error
    except UnsafePickleError as error:
        raise DataError(
            f"proposal file {proposal_file} asks for {error.asked_for}; it may hold arrays, numbers"
            " and lists only"
        ) from error
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        AttributeError,
    ) as error:
        raise DataError(
            f"proposal file {proposal_file} is not a pickle of arrays: {error}"
        ) from error
    if not isinstance(content, dict):
        raise DataError(
            f"proposal file {proposal_file} must hold a dict, holds a {type(content).__name__}"
        )
    content = {_OLD_NAMES.get(str(key), str(key)): value for key, value in content.items()}
    missing = [key for key in _REQUIRED if key not in content]
    if missing:
        raise DataError(
            f"proposal file {proposal_file} lacks {', '.join(missing)}; it has"
            f" {', '.join(map(str, content))}"
        )
    kinds = {key: type(content[key]).__name__ for key in _REQUIRED}
    if not all(isinstance(content[key], list | tuple | np.ndarray) for key in _REQUIRED):
        raise DataError(f"proposal file {proposal_file} needs lists, one entry per image: {kinds}")
    lengths = {key: len(content[key]) for key in _REQUIRED}
    if len(set(lengths.values())) != 1:
        raise DataError(
            f"proposal file {proposal_file} needs an entry per image of each, has {lengths}"
        )
    return content


def transformed_proposals(
    record: ImageRecord,
    image_size: tuple[int, int],
    transforms: T.Transform,
    topk: int,
    min_box_size: float = 0.0,
) -> Instances:
    """Return the proposals of one image, transformed as the image was and clipped to it.

    Args:
        record: A record from `load_proposals_into_dataset`.
        image_size: `(height, width)` of the transformed image.
        transforms: The transforms that were applied to the image.
        topk: Largest number of proposals to keep.
        min_box_size: Proposals that are not wider and higher than this, in pixels, are dropped.

    Returns:
        `proposal_boxes` and `objectness_logits`, in falling order of the latter.

    Raises:
        ConfigError: The record has no proposals.
    """
    if "proposal_boxes" not in record:
        raise ConfigError(
            f"MODEL.LOAD_PROPOSALS is on, but the record of {record['file_name']} has no"
            " proposal_boxes: name a file for its data set in DATASETS.PROPOSAL_FILES_TRAIN or"
            " _TEST"
        )
    mode = record.get("proposal_bbox_mode", BoxMode.XYXY_ABS)
    boxes = transforms.apply_box(BoxMode.convert(record["proposal_boxes"], mode, BoxMode.XYXY_ABS))
    proposal_boxes = Boxes(torch.from_numpy(boxes.astype(np.float32)))
    logits = torch.from_numpy(
        np.asarray(record.get("proposal_objectness_logits"), dtype=np.float32)
    )
    # Clipped before the choice: a proposal outside of the image must not take a place.
    proposal_boxes.clip(image_size)
    keep = proposal_boxes.nonempty(threshold=min_box_size)
    proposals = Instances(image_size)
    proposals.proposal_boxes = proposal_boxes[keep][:topk]
    proposals.objectness_logits = logits[keep][:topk]
    return proposals
