"""The objects of one image, as columns of equal length.

Legend: M objects in one image.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from detkit.structures.batch_boxes import RowImages
from detkit.structures.mask_formats import bitmask_to_rle, rle_to_bitmask
from detkit.utils.errors import ContractError, WrongTypeError, import_package
from detkit.utils.text import did_you_mean


class MissingFieldError(AttributeError, KeyError):
    """Instances lack a field: an AttributeError where it is an attribute, a KeyError of `get`."""

    __str__ = Exception.__str__  # not as KeyError, which shows the repr of the message


class Instances:
    """A table of M objects of an image: fields of length M, such as boxes, classes and scores.

    A field is set and read as an attribute. It can be anything with `len` and indexing; tensors,
    lists and classes with a static `cat` can also be joined.

    Example:
        >>> instances = Instances((480, 640))
        >>> instances.pred_boxes = torch.tensor([[0, 0, 10, 10], [5, 5, 20, 20]])
        >>> instances.scores = torch.tensor([0.9, 0.3])
        >>> confident = instances[instances.scores > 0.5]
        >>> len(confident), confident.image_size
        (1, (480, 640))
    """

    _image_size: Any
    _fields: dict[str, Any]

    def __init__(self, image_size: tuple[int, int], **kwargs: Any) -> None:
        """Start a table.

        Args:
            image_size: `(height, width)` in pixels.
            **kwargs: Fields to set.
        """
        self._image_size = image_size
        self._fields = {}
        for name, value in kwargs.items():
            self.set(name, value)

    @property
    def image_size(self) -> tuple[int, int]:
        """`(height, width)` of the image in pixels."""
        return self._image_size

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self.set(name, value)

    def __getattr__(self, name: str) -> Any:
        # Called for missing attributes only. `_fields` is one while unpickled or copied.
        if name == "_fields" or name not in self._fields:
            known = list(self.__dict__.get("_fields", ()))
            raise MissingFieldError(
                f"Instances have no field {name!r}, only {known}.{did_you_mean(name, known)}"
            )
        return self._fields[name]

    def set(self, name: str, value: Any) -> None:
        """Set a field, or replace it.

        Raises:
            ValueError: Its length differs from that of the other fields.
            TypeError: It has no length.
        """
        # The lengths in an exported graph are not known yet.
        if not torch.compiler.is_exporting():
            count = len(value)
            if len(self._fields) > 0 and count != len(self):
                raise ContractError(
                    f"field {name!r} needs one value per instance: got {count} for {len(self)}"
                    " instances"
                )
        self._fields[name] = value

    def has(self, name: str) -> bool:
        """Return whether there is a field of this name."""
        return name in self._fields

    def get(self, name: str) -> Any:
        """Return a field.

        Raises:
            AttributeError: There is none of this name. It is a KeyError, too.
        """
        return self.__getattr__(name)

    def remove(self, name: str) -> None:
        """Drop a field.

        Raises:
            AttributeError: There is none of this name. It is a KeyError, too.
        """
        self.get(name)
        del self._fields[name]

    def get_fields(self) -> dict[str, Any]:
        """Return the fields by name: the dict itself, whose changes are not checked."""
        return self._fields

    def to(self, *args: Any, **kwargs: Any) -> Instances:
        """Return a table with `.to(*args, **kwargs)` applied to each field that has it."""
        result = Instances(self._image_size)
        for name, value in self._fields.items():
            if hasattr(value, "to"):
                try:
                    value = value.to(*args, **kwargs)
                except TypeError:  # structures of users often take a device alone
                    value = value.to(*args)
            result.set(name, value)
        return result

    def __getitem__(self, item: int | slice | Tensor | Sequence[int]) -> Instances:
        """Select objects by an index (one object), a slice, a bool mask, or int64 indices."""
        if isinstance(item, int):
            if not -len(self) <= item < len(self):
                raise IndexError(f"instance {item} of {len(self)}")
            item = slice(item, None, len(self))
        # Of a whole batch, each row has its own.
        images: Any = self._image_size
        result = Instances(images[item] if isinstance(images, RowImages) else images)
        for name, value in self._fields.items():
            is_list = isinstance(value, list)
            result.set(name, _select_from_list(value, item) if is_list else value[item])
        return result

    def __len__(self) -> int:
        if not self._fields:
            raise NotImplementedError("Instances without a field have no length")
        return len(next(iter(self._fields.values())))

    def __iter__(self) -> NoReturn:
        raise NotImplementedError(
            "Instances are not iterable: use instances[i], or zip over the fields you need"
        )

    @staticmethod
    def cat(instance_lists: Sequence[Instances]) -> Instances:
        """Join tables of one image.

        Args:
            instance_lists: At least one; all with the same image size, and with the fields of the
                first. Others are left out with a warning, where Detectron2 says nothing.

        Raises:
            ValueError: There are none.
            ValueError: They differ in image size, or one lacks a field.
            ValueError: A field cannot be joined.
            TypeError: One is something else.
        """
        if len(instance_lists) == 0:
            raise ContractError("need at least one Instances to join")
        first = instance_lists[0]
        if len(instance_lists) == 1:
            return first
        for index, other in enumerate(instance_lists):
            _check_joinable(first, other, index)
        result = Instances(first.image_size)
        for name in first.get_fields():
            result.set(name, _join(name, [instances.get(name) for instances in instance_lists]))
        return result

    def to_coco(
        self, image_id: int | str = 0, category_ids: Mapping[int, int] | None = None
    ) -> list[dict[str, Any]]:
        """Return predictions in the format of COCO's results, in values of JSON.

        Args:
            image_id: Of the image.
            category_ids: Class -> id in COCO's file; None writes the classes, which count from 0.

        Returns:
            Per object `image_id`, `category_id`, `bbox` (XYWH, or XYWHA of rotated boxes), `score`,
            and `segmentation` and `keypoints` where the model predicts them.

        Example:
            >>> boxes = torch.tensor([[0.0, 0.0, 10.0, 20.0]])
            >>> scores, classes = torch.tensor([0.5]), torch.tensor([3])
            >>> found = Instances((40, 60), pred_boxes=boxes, scores=scores, pred_classes=classes)
            >>> found.to_coco(image_id=7)
            [{'image_id': 7, 'category_id': 3, 'bbox': [0.0, 0.0, 10.0, 20.0], 'score': 0.5}]
        """
        boxes = _box_array(self.pred_boxes)
        if boxes.shape[1] == 4:
            boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        found: list[dict[str, Any]] = []
        classes, scores = self.pred_classes.tolist(), self.scores.tolist()
        for k, box, score in zip(classes, boxes.tolist(), scores, strict=True):
            category = k if category_ids is None else category_ids[k]
            entry = {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
            found.append(entry)
        if self.has("pred_masks"):
            for entry, mask in zip(found, _mask_list(self.pred_masks), strict=True):
                entry["segmentation"] = mask if isinstance(mask, dict) else bitmask_to_rle(mask)
        if self.has("pred_keypoints"):
            keypoints = self.pred_keypoints.detach().cpu().clone()
            keypoints[:, :, :2] -= 0.5  # COCO's files number pixels
            for entry, points in zip(found, keypoints.flatten(1).tolist(), strict=True):
                entry["keypoints"] = points
        return found

    def to_pandas(self, class_names: Sequence[str] | None = None) -> Any:
        """Return predictions as a `pandas.DataFrame`, a row per object.

        Args:
            class_names: Names of the classes, such as `metadata.thing_classes`, for a column.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        pandas = _package("pandas")
        boxes = _box_array(self.pred_boxes)
        is_rotated = boxes.shape[1] == 5
        sides = ["x", "y", "width", "height", "angle"] if is_rotated else _CORNERS
        table = pandas.DataFrame(boxes, columns=sides)
        table["score"] = self.scores.detach().cpu().numpy()
        table["class_id"] = self.pred_classes.cpu().numpy()
        if class_names is not None:
            table["class_name"] = [class_names[k] for k in self.pred_classes.tolist()]
        return table

    def to_supervision(self, class_names: Sequence[str] | None = None) -> Any:
        """Return predictions as `supervision.Detections`, rotated ones with upright boxes.

        Args:
            class_names: As of `to_pandas`; they become `data["class_name"]`, which labels show.

        Raises:
            MissingPackageError: supervision is not installed.
        """
        supervision = _package("supervision")
        masks = [_bitmap(m) for m in _mask_list(self.pred_masks)] if self.has("pred_masks") else []
        classes = self.pred_classes.cpu().numpy()
        names = np.array([class_names[k] for k in classes]) if class_names is not None else None
        return supervision.Detections(
            xyxy=_box_array(self.pred_boxes, upright=True),
            mask=np.stack(masks) if masks else None,
            confidence=self.scores.detach().cpu().numpy(),
            class_id=classes,
            data={} if names is None else {"class_name": names},
        )

    def to_fiftyone(self, class_names: Sequence[str] | None = None) -> Any:
        """Return predictions as `fiftyone.Detections`, rotated ones with upright boxes.

        Args:
            class_names: As of `to_pandas`; None labels objects by the number of their class.

        Raises:
            MissingPackageError: fiftyone is not installed.
        """
        fiftyone = _package("fiftyone")
        height, width = self._image_size
        boxes = _box_array(self.pred_boxes, upright=True)
        masks = _mask_list(self.pred_masks) if self.has("pred_masks") else [None] * len(boxes)
        detections = []
        classes, scores = self.pred_classes.tolist(), self.scores.tolist()
        for box, score, k, mask in zip(boxes, scores, classes, masks, strict=True):
            # Relative to the image; masks within the pixels of the box.
            (x1, y1), (x2, y2) = np.floor(box[:2]).astype(int), np.ceil(box[2:]).astype(int)
            window = None if mask is None else _bitmap(mask)[max(y1, 0) : y2, max(x1, 0) : x2]
            if window is not None:
                box = np.array([max(x1, 0), max(y1, 0), x2, y2], dtype=float)
            x, y, w, h = box[0] / width, box[1] / height, box[2] - box[0], box[3] - box[1]
            detection = fiftyone.Detection(
                label=str(k) if class_names is None else class_names[k],
                bounding_box=[float(x), float(y), float(w / width), float(h / height)],
                confidence=score,
                mask=window,
            )
            detections.append(detection)
        return fiftyone.Detections(detections=detections)

    def __repr__(self) -> str:
        height, width = self._image_size
        count = len(self) if self._fields else 0
        fields = ", ".join(f"{name}: {value}" for name, value in self._fields.items())
        return (
            f"Instances(num_instances={count}, image_height={height}, image_width={width},"
            f" fields=[{fields}])"
        )


