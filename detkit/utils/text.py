"""Names and values in messages: printable, shortened, listed, suggested; and as file names."""

import difflib
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

# Control characters, halves of characters (bytes of file names that are not UTF-8), separators of
# lines and paragraphs, and formats, such as the direction of writing.
_ACTING = frozenset({"Cc", "Cs", "Zl", "Zp", "Cf"})
# Formats without which Persian, Hindi and emojis are spelt wrongly.
_JOINERS = frozenset("\u200c\u200d")
# File systems take 255, of which endings and other parts of a name need some.
_MAX_BYTES = 150
# What a file name must not contain, including on Windows; `%` is escaped as well, so that different
# names stay different.
_SPECIAL = re.compile(r'^\.|[\x00-\x1f\x7f/\\%:*?"<>|]')


def printable(text: str, *, keep: str = "") -> str:
    """Return a text whose control characters are written out, as in `\\x1b` and `\\n`.

    Whatever comes from a file may clear a terminal or end a line, and so forge the next one.

    Args:
        text: Of any origin.
        keep: Characters to leave as they are.

    Example:
        >>> printable("red\\x1b[31m\\nerror: größe")
        'red\\\\x1b[31m\\\\nerror: größe'
    """
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _ACTING
        and character not in _JOINERS
        and character not in keep
        else character
        for character in text
    )


def distinct_names(names: Iterable[str]) -> list[str]:
    """Make file names distinct, by a number after the stem of those that repeat.

    Names that differ only in case count as equal, as on macOS and Windows.

    Example:
        >>> distinct_names(["a.jpg", "A.jpg", "a.png"])
        ['a.jpg', 'A_2.jpg', 'a.png']
    """
    distinct: dict[str, str] = {}
    for name in names:
        path, candidate, number = PurePath(name), name, 2
        while candidate.casefold() in distinct:
            candidate, number = f"{path.stem}_{number}{path.suffix}", number + 1
        distinct[candidate.casefold()] = candidate
    return list(distinct.values())


def file_stem(name: str) -> str:
    """Return a name, such as that of a data set, as a part of a path that stays in its folder.

    Different names stay different; those without separators and other special characters, without
    a dot at the start, and of at most 150 bytes stay as they are.

    Example:
        >>> file_stem("my.cells_val"), file_stem("../x")
        ('my.cells_val', '%2E.%2Fx')
    """
    stem = _SPECIAL.sub(lambda match: f"%{ord(match[0]):02X}", name)
    if len(stem.encode()) <= _MAX_BYTES:
        return stem
    return f"{stem[:30]}%{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def near_misses(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Return the known names closest to a misspelt one, best first.

    A name that differs in case only, or that ends like the given one (a config key without its
    parents), counts as close even if most letters differ.

    Args:
        name: The misspelt name.
        known: The legal names.
        limit: Largest number of names returned.

    Example:
        >>> from detkit.utils.text import near_misses
        >>> near_misses("RPN.NMS_THRESH", ["MODEL.RPN.NMS_THRESH", "SOLVER.STEPS"])
        ['MODEL.RPN.NMS_THRESH']
    """
    known = list(known)
    lowered = name.lower()
    exact = [k for k in known if k.lower() == lowered or k.lower().endswith("." + lowered)]
    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.6)
    if "." not in name:
        return list(dict.fromkeys(exact + close))[:limit]

    # In dotted names, the last part may be (nearly) right and the parents wrong.
    by_leaf: dict[str, list[str]] = {}
    for k in known:
        by_leaf.setdefault(_leaf(k), []).append(k)
    same_leaf: list[str] = []
    for leaf in difflib.get_close_matches(_leaf(name), by_leaf, n=2, cutoff=0.8):
        same_leaf += by_leaf[leaf]
    # A unique last part is a better hint than parents that many names share.
    only = by_leaf.get(_leaf(name), [])
    only = only if len(only) == 1 else []
    return list(dict.fromkeys(exact + only + close + same_leaf))[:limit]


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'X' or 'Y'?` with a leading space, or "" if no name is close."""
    close = near_misses(name, known)
    if not close:
        return ""
    return " Did you mean " + " or ".join(repr(c) for c in close) + "?"


def counted(count: int, one: str, many: str) -> str:
    """Return a number with its noun.

    Example:
        >>> counted(1, "image", "images"), counted(800, "image", "images")
        ('1 image', '800 images')
    """
    return f"{count} {one if count == 1 else many}"


def listed(values: Sequence[Any], limit: int = 10) -> str:
    """Return the first values as text, and how many there are.

    Example:
        >>> listed(["a", "b", "c"], limit=2)
        'a, b, ... (3 in all)'
    """
    more = f", ... ({len(values)} in all)" if len(values) > limit else ""
    return ", ".join(map(str, values[:limit])) + more


def cut(text: str, limit: int = 200) -> str:
    """Return a text with `...` for what is beyond `limit` characters."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def shortened(value: Any, limit: int = 200) -> str:
    """Return the `repr` of a value, cut to `limit` characters."""
    return cut(repr(value), limit)
