"""Annotation files in JSON: their lists, and the ids of what is in them."""

from __future__ import annotations

import contextlib
import gc
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from detkit.utils.file_io import PathManager
from detkit.utils.near_miss import did_you_mean


@contextlib.contextmanager
def garbage_collection_off() -> Iterator[None]:
    """Build millions of lists and dicts without Python looking through all of them, again and again, for garbage.

    There is none, and the search takes 40 % of the time that COCO's training set takes to load.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_json(json_file: str) -> dict[str, Any]:
    """Return the content of an annotation file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no JSON, or no object.
    """
    path = PathManager.get_local_path(json_file)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"annotation file {json_file} does not exist") from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # numbers of thousands of digits are a bare ValueError
        raise ValueError(f"annotation file {json_file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"annotation file {json_file} must hold an object with images, annotations and"
            f" categories; it holds a {type(content).__name__}. A list is COCO's format for"
            " results, not for ground truth."
        )
    return content


def section(content: dict[str, Any], key: str, json_file: str) -> list[dict[str, Any]]:
    """Return one of the lists of an annotation file.

    Raises:
        ValueError: The file does not have it, or it is no list of objects.
    """
    entries = content.get(key)
    if entries is None:
        raise ValueError(
            f"annotation file {json_file} has no {key!r}, only"
            f" {sorted(content)}.{did_you_mean(key, content)}"
        )
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{key!r} of annotation file {json_file} must be a list of objects")
    return entries


def by_id(entries: list[dict[str, Any]], kind: str, json_file: str) -> dict[Any, dict[str, Any]]:
    """Return entries by their id.

    Args:
        entries: Objects of one list.
        kind: What they are, for messages: `image`.
        json_file: The file that they are from, likewise.

    Raises:
        ValueError: As `require_unique_ids`.
    """
    require_unique_ids(entries, kind, json_file)
    return {entry["id"]: entry for entry in entries}


def require_unique_ids(entries: list[dict[str, Any]], kind: str, json_file: str) -> None:
    """Raise unless each entry has an id of its own; the arguments are those of `by_id`.

    Raises:
        ValueError: An id is missing, comes twice, or is no number where others are.
    """
    missing = next((number for number, entry in enumerate(entries) if "id" not in entry), None)
    if missing is not None:
        raise ValueError(
            f"{kind} number {missing} (from 0) of {json_file} has no id:"
            f" {shortened(entries[missing])}"
        )
    kinds = set(map(type, (entry["id"] for entry in entries)))
    if len(kinds) > 1 or not kinds <= {int, str}:
        strange = next(entry for entry in entries if type(entry["id"]) is not int)
        raise ValueError(
            f"{json_file} needs {kind} ids that are all integers, or all text: {shortened(strange)}"
        )
    repeated = [
        key for key, count in Counter(entry["id"] for entry in entries).items() if count > 1
    ]
    if repeated:
        raise ValueError(f"{json_file} uses {kind} ids more than once: {listed(repeated)}")


def listed(values: Sequence[Any], limit: int = 10) -> str:
    """Return the first values as text, and how many there are."""
    more = f", ... ({len(values)} in all)" if len(values) > limit else ""
    return ", ".join(map(str, values[:limit])) + more


def shortened(entry: dict[str, Any]) -> str:
    """Return an entry as text of at most 200 characters."""
    text = repr(entry)
    return text if len(text) <= 200 else text[:197] + "..."
