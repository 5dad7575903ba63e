"""`detkit convert-weights`: rename weights of others to detkit's names, or change their format."""

import argparse
import dataclasses
from collections.abc import Sequence

import torch
from tabulate import tabulate
from torch import Tensor

from detkit.checkpoint import (
    LoadReport,
    Translation,
    check_depth,
    check_weight_format,
    fold_frozen_eps,
    load_checkpoint_file,
    match_weights,
    published_file_name,
    save_weights_file,
    strip_wrapper_prefixes,
    translate_for,
    translate_for_file,
)
from detkit.cli.errors import run_command
from detkit.cli.parsers import PARSERS
from detkit.config import get_cfg
from detkit.model_zoo import find_config
from detkit.modeling import build_model
from detkit.utils.errors import ConfigError
from detkit.utils.text import printable

_DOES_NOT_FILL = 1


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit status; see `detkit.cli.command.main`."""
    return run_command(convert, PARSERS["convert-weights"](prog).parse_args(argv))


def convert(args: argparse.Namespace) -> int:
    """Translate, write and report; return the exit status."""
    check_weight_format(args.output)
    checkpoint = load_checkpoint_file(args.input)
    model_state = _model_state(args)
    unwrapped = strip_wrapper_prefixes(checkpoint["model"], model_state)
    weights = {unwrapped[name]: value for name, value in checkpoint["model"].items()}
    file_name = published_file_name(args.input)
    if model_state:
        by_suffix = checkpoint.get("matching_heuristics") is True
        translation = translate_for(weights, model_state, file_name, by_suffix=by_suffix)
    else:
        translation = translate_for_file(weights, file_name)
    translation = translation or Translation("", weights, {})
    if args.frozen_bn_eps is not None:
        fold_frozen_eps(translation, args.frozen_bn_eps)
    check_depth(translation.weights, model_state, args.input)
    chosen, report = match_weights(translation.weights, model_state or translation.weights)
    report = dataclasses.replace(report, layout=translation.layout, renamed=translation.renamed)
    metadata = checkpoint.get("metadata") or {}
    if translation.class_names is not None:
        metadata = {"thing_classes": translation.class_names, **metadata}
    save_weights_file(chosen, args.output, metadata)
    print(_table(report, translation))
    for remark in translation.remarks:
        print(printable(remark))
    print(
        f"{translation.layout or 'the names are left as they are'}; {report.summary()}; written to"
        f" {args.output}"
    )
    return 0 if report.is_complete else _DOES_NOT_FILL


def _model_state(args: argparse.Namespace) -> dict[str, Tensor]:
    """Return the names and shapes of the model of the config; empty without one."""
    if not args.config_file:
        if args.opts:
            raise ConfigError(
                f"settings need a --config-file that they change: {' '.join(args.opts)}"
            )
        return {}
    cfg = get_cfg()
    cfg.merge_from_file(find_config(args.config_file))
    cfg.merge_from_list([*args.opts, "MODEL.DEVICE", "cpu"])
    with torch.random.fork_rng(devices=[]):
        return build_model(cfg).state_dict()


def _table(report: LoadReport, translation: Translation) -> str:
    """Return a table with one line per tensor: its status, its names and its shape."""
    name_in_file = {new: old for old, new in report.renamed.items()}
    unexpected = {*report.unexpected, *translation.unrecognised}

    def shape(name: str) -> str:
        return "x".join(map(str, translation.weights[name].shape)) or "number"

    rows = []
    for name in report.matched:
        status = "renamed" if name in name_in_file else "matched"
        if name in unexpected:
            status = "unexpected"
        rows.append((status, name_in_file.get(name, name), name, shape(name)))
    for name in report.unexpected:
        rows.append(("unexpected", name_in_file.get(name, name), "", shape(name)))
    for name, (in_file, in_model) in report.mismatched.items():
        shapes = f"{in_file}, not {in_model}"
        rows.append(("other shape", name_in_file.get(name, name), name, shapes))
    rows += [("missing", "", name, "") for name in report.missing]
    headers = ["", "name in the file", "name in detkit", "shape"]
    cells = [map(printable, row) for row in rows]
    return tabulate(cells, headers=headers, tablefmt="plain")
