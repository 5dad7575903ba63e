"""`detkit config`: explain settings, show those of a config, compare two configs."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from detkit.cli.errors import run_command
from detkit.cli.parsers import PARSERS
from detkit.config import CfgNode, explain, get_cfg
from detkit.model_zoo import find_config


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit status; see `detkit.cli.command.main`."""
    args = PARSERS["config"](prog).parse_args(argv)
    actions = {"explain": _explain, "show": _show, "diff": _diff}
    return run_command(actions[args.action], args)


def _explain(args: argparse.Namespace) -> None:
    print("\n\n".join(map(explain, args.keys)))


def _show(args: argparse.Namespace) -> None:
    cfg = _read(args.file)
    if not args.changed:
        print(cfg.dump(), end="")
        return
    tree: dict[str, Any] = {}
    for key, (_, value) in _differences(get_cfg(), cfg).items():
        *groups, name = key.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = value
    print(yaml.safe_dump(tree, sort_keys=True), end="")


def _diff(args: argparse.Namespace) -> None:
    lines = [
        f"{key}: {old!r} -> {new!r}"
        for key, (old, new) in _differences(_read(args.a), _read(args.b)).items()
    ]
    print("\n".join(lines) or "no difference")


def _read(path_or_name: str) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(find_config(path_or_name))
    return cfg


def _differences(old: CfgNode, new: CfgNode) -> dict[str, tuple[Any, Any]]:
    """Return the values of the keys in which two configs differ; None stands for a missing key."""
    before, after = _leaves(old), _leaves(new)
    keys = dict.fromkeys([*before, *after])  # MODEL.CUSTOM may have keys in one alone
    pairs = {key: (before.get(key), after.get(key)) for key in keys}
    return {key: (a, b) for key, (a, b) in pairs.items() if a != b}


def _leaves(cfg: CfgNode) -> Mapping[str, Any]:
    return {key: cfg.get_by_full_key(key) for key in cfg.keys_of_leaves()}
