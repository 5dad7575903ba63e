"""Suggestions for misspelt names, in every error message that knows what it could have been."""

import difflib
from collections.abc import Iterable


def near_misses(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Return the known names closest to a misspelt one, best first.

    A name that differs in case only, or that ends like the given one (a config key given without
    its parents), counts as close even where most letters differ.

    Args:
        name: What the caller wrote.
        known: The legal names.
        limit: At most this many are given.
    """
    known = list(known)
    lowered = name.lower()
    exact = [k for k in known if k.lower() == lowered or k.lower().endswith("." + lowered)]
    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.6)
    same_leaf = _same_leaf_matches(name, known)
    # A last part that only one name has says more than parents that many share.
    right_leaf = [k for k in known if _leaf(k) == _leaf(name)]
    only = right_leaf if len(right_leaf) == 1 else []
    return list(dict.fromkeys(exact + only + close + same_leaf))[:limit]


def _same_leaf_matches(name: str, known: list[str]) -> list[str]:
    """Dotted names whose last part is close to the last part of `name`: the key is right, its
    parent is not.
    """
    if "." not in name:
        return []
    by_leaf: dict[str, list[str]] = {}
    for k in known:
        by_leaf.setdefault(_leaf(k), []).append(k)
    return [
        k
        for close in difflib.get_close_matches(_leaf(name), by_leaf, n=2, cutoff=0.8)
        for k in by_leaf[close]
    ]


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the sentence ` Did you mean 'X' or 'Y'?` with a leading space, or an empty string when
    nothing is close.
    """
    close = near_misses(name, known)
    if not close:
        return ""
    return " Did you mean " + " or ".join(repr(c) for c in close) + "?"
