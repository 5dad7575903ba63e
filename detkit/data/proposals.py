"""Proposals that another model made beforehand: Fast R-CNN trains and tests on them without a proposal network.

A file holds, for N images, `ids` (or Detectron's `indexes`), `boxes` (a list of (P, 4) arrays),
`objectness_logits` (or `scores`, a list of (P,) arrays) and `bbox_mode` (XYXY in absolute pixels
where it is absent).

Legend: P proposals of one image.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from detkit.checkpoint.array_unpickler import UnsafePickleError, load_array_pickle
from detkit.data import transforms as T
from detkit.structures import Boxes, BoxMode, ImageRecord, Instances
from detkit.utils.file_io import PathManager

# Detectron's names for the same things.
_OLD_NAMES = {"indexes": "ids", "scores": "objectness_logits"}
_REQUIRED = ("ids", "boxes", "objectness_logits")


def load_proposals_into_dataset(
    records: Sequence[ImageRecord], proposal_file: str
) -> list[ImageRecord]:
    """Return the records with `proposal_boxes`, `proposal_objectness_logits` and `proposal_bbox_mode` of a file.

    Args:
        records: They are not changed.
        proposal_file: A pickle, as Detectron2 writes it; nothing in it is run.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is none of proposals, or lacks an image.
    """
    content = _read(proposal_file)
    places = {str(image_id): index for index, image_id in enumerate(content["ids"])}
    missing = [record for record in records if str(record["image_id"]) not in places]
    if missing:
        raise ValueError(
            f"proposal file {proposal_file} has no proposals for {len(missing)} of {len(records)}"
            f" images, first for image id {missing[0]['image_id']!r} ({missing[0]['file_name']});"
            f" it has {len(places)} images. Was it made for another data set?"
        )
    mode = BoxMode(int(content.get("bbox_mode", BoxMode.XYXY_ABS)))
    return [
        _with_proposals(record, content, places[str(record["image_id"])], mode, proposal_file)
        for record in records
    ]


def _read(proposal_file: str) -> dict[str, Any]:
    try:
        with PathManager.open(proposal_file, "rb") as file:
            content = load_array_pickle(cast(Any, file))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"proposal file {proposal_file} (DATASETS.PROPOSAL_FILES_*) does not exist"
        ) from error
    except UnsafePickleError as error:
        raise ValueError(
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
        raise ValueError(
            f"proposal file {proposal_file} is no pickle of arrays: {error}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"proposal file {proposal_file} must hold a dict, holds a {type(content).__name__}"
        )
    content = {_OLD_NAMES.get(str(key), str(key)): value for key, value in content.items()}
    missing = [key for key in _REQUIRED if key not in content]
    if missing:
        raise ValueError(
            f"proposal file {proposal_file} lacks {', '.join(missing)}; it has"
            f" {', '.join(map(str, content))}"
        )
    lengths = {key: len(content[key]) for key in _REQUIRED}
    if len(set(lengths.values())) != 1:
        raise ValueError(
            f"proposal file {proposal_file} needs an entry per image of each, has {lengths}"
        )
    return content


def _with_proposals(
    record: ImageRecord, content: dict[str, Any], index: int, mode: BoxMode, proposal_file: str
) -> ImageRecord:
    boxes = np.asarray(content["boxes"][index], dtype=np.float32)
    logits = np.asarray(content["objectness_logits"][index], dtype=np.float32)
    boxes = boxes.reshape(-1, 4) if boxes.size == 0 else boxes
    if boxes.ndim != 2 or boxes.shape[1] != 4 or logits.shape != boxes.shape[:1]:
        raise ValueError(
            f"proposal file {proposal_file} needs (P, 4) boxes and (P,) scores for image id"
            f" {record['image_id']!r}, has {boxes.shape} and {logits.shape}"
        )
    order = logits.argsort()[::-1]
    record = record.copy()
    record["proposal_boxes"], record["proposal_objectness_logits"] = boxes[order], logits[order]
    record["proposal_bbox_mode"] = mode
    return record


def transformed_proposals(
    record: ImageRecord,
    image_size: tuple[int, int],
    transforms: T.Transform,
    topk: int,
    min_box_size: float = 0.0,
) -> Instances:
    """Return the proposals of one image after it was transformed: limited to the image, the first of what is left.

    Args:
        record: With the keys that `load_proposals_into_dataset` gives it.
        image_size: `(height, width)` of the transformed image.
        transforms: What was done to the image.
        topk: Most proposals to give.
        min_box_size: Proposals that are not wider and higher, in pixels, go.

    Returns:
        `proposal_boxes` and `objectness_logits`, in falling order of the latter.

    Raises:
        ValueError: The record has no proposals.
    """
    if "proposal_boxes" not in record:
        raise ValueError(
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
    proposal_boxes.clip(image_size)
    keep = proposal_boxes.nonempty(threshold=min_box_size)
    proposals = Instances(image_size)
    proposals.proposal_boxes = proposal_boxes[keep][:topk]
    proposals.objectness_logits = logits[keep][:topk]
    return proposals
