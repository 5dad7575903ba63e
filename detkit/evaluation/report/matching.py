"""The one matching of detections and objects that all numbers of the error report come from.

It assigns as COCO's evaluation does. `detkit.evaluation.coco.class_scores` is faster, but tells
nobody who was given what, knows no overlaps across classes, and leaves out objects by nothing but
their area. AP from here equals that of `COCOEvaluator`: tests compare.

Legend: N images, D detections and G objects of the data set, T thresholds; n and m of one image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pycocotools import mask as mask_util

from detkit.evaluation.coco.class_scores import HIGHEST_THRESHOLD, keypoint_similarity
from detkit.evaluation.coco.ground_truth import CocoGroundTruth
from detkit.evaluation.coco.results import CocoProtocol
from detkit.evaluation.coco.scoring import class_entries
from detkit.evaluation.detections import ImageDetections


@dataclass(frozen=True)
class Items:
    """Detections, or objects, of all images: one row each, image after image."""

    images: np.ndarray
    """Number of the image, from 0, in rising order of the ids in COCO's json."""
    classes: np.ndarray
    """Contiguous class ids."""
    boxes: np.ndarray
    """(., 4) XYWH in absolute pixels."""
    areas: np.ndarray
    """Square pixels, by which COCO calls something small, medium or large."""
    scores: np.ndarray
    """Of detections: falling within each image. 1 for objects."""
    is_crowd: np.ndarray
    """Of objects: whether any number of detections may lie in it without harm."""
    is_ignored: np.ndarray
    """Of objects: whether missing it costs nothing: crowds, persons without keypoints."""
    masks: list[Any] | None
    """Run-length encodings; None if boxes or keypoints are compared."""
    keypoints: np.ndarray | None
    """(., 3 J) as in COCO's files; None if boxes or masks are compared."""

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, num_images: int) -> list[slice]:
        """Return the (N,) rows of each image."""
        ends = np.searchsorted(self.images, np.arange(num_images + 1))
        return [slice(a, b) for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]


@dataclass(frozen=True)
class Outcome:
    """What became of each detection: found an object, wrong, or ignored."""

    matches: np.ndarray
    """(T, D) index of the object, or -1."""
    is_hit: np.ndarray
    """(T, D)"""
    is_counted: np.ndarray
    """(T, D) hits and false detections."""
    num_objects: np.ndarray
    """(K,) that can be found."""


@dataclass(frozen=True)
class _Group:
    """Objects of one class in one image, and the detections of that class near them."""

    detections: np.ndarray
    """(n,) rows, best score first."""
    objects: np.ndarray
    """(m,) rows."""
    overlaps: np.ndarray
    """(n, m)"""


