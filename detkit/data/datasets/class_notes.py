"""What the categories of a COCO file say about classes and keypoints, noted in the metadata of a data set.

Legend: K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detkit.data.catalog import Metadata
from detkit.data.datasets.builtin_meta import Color, left_right_pairs
from detkit.data.datasets.json_file import listed
from detkit.utils.colormap import class_colors


def note_classes(
    metadata: Metadata, names: list[str], to_contiguous: dict[Any, int], json_file: str
) -> None:
    """Note names, colours and ids of the classes.

    Args:
        metadata: Of the data set. Changed.
        names: K, in the order of the contiguous ids.
        to_contiguous: Category id -> contiguous id in [0, K).
        json_file: The file that says so, for messages.

    Raises:
        ValueError: Other classes are noted already.
    """
    expected = list(metadata.get("thing_classes", names))
    if expected != names:
        raise ValueError(
            f"the classes of {json_file} are not those noted for data set {metadata.name!r}."
            f" Expected: {', '.join(expected)}. Found: {', '.join(names)}."
        )
    metadata.set(thing_classes=names, thing_dataset_id_to_contiguous_id=to_contiguous)
    if metadata.get("thing_colors") is None:
        metadata.set(thing_colors=class_colors(len(names)))


def note_keypoints(
    metadata: Metadata, categories: Sequence[Mapping[str, Any]], json_file: str
) -> None:
    """Note names of keypoints, which of them a mirror exchanges, and the lines between them.

    Args:
        metadata: Of the data set. Changed.
        categories: Those of the classes in use, as the file has them.
        json_file: The file, for messages.

    Raises:
        ValueError: Other keypoints are noted already, or the skeleton is none of theirs.
    """
    with_names = [category for category in categories if category.get("keypoints")]
    if not with_names or any(
        category["keypoints"] != with_names[0]["keypoints"] for category in with_names
    ):
        return  # none, or several kinds of them: which one a model is to learn cannot be said here
    names = list(with_names[0]["keypoints"])
    expected = list(metadata.get("keypoint_names", names))
    if expected != names:
        raise ValueError(
            f"the keypoints of {json_file} are not those noted for data set {metadata.name!r}."
            f" Expected: {', '.join(expected)}. Found: {', '.join(names)}."
        )
    metadata.set(keypoint_names=names)
    if metadata.get("keypoint_flip_map") is None:
        metadata.set(keypoint_flip_map=left_right_pairs(names))
    skeleton = with_names[0].get("skeleton")
    if metadata.get("keypoint_connection_rules") is None and skeleton:
        metadata.set(keypoint_connection_rules=_connection_rules(names, skeleton, json_file))


def _connection_rules(
    names: Sequence[str], skeleton: Any, json_file: str
) -> list[tuple[str, str, Color]]:
    """Return the lines of a skeleton, which counts keypoints from 1, as `(name, name, color)`."""
    try:
        ends = [(int(a), int(b)) for a, b in skeleton]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the skeleton in {json_file} must be pairs of numbers, got {skeleton!r}"
        ) from error
    stray = [end for pair in ends for end in pair if not 1 <= end <= len(names)]
    if stray:
        raise ValueError(
            f"the skeleton in {json_file} names keypoints {listed(stray)}, of 1 to {len(names)}"
        )
    return [
        (names[a - 1], names[b - 1], color)
        for (a, b), color in zip(ends, class_colors(len(ends)), strict=True)
    ]
