"""`detkit convert-dataset`: bring a data set of any format into that of COCO, VOC or YOLO."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from detkit.cli.errors import run_command
from detkit.cli.parsers import PARSERS
from detkit.config import get_cfg
from detkit.data import DatasetCatalog, register_declared_datasets
from detkit.data.datasets.coco_export import class_names_of
from detkit.data.datasets.formats.detect import detect_dataset
from detkit.data.datasets.formats.write import emptied_after_errors, write_dataset
from detkit.data.record_files import require_files
from detkit.model_zoo import find_config
from detkit.structures import ImageRecord
from detkit.utils.errors import ConfigError
from detkit.utils.logger import setup_logger
from detkit.utils.text import counted, file_stem, printable


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        argv: Words of the command line; None takes those of this process.
        prog: Name of the command in its help.
    """
    return run_command(convert, PARSERS["convert-dataset"](prog).parse_args(argv))


def convert(args: argparse.Namespace) -> None:
    """Read, write and report."""
    setup_logger()  # readers say what they leave out
    output = Path(args.output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} exists and is not empty: name another folder")
    if args.config_file:
        cfg = get_cfg()
        cfg.merge_from_file(find_config(args.config_file))
        register_declared_datasets(cfg.DATASETS.REGISTER)
    names, found = {args.input: args.input}, {}
    if args.input not in DatasetCatalog:
        found = detect_dataset(str(Path(args.input).expanduser()))
        for split, entry in found.items():
            fields = ", ".join(f"{k} {v}" for k, v in entry.items())
            print(printable(f"found {split}: {fields}"))
        names = _registered(found, args.input)
    records = {split: DatasetCatalog.get(name) for split, name in names.items()}
    if found:
        per_split = [class_names_of(name) for name in names.values()]
        if any(classes != per_split[0] for classes in per_split):
            # Formats without a list of classes number those of which a split has objects.
            union = sorted({name for classes in per_split for name in classes})
            with_union = {split: {**entry, "classes": union} for split, entry in found.items()}
            names = _registered(with_union, f"{args.input}, with all classes")
            records = {split: DatasetCatalog.get(name) for split, name in names.items()}
    for split, name in names.items():
        require_files(name, records[split])  # before anything is written
    with emptied_after_errors(output):
        written = [
            _write(split, name, records[split], output, args) for split, name in names.items()
        ]
    print(f"\n{yaml.safe_dump({'DATASETS': {'REGISTER': written}}, sort_keys=False)}", end="")


def _write(
    split: str, name: str, records: Sequence[ImageRecord], output: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Write a split, print what is lost, and return its entry for DATASETS.REGISTER."""
    part = file_stem(split)  # a data set may have any name
    entry, lost = write_dataset(name, records, str(output), args.to, part, link=args.link)
    objects = sum(len(record.get("annotations", ())) for record in records)
    images = counted(len(records), "image", "images")
    print(printable(f"wrote {split}: {images}, {counted(objects, 'object', 'objects')} read"))
    for what, count in lost.items():
        print(f"  lost: {what}: {count}")
    return {"name": f"{output.resolve().name}_{part}", **entry}


def _registered(found: Mapping[str, Mapping[str, Any]], source: str) -> dict[str, str]:
    """Register detected data sets, and return their names by split."""
    names = {split: f"{split} of {source}" for split in found}
    register_declared_datasets([{**entry, "name": names[s]} for s, entry in found.items()])
    return names