class Matching:
    """Overlaps of detections with objects, and which of them belong together."""

    def __init__(
        self,
        truth: CocoGroundTruth,
        detections: Sequence[ImageDetections],
        protocol: CocoProtocol,
        task: str,
    ) -> None:
        """Compute the overlaps of all detections with all objects of their image.

        Args:
            truth: The ground truth, of upright boxes.
            detections: At most one entry per image. Of each class in an image, as many as the
                protocol scores are used.
            protocol: Thresholds, area ranges and detection limits.
            task: What is compared: "bbox", "segm" or "keypoints".

        Raises:
            DataError: A mask of the ground truth cannot be used.
        """
        self.task, self.protocol, self.class_names = task, protocol, truth.class_names
        self.image_ids = sorted(truth.image_ids.values())
        """(N,) ids in the json."""
        self.objects, self.detections = _items(truth, detections, protocol, task)
        self.object_rows = self.objects.rows(len(self.image_ids))
        self.detection_rows = self.detections.rows(len(self.image_ids))
        self.overlaps = [
            self._overlaps(found, there)
            for found, there in zip(self.detection_rows, self.object_rows, strict=True)
        ]
        """(N,) arrays (n, m): the part of a detection in it for a crowd, else IoU or OKS."""

    @cached_property
    def index(self) -> int:
        """Index of the threshold that errors are named by: 0.5, or the nearest to it."""
        return int(np.abs(np.array(self.protocol.iou_thresholds) - 0.5).argmin())

    @cached_property
    def outcome(self) -> "Outcome":
        """What became of each detection."""
        matches = np.full(
            (len(self.protocol.iou_thresholds), len(self.detections)), -1, dtype=np.int64
        )
        for group in self._groups:
            matches[:, group.detections] = self._assigned(group, self.objects.is_ignored)
        return self._outcome(matches, self.objects.is_ignored, matches < 0)

    def outcome_of(self, objects: np.ndarray, detections: np.ndarray) -> "Outcome":
        """Return what becomes of each detection when only some objects count.

        Args:
            objects: (G,) those that count. The others are ignored as crowds are.
            detections: (D,) those that count when they find nothing.
        """
        base = self.objects.is_ignored
        is_ignored = base | ~objects
        matches = self.outcome.matches.copy()
        for group in self._groups:
            # The assignment depends only on which objects take precedence over which.
            flags = is_ignored[group.objects]
            if flags.any() and not (flags.all() and not base[group.objects].any()):
                matches[:, group.detections] = self._assigned(group, is_ignored)
        return self._outcome(matches, is_ignored, (matches < 0) & detections)

    def _outcome(
        self, matches: np.ndarray, is_ignored: np.ndarray, is_free: np.ndarray
    ) -> "Outcome":
        # The last entry is what -1 looks up.
        is_hit = np.append(~is_ignored, False)[matches]
        counted = self.objects.classes[~is_ignored]
        num_objects = np.bincount(counted, minlength=len(self.class_names))
        return Outcome(matches, is_hit, is_hit | is_free, num_objects)

    @cached_property
    def class_rows(self) -> list[np.ndarray]:
        """Detections of each class in falling order of score, equal ones in that of the images."""
        order = np.argsort(-self.detections.scores, kind="stable")
        classes = self.detections.classes[order]
        return [order[classes == k] for k in range(len(self.class_names))]

    @cached_property
    def _groups(self) -> list["_Group"]:
        """The objects of each class in each image, with the detections that could find them."""
        lowest, groups = self.protocol.iou_thresholds[0], []
        for found, there, overlaps in zip(
            self.detection_rows, self.object_rows, self.overlaps, strict=True
        ):
            classes, object_classes = self.detections.classes[found], self.objects.classes[there]
            for k in np.unique(object_classes):
                objects = np.flatnonzero(object_classes == k)
                # Most detections overlap nothing of their class.
                is_near = overlaps[:, objects].max(axis=1) >= min(lowest, HIGHEST_THRESHOLD)
                rows = np.flatnonzero(is_near & (classes == k))
                if len(rows):
                    overlaps_k = overlaps[np.ix_(rows, objects)]
                    groups.append(_Group(rows + found.start, objects + there.start, overlaps_k))
        return groups

    def _assigned(self, group: "_Group", is_ignored: np.ndarray) -> np.ndarray:
        """Give the objects of a group to its detections, best score first, by COCO's rules.

        Returns:
            (T, n) index of the object, or -1.
        """
        thresholds = np.minimum(np.array(self.protocol.iou_thresholds), HIGHEST_THRESHOLD)
        overlaps, is_crowd = group.overlaps, self.objects.is_crowd[group.objects]
        given = np.full((len(thresholds), len(overlaps)), -1)
        is_free = np.ones((len(thresholds), len(group.objects)), dtype=bool)
        last = len(group.objects) - 1
        # An ignored object only if no other is left; of equal overlaps the last, as COCO's loop.
        flags = is_ignored[group.objects]
        preferences = [flags == flag for flag in (False, True) if (flags == flag).any()]
        for row, values in enumerate(overlaps):
            for preferred in preferences:
                reached = np.where(preferred & (is_free | is_crowd), values, -1.0)
                best = last - reached[:, ::-1].argmax(axis=1)
                is_new = (given[:, row] < 0) & (reached.max(axis=1) >= thresholds)
                given[is_new, row] = best[is_new]
                is_free[is_new, best[is_new]] = False
        return np.where(given < 0, -1, group.objects[given])

    def _overlaps(self, found: slice, there: slice) -> np.ndarray:
        shape = (found.stop - found.start, there.stop - there.start)
        if 0 in shape:
            return np.zeros(shape)
        detections, objects = self.detections, self.objects
        if detections.keypoints is not None and objects.keypoints is not None:
            return keypoint_similarity(
                detections.keypoints[found],
                objects.keypoints[there],
                objects.boxes[there],
                objects.areas[there],
                self.protocol.oks_sigmas,
            )
        is_crowd = objects.is_crowd[there].astype(np.uint8).tolist()
        if detections.masks is not None and objects.masks is not None:
            overlaps = mask_util.iou(detections.masks[found], objects.masks[there], is_crowd)
        else:
            overlaps = mask_util.iou(detections.boxes[found], objects.boxes[there], is_crowd)
        return np.asarray(overlaps)


def _items(
    truth: CocoGroundTruth,
    detections: Sequence[ImageDetections],
    protocol: CocoProtocol,
    task: str,
) -> tuple[Items, Items]:
    """Return the objects and the detections that are scored."""
    objects: list[tuple[int, dict[str, Any]]] = []
    found: list[tuple[int, dict[str, Any]]] = []
    for class_id, (objects_k, found_k) in enumerate(
        class_entries(truth, detections, task, protocol)
    ):
        objects += [(class_id, entry) for entry in objects_k]
        # The best of each image and class: COCO's limit. Sorting is stable, so that equal scores
        # stay in the order of the model.
        counts: dict[int, int] = {}
        for entry in sorted(found_k, key=lambda entry: -entry["score"]):
            counts[entry["image_id"]] = counts.get(entry["image_id"], 0) + 1
            if counts[entry["image_id"]] <= protocol.max_dets_of(task):
                found.append((class_id, entry))
    objects.sort(key=lambda pair: pair[1]["image_id"])
    found.sort(key=lambda pair: (pair[1]["image_id"], -pair[1]["score"]))
    return _as_items(objects, task), _as_items(found, task)


def _as_items(pairs: Sequence[tuple[int, dict[str, Any]]], task: str) -> Items:
    entries = [entry for _, entry in pairs]
    is_crowd = np.array([bool(entry["iscrowd"]) for entry in entries], dtype=bool)
    is_ignored = is_crowd
    if task == "keypoints":
        # Detections have no count, and are never ignored.
        unlabelled = [entry.get("num_keypoints", 1) == 0 for entry in entries]
        is_ignored = is_crowd | np.array(unlabelled, dtype=bool)
    return Items(
        images=np.array([entry["image_id"] - 1 for entry in entries], dtype=np.int64),
        classes=np.array([class_id for class_id, _ in pairs], dtype=np.int64),
        boxes=np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4),
        areas=np.array([entry["area"] for entry in entries], dtype=np.float64),
        scores=np.array([entry.get("score", 1.0) for entry in entries], dtype=np.float64),
        is_crowd=is_crowd,
        is_ignored=is_ignored,
        masks=[entry["segmentation"] for entry in entries] if task == "segm" else None,
        keypoints=np.array([entry["keypoints"] for entry in entries], dtype=np.float64)
        if task == "keypoints"
        else None,
    )