_CORNERS = ["xmin", "ymin", "xmax", "ymax"]


def _package(name: str) -> Any:
    message = f"to_{name} needs the package {name}: pip install 'detkit-vision[{name}]'"
    return import_package(name, message)


def _box_array(boxes: Any, upright: bool = False) -> np.ndarray:
    """Return boxes as an array; of rotated ones, those around them if `upright` is set."""
    if upright and hasattr(boxes, "upright"):
        boxes = boxes.upright()
    return getattr(boxes, "tensor", boxes).detach().cpu().numpy()


def _mask_list(masks: Any) -> list[Any]:
    """Return bitmaps (H, W), or run lengths as they are, one by one."""
    masks = getattr(masks, "tensor", masks)
    return masks if isinstance(masks, list) else list(masks.detach().cpu().numpy())


def _bitmap(mask: Any) -> np.ndarray:
    return rle_to_bitmask(mask) if isinstance(mask, dict) else mask.astype(bool)


def _select_from_list(values: list[Any], item: slice | Tensor | Sequence[int]) -> list[Any]:
    if isinstance(item, slice):
        return values[item]
    indices = torch.as_tensor(item)
    if indices.dtype == torch.bool:
        indices = indices.nonzero().squeeze(1)
    return [values[i] for i in indices.tolist()]


def _check_joinable(first: Instances, other: Instances, index: int) -> None:
    if not isinstance(other, Instances):
        kind = type(other).__name__
        raise WrongTypeError(f"Instances.cat takes Instances: item {index} is {kind}")
    if other.image_size != first.image_size:
        sizes = f"{first.image_size} and item {index} {other.image_size}"
        raise ContractError(
            f"only instances of one image can be joined: item 0 has image size {sizes}"
        )
    names, other_names = first.get_fields().keys(), other.get_fields().keys()
    if names - other_names:
        fields = f"{sorted(names)} and item {index} {sorted(other_names)}"
        raise ContractError(f"instances to join need the same fields: item 0 has {fields}")
    if other_names - names:
        left_out = ", ".join(sorted(other_names - names))
        warnings.warn(f"Instances.cat leaves out {left_out}: item 0 lacks it", stacklevel=4)


def _join(name: str, values: list[Any]) -> Any:
    kind = type(values[0])
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    if isinstance(values[0], list):
        return list(itertools.chain.from_iterable(values))
    if hasattr(kind, "cat"):
        return kind.cat(values)
    raise ValueError(f"field {name!r} is {kind.__name__}, which has no cat to be joined with")
