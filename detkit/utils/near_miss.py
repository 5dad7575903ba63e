"""Suggestions for misspelt names in error messages."""

import difflib
from collections.abc import Iterable


def near_misses(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Return the known names closest to a misspelt one, best first.

    A name that differs in case only, or that ends like the given one (a config key without its
    parents), counts as close even if most letters differ.

    Args:
        name: The misspelt name.
        known: The legal names.
        limit: Largest number of names returned.

    Example:
        >>> from detkit.utils.near_miss import near_misses
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
