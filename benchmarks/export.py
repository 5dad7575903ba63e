"""Export trained models, evaluate each file, and time eager, onnxruntime and openvino in turns.

    python benchmarks/export.py output/quick_start output/mask --output /tmp/deploy --int8

Each argument is the folder of a run with config.yaml and model_final.pth. AP is that of
DATASETS.TEST, through the file, by the evaluators of training. Times are of one image with its
resize and all that follows, in one thread: the median over images and rounds, in which all
runtimes take the same image one after the other, of CPU time, which the other users of a machine
disturb least.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from detkit.cli.errors import run_command
from detkit.config import CfgNode, get_cfg
from detkit.data import DatasetCatalog
from detkit.engine import DefaultPredictor, DefaultTrainer, prepare
from detkit.export.evaluation import evaluate_exported, headline
from detkit.export.model import export_model
from detkit.export.quantize import PRECISIONS, calibration_images, write_copies
from detkit.export.runtime import ExportedPredictor
from detkit.utils.image import read_image


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="folders of trained runs")
    add("--output", required=True, type=Path, help="folder for the exported files")
    add("--int8", action="store_true", help="int8 too, calibrated on 32 images of DATASETS.TRAIN")
    add("--fp16", action="store_true", help="float16 too")
    add("--bf16", action="store_true", help="bfloat16 too")
    add("--num-images", type=int, default=30, help="images that are timed (default: %(default)s)")
    add("--rounds", type=int, default=3, help="times that each is predicted (default: %(default)s)")
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Print the table, a row per file."""
    torch.set_num_threads(1)
    rows: list[list[Any]] = []
    for folder in args.runs:
        rows += _rows_of(folder, args)
        # All rows so far: a long run shows what it has.
        headers = ["run", "file", "MB", "AP", "ms per image", "of eager's"]
        print(
            tabulate(rows, headers, tablefmt="github", floatfmt=("", "", ".1f", "", ".1f", ".2f"))
        )


def _rows_of(folder: Path, args: argparse.Namespace) -> list[list[Any]]:
    deploy = args.output / folder.name
    cfg = _config_of(folder, deploy / "eval")
    eager = DefaultPredictor(cfg)
    files = export_model(eager.model, eager.metadata, cfg, ["onnx", "openvino"], deploy)
    for option, (_, formats) in PRECISIONS.items():
        if getattr(args, option):
            images = calibration_images(cfg, cfg.DATASETS.TRAIN[0])
            files += write_copies(files[0], option, formats, images)
    predictors: dict[str, Callable[[Any], Any]] = {"eager": eager}
    scores = {"eager": _ap(DefaultTrainer.test(cfg, eager.model))}
    sizes = {"eager": (folder / "model_final.pth").stat().st_size}
    for file in files:
        predictors[file.name] = predictor = ExportedPredictor(file, num_threads=1)
        scores[file.name] = _ap(evaluate_exported(predictor, cfg)[cfg.DATASETS.TEST[0]])
        sizes[file.name] = file.stat().st_size
        if file.suffix == ".xml":
            sizes[file.name] += file.with_suffix(".bin").stat().st_size
    times = _times(cfg, predictors, args)
    return [
        [
            folder.name,
            name,
            sizes[name] / 1e6,
            scores[name],
            times[name],
            times[name] / times["eager"],
        ]
        for name in predictors
    ]


def _config_of(folder: Path, output: Path) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(str(folder / "config.yaml"))
    weights = str(folder / "model_final.pth")
    cfg.merge_from_list(["MODEL.WEIGHTS", weights, "MODEL.DEVICE", "cpu"])
    cfg.merge_from_list(["OUTPUT_DIR", str(output), "DATALOADER.NUM_WORKERS", 0])
    prepare(cfg)
    return cfg


def _ap(results: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in headline(results).items())


def _times(
    cfg: CfgNode, predictors: Mapping[str, Callable[[Any], Any]], args: argparse.Namespace
) -> dict[str, float]:
    """Return the median time of an image in milliseconds for each predictor."""
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])[: args.num_images]
    images = [read_image(record["file_name"], "BGR") for record in records]
    seconds: dict[str, list[float]] = {name: [] for name in predictors}
    for round_ in range(args.rounds + 1):
        for image in images[: None if round_ else 3]:  # the first round warms up
            for name, predict in predictors.items():
                start = time.process_time()
                predict(image)
                if round_:
                    seconds[name].append(time.process_time() - start)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    sys.exit(main())
