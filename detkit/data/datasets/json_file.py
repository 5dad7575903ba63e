"""Annotation files in JSON: their lists, the ids in them, and the folder of the files they name."""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import PurePath
from typing import Any

from detkit.utils.errors import DataError
from detkit.utils.file_io import read_file
from detkit.utils.remote_files import is_address, join_address
from detkit.utils.text import did_you_mean, listed, shortened

_NUMBERS = frozenset((int, float))
_LARGEST_ID = 2**63


def read_json(json_file: str) -> dict[str, Any]:
    """Return the content of an annotation file.

    Raises:
        MissingFileError: The file does not exist.
        DataError: It is not valid JSON, or not an object.
    """
    data = read_file(json_file, "annotation file")
    try:
        # From bytes: then `json` itself sees a byte order mark, and UTF-16 of Windows' tools.
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        # Not `JSONDecodeError`: a number of thousands of digits is a plain ValueError.
        hint = ""
        if data.startswith(b"version https://git-lfs"):
            hint = ". It is a pointer of Git LFS: `git lfs pull` fetches the file"
        elif isinstance(error, UnicodeDecodeError):
            hint = ". It must be text in UTF-8: save it so, and unpack it if it is an archive"
        raise DataError(f"annotation file {json_file} is not valid JSON: {error}{hint}") from error
    if not isinstance(content, dict):
        raise DataError(
            f"annotation file {json_file} must hold an object with images, annotations and"
            f" categories; it holds a {type(content).__name__}. A list is COCO's format for"
            " results, not for ground truth."
        )
    return content


def section(content: dict[str, Any], key: str, json_file: str) -> list[dict[str, Any]]:
    """Return one of the lists of an annotation file.

    Raises:
        DataError: The file does not have it, or it is not a list of objects.
    """
    entries = content.get(key)
    if entries is None:
        raise DataError(
            f"annotation file {json_file} has no {key!r}, only"
            f" {sorted(content)}.{did_you_mean(key, content.keys() - {key})}"
        )
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{key!r} of annotation file {json_file} must be a list of objects")
    return entries


def by_id(entries: list[dict[str, Any]], kind: str, json_file: str) -> dict[Any, dict[str, Any]]:
    """Return entries by their id.

    Args:
        entries: Objects of one list.
        kind: What they are, for messages: `image`.
        json_file: The file that they are from, for messages.

    Raises:
        DataError: See `require_unique_ids`.
    """
    require_unique_ids(entries, kind, json_file)
    return {entry["id"]: entry for entry in entries}


def require_unique_ids(entries: list[dict[str, Any]], kind: str, json_file: str) -> None:
    """Check that each entry has an id of its own; the arguments are those of `by_id`.

    Raises:
        DataError: An entry has no id.
        DataError: The ids are neither all integers nor all text, or are larger than 64 bits.
        DataError: Two entries have the same id.
    """
    ids: list[Any] = [entry.get("id") for entry in entries]
    # Nearly always; of 860,000 annotations, the thorough checks take most of a second.
    is_plain = set(map(type, ids)) == {int} and -_LARGEST_ID <= min(ids) <= max(ids) <= _LARGEST_ID
    if is_plain and len(set(ids)) == len(ids):
        return
    for number, entry in enumerate(entries):
        if "id" not in entry:
            raise DataError(
                f"{kind} number {number} (from 0) of {json_file} has no id: {shortened(entry)}"
            )
        if type(entry["id"]) is float and entry["id"].is_integer():
            entry["id"] = int(entry["id"])
    kinds = {type(entry["id"]) for entry in entries}
    if len(kinds) > 1 or not kinds <= {int, str}:
        strange = next(entry for entry in entries if type(entry["id"]) is not int)
        raise DataError(
            f"{json_file} needs {kind} ids that are all integers, or all text: {shortened(strange)}"
        )
    require_ids_of_64_bits((entry["id"] for entry in entries), kind, json_file)
    counts = Counter(entry["id"] for entry in entries)
    repeated = [key for key, count in counts.items() if count > 1]
    if repeated:
        raise DataError(f"{json_file} uses {kind} ids more than once: {listed(repeated)}")


def require_ids_of_64_bits(ids: Iterable[Any], kind: str, json_file: str) -> None:
    """Raise a DataError if an id is an integer of more than 64 bits."""
    # Python's hash of an integer is the rest of a division by 2^61 - 1: a dictionary of its
    # multiples would take hours.
    for value in ids:
        if type(value) is int and not -_LARGEST_ID <= value <= _LARGEST_ID:
            raise DataError(
                f"{json_file} has the {kind} id {shortened(value, 40)}, need integers of at most 64"
                " bits, or text"
            )


def known_id(value: Any, known: Collection[Any]) -> Any:
    """Return the id among `known` that a reference means; None if there is none.

    Tools write `"1"` or 1.0 where the list that it points to has 1, or the other way round.
    """
    spellings: list[Any] = []
    # true equals 1, and means no id.
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        spellings = [value, str(value)]
    if isinstance(value, str):
        number = as_number(value)
        if str(number) == value.strip():
            spellings.append(number)
    return next((spelling for spelling in spellings if spelling in known), None)


def as_number(value: Any) -> int | float | None:
    """Return a number, also one that is written as text; None for anything else."""
    if isinstance(value, str):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(value)
        return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def as_numbers(values: Any) -> list[Any] | None:
    """Return a list of numbers, where some may be written as text; None for anything else."""
    if not isinstance(values, list):
        return None
    # By type rather than by isinstance, in an eighth of the time: all polygons of COCO's training
    # set go through here.
    if _NUMBERS.issuperset(map(type, values)):
        return values
    numbers = list(map(as_number, values))
    return None if None in numbers else numbers


class DataFolder:
    """The folder that the file names in an annotation file are relative to.

    Names that lead out of it are refused. If the annotations have absolute paths, give a folder
    above them all: "/" allows any. Symbolic links are not followed here: a link in the folder is
    meant to lead out.
    """

    def __init__(self, root: str, named_in: str) -> None:
        """Take the folder, a path or an address such as s3://, and the annotation file, for
        messages.
        """
        self.root = root
        self.named_in = named_in
        self._normal_root = os.path.normpath(root)
        self._is_address = is_address(root)

    def path_of(self, name: str) -> str:
        """Return the path of a file.

        Raises:
            DataError: It lies outside of the folder.
        """
        # Nearly all names are plain; the thorough check takes more than a second for a hundred
        # thousand of them.
        is_suspicious = (
            ".." in name or name.startswith("/") or "\\" in name or ":" in name or "\0" in name
        )
        if is_suspicious and not self._contains(name):
            raise DataError(
                f"{self.named_in} names the image {name!r}, which lies outside of the image folder"
                f" {self.root!r}. Give a folder that holds all images ('/' where the names are"
                " absolute paths)."
            )
        if self._is_address:
            return join_address(self.root, name)
        return os.path.join(self.root, name)

    def _contains(self, name: str) -> bool:
        if self._is_address and (name.startswith("/") or "::" in name):
            return False  # "::" would name another archive or store
        path = PurePath(os.path.normpath(os.path.join(self._normal_root, name)))
        # Every relative path counts as relative to ".", also "..".
        leaves_current = self._normal_root == "." and path.parts[:1] == ("..",)
        is_below = path.is_relative_to(self._normal_root)
        return is_below and not leaves_current and "\0" not in name
