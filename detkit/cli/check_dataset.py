"""`detkit check-dataset`: look for faults in the images and annotations of a config's data."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from detkit.checkpoint import load_checkpoint_file
from detkit.cli.errors import run_command
from detkit.cli.parsers import PARSERS
from detkit.config import CfgNode, get_cfg
from detkit.data.datasets.formats.write import emptied_after_errors
from detkit.data.doctor import AnchorLevel, Report, check_datasets, page_of, write_cleaned
from detkit.engine import prepare
from detkit.model_zoo import find_config
from detkit.modeling import anchors_per_level, build_model
from detkit.utils.errors import ConfigError
from detkit.utils.text import counted, printable

_SHOWN = 3  # examples of a finding on the console


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        argv: Words of the command line; None takes those of this process.
        prog: Name of the command in its help.
    """
    return run_command(run, PARSERS["check-dataset"](prog).parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Check, print and write the reports; return 1 if there is something to settle."""
    workers = min(os.cpu_count() or 1, 8) if args.workers is None else args.workers
    if workers < 0:
        raise ConfigError(f"--workers must be at least 0, got {workers}")
    for file in filter(None, (args.json, args.html)):  # before the work is done
        path = Path(file).expanduser()
        if path.is_dir():
            raise ConfigError(f"{file} is a folder: name a file for the report")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ConfigError(f"{file} cannot be written: no permission")
    output = Path(args.fix).expanduser() if args.fix else None
    if output is not None:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ConfigError(f"--fix {output} exists and is not empty: name another folder")
        output.mkdir(parents=True, exist_ok=True)
    cfg = get_cfg()
    cfg.merge_from_file(find_config(args.config_file))
    cfg.merge_from_list(args.opts)
    prepare(cfg)
    cfg.freeze()
    if not cfg.DATASETS.TRAIN and not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TRAIN and DATASETS.TEST are empty: there is nothing to check")
    report = check_datasets(
        cfg,
        num_workers=workers,
        checkpoint_classes=_classes_of_weights(cfg),
        anchors=_anchors_of_model(cfg),
    )
    print_report(report)
    if args.json:
        _write(args.json, json.dumps(report.as_json(), indent=1))
    if args.html:
        title = f"Data of {Path(args.config_file).name}"
        _write(args.html, page_of(report, title, cfg.INPUT.FORMAT, cfg.INPUT.MAX_IMAGE_PIXELS))
    if output is not None:
        with emptied_after_errors(output):
            _write_cleaned(report, output, needs_masks=cfg.MODEL.MASK_ON)
    counts = report.findings.counts()
    return int(counts["error"] > 0 or (args.strict and counts["warning"] > 0))


def _write(file: str, text: str) -> None:
    path = Path(file).expanduser()
    path.write_text(text, encoding="utf-8")
    print(printable(f"wrote {path}"))


def _write_cleaned(report: Report, output: Path, *, needs_masks: bool) -> None:
    entries, changes = write_cleaned(report, output, needs_masks=needs_masks)
    path = output / "changes.json"
    path.write_text(json.dumps(changes, indent=1), encoding="utf-8")
    print(printable(f"wrote {counted(len(changes), 'change', 'changes')} to {path}"))
    left = [f.code for f in report.findings if not f.fix and f.severity != "note"]
    left = [code for code in left if code not in {change["code"] for change in changes}]
    if left:
        print(f"left as they are: {', '.join(dict.fromkeys(left))}")
    clean = {name: f"{name}_clean" for name in report.records}
    written = [entry["name"] for entry in entries]
    uses = {"TRAIN": report.train, "TEST": report.test}
    sets = {use: [clean[n] for n in names if clean[n] in written] for use, names in uses.items()}
    settings = {"DATASETS": {"REGISTER": entries, **sets}}
    print(f"\n{yaml.safe_dump(settings, sort_keys=False)}", end="")


def _anchors_of_model(cfg: CfgNode) -> list[AnchorLevel]:
    """Return the anchors of the config's model, which is built for that, without weights."""
    on_cpu = cfg.clone()
    on_cpu.defrost()
    on_cpu.MODEL.DEVICE = "cpu"
    return [AnchorLevel(*level) for level in anchors_per_level(build_model(on_cpu))]


def _classes_of_weights(cfg: CfgNode) -> Sequence[str]:
    """Return the names of the classes of MODEL.WEIGHTS, if it is a local file that has them."""
    path = cfg.MODEL.WEIGHTS
    if not path or "://" in path:  # nothing is downloaded for that
        return ()
    metadata = load_checkpoint_file(path).get("metadata")
    return (metadata.get("thing_classes") or ()) if isinstance(metadata, dict) else ()


def print_report(report: Report) -> None:
    """Print the findings, the worst last, where a terminal shows them."""
    for name, records in report.records.items():
        objects = sum(len(record.get("annotations", ())) for record in records)
        images = counted(len(records), "image", "images")
        print(printable(f"{name}: {images}, {counted(objects, 'annotation', 'annotations')}"))
    if report.anchors:
        print(f"anchors meet {report.anchors['recall']:.1%} of the objects at IoU 0.5")
    for finding in reversed(list(report.findings)):
        count = f" ({finding.count})" if finding.count > 1 else ""
        head = f"{finding.severity}: {finding.title}{count}"
        print(f"\n{printable(head)}  [{finding.code}] in {printable(finding.dataset)}")
        for example in finding.examples[:_SHOWN]:
            annotation = "" if example.annotation is None else f"annotation {example.annotation}"
            parts = [example.file, annotation, example.detail]
            print(printable(f"    {': '.join(part for part in parts if part)}"))
        if finding.count > _SHOWN:
            print("    ...")
        print(printable(f"  -> {finding.remedy}"))
    counts = report.findings.counts()
    print(
        f"\n{counted(counts['error'], 'error', 'errors')},"
        f" {counted(counts['warning'], 'warning', 'warnings')},"
        f" {counted(counts['note'], 'note', 'notes')}"
    )
