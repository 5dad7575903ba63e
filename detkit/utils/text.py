"""Names from files as texts: without characters that act on what shows them, and as file names."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from pathlib import PurePath

# Control characters, halves of characters (bytes of file names that are not UTF-8), separators of
# lines and paragraphs, and formats, such as the direction of writing.
_ACTING = frozenset({"Cc", "Cs", "Zl", "Zp", "Cf"})
# Formats without which Persian, Hindi and emojis are spelt wrongly.
_JOINERS = frozenset("\u200c\u200d")
# File systems take 255, of which endings and other parts of a name need some.
_MAX_BYTES = 150
# What must not be in the name of a file, on Windows neither; `%` keeps different names different.
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
    """Return file names of which no two are equal, by a number after the stem where needed.

    Names that differ in case only count as equal, as they do on macOS and Windows.

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
