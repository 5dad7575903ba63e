"""List which of Detectron2's public names detkit answers, and why it does not answer the others.

    python benchmarks/detectron2_names.py [--all]

The names are those of `detectron2_names.txt` beside this file.
"""

import argparse
import importlib
from pathlib import Path
from typing import NamedTuple

from detkit.utils.detectron2_names import LEFT_OUT, why_left_out

LIST = Path(__file__).with_suffix(".txt")


class Name(NamedTuple):
    """A public name of Detectron2, and what became of it."""

    module: str
    name: str
    home: str
    """Where detkit defines it; empty if it does not."""
    reason: str
    """Why it is not answered; empty for a name that is, or that is missing for no reason."""


def listed_names() -> list[tuple[str, str]]:
    """Return (module, name) of each name of the list, modules relative to the package."""
    names = []
    for line in LIST.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            module, _, in_module = line.partition(": ")
            names += [(module, name) for name in in_module.split()]
    return names


def look_up(module: str, name: str) -> Name:
    """Import a name as `from detkit.MODULE import NAME` does, and say where it comes from."""
    reason = LEFT_OUT.get(f"{module}.{name}") or why_left_out(module)
    if reason:
        return Name(module, name, "", reason)
    try:
        room = importlib.import_module(f"detkit.{module}")
        if not hasattr(room, name):
            importlib.import_module(f"detkit.{module}.{name}")
        found = getattr(room, name)
    except ImportError:
        return Name(module, name, "", "")
    return Name(module, name, getattr(found, "__module__", None) or f"detkit.{module}", "")


def main() -> None:
    """Print the names without an answer, by reason; with `--all` also where the others live."""
    parser = argparse.ArgumentParser(description="Which of Detectron2's names are answered.")
    parser.add_argument("--all", action="store_true", help="also list the names that are answered")
    show_all = parser.parse_args().all
    names = [look_up(module, name) for module, name in listed_names()]
    for found in names:
        if found.home and show_all:
            print(f"{found.module}.{found.name}: {found.home}")
    for reason in sorted({found.reason for found in names if not found.home}):
        print(reason or "MISSING")
        for found in names:
            if not found.home and found.reason == reason:
                print(f"    {found.module}.{found.name}")
    num_left_out = sum(bool(found.reason) for found in names)
    num_answered = sum(bool(found.home) for found in names)
    num_missing = len(names) - num_answered - num_left_out
    print(
        f"{len(names)} names: {num_answered} answered, {num_left_out} left out on purpose,"
        f" {num_missing} missing"
    )


if __name__ == "__main__":
    main()
