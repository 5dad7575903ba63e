"""Regular expressions of the user, searched in the names of tensors for a bounded time."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

from detkit.utils.text import did_you_mean

_SECONDS = 10
_SEARCH = """
import json, re, sys
pattern, names = json.load(sys.stdin)
json.dump([name for name in names if re.search(pattern, name)], sys.stdout)
"""


def names_with(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names in which a regular expression is found.

    Raises:
        ValueError: The pattern is not a regular expression.
        ValueError: The search takes more than 10 seconds.
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r:.200} is not a regular expression: {error}") from error
    names = list(names)
    if "(" not in pattern and len(re.findall(r"[*+?{]", pattern)) <= 2:
        return [name for name in names if compiled.search(name)]
    # Repetitions of groups, as in `(a+)+$` or `(a|a)*$`, and many repetitions may search longer
    # than anybody waits, and nothing inside of the process can end that.
    try:
        found = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _SEARCH],
            input=json.dumps([pattern, names]),
            capture_output=True,
            check=True,
            text=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{pattern!r:.200} takes more than {_SECONDS} s to search: write it without repetitions"
            " of repetitions, such as (a+)+"
        ) from None
    return json.loads(found.stdout)


def close_names(pattern: str, known: Sequence[str]) -> str:
    """Return ` Did you mean ...?` for a pattern that is found nowhere, or ""."""
    # Near misses compare names, so the syntax of regular expressions is removed.
    return did_you_mean(re.sub(r"\\(.)", r"\1", pattern).strip("^$.*"), known)
