"""Names from files as texts: without characters that act on what shows them, and as file names."""

import unicodedata
from collections.abc import Iterable
from pathlib import PurePath

# Control characters, halves of characters (bytes of file names that are not UTF-8), separators of
# lines and paragraphs, and formats, such as the direction of writing.
_ACTING = frozenset({"Cc", "Cs", "Zl", "Zp", "Cf"})
# Formats without which Persian, Hindi and emojis are spelt wrongly.
_JOINERS = frozenset("\u200c\u200d")


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
