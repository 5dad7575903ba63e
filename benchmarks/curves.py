"""Measure how time and memory grow with the work, and draw a curve each (Linux, matplotlib).

    python benchmarks/curves.py --output curves
    python benchmarks/curves.py detections records --output curves --quick

Every point is measured in a process of its own: processor seconds of one call after a warm-up
(records: of one call), and how far its resident memory rises above that before the calls. Models
have random weights; a low score threshold keeps as many detections as the curve needs. Of several
processes (workers, processes) it is the processor seconds of all of them per image, and the memory
that each has written for itself; seconds by the clock, which need a quiet machine, are printed.
"""

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contest import processor_seconds
from data_loading import write_record
from pairs import Task, config_step

from detkit.cli.errors import run_command
from detkit.config import CfgNode
from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.data.build import build_detection_train_loader
from detkit.engine import launch
from detkit.evaluation import COCOEvaluator
from detkit.model_zoo import get_config
from detkit.modeling import build_model
from detkit.structures import BitMasks, Boxes, BoxMode, ImageRecord, Instances, ModelInput
from detkit.utils import comm
from detkit.utils.env import garbage_collection_off, reuse_freed_memory
from detkit.utils.errors import MissingPackageError, UnknownNameError
from detkit.utils.events import EventStorage
from detkit.utils.text import did_you_mean

_SMALL = "quick_start/mask_rcnn_R_18_FPN_shapes.yaml"
_LARGE = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"


@dataclass(frozen=True)
class Curve:
    """What grows, and what is called at each of its values.

    Attributes:
        title: Of the plot.
        values: Along its x axis; `--quick` takes the first three.
        prepare: Takes a value and returns the function to measure.
        is_called_once: Whether the first call counts; else one before it warms up.
        has_processes: Whether the call starts processes, and returns the numbers of the point:
            `seconds`, `peak_mb`, and `clock` for seconds by the clock.
    """

    title: str
    values: tuple[int, ...]
    prepare: Callable[[int], Callable[[], Any]]
    is_called_once: bool = False
    has_processes: bool = False


def _model(config: str, *settings: Any) -> tuple[CfgNode, torch.nn.Module]:
    torch.manual_seed(0)
    reuse_freed_memory()
    cfg = get_config(config)
    cfg.merge_from_list(["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", *settings])
    return cfg, build_model(cfg)


def _inference(config: str, side: int, count: int, *settings: Any) -> Callable[[], object]:
    _, model = _model(config, *settings)
    model.eval()
    inputs = [{"image": torch.randint(0, 255, (3, side, side)).byte()} for _ in range(count)]

    def infer() -> object:
        with torch.no_grad():
            return model(inputs)

    return infer


def _objects(count: int) -> Callable[[], object]:
    """A training step with masks on one image of 512 x 512."""
    _, model = _model(_SMALL)
    side = 512
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(count, 2, generator=generator) * (side - 40)
    boxes = torch.cat([corners, corners + 10 + 30 * torch.rand(count, 2)], dim=1)
    masks = torch.zeros(count, side, side, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    instances = Instances(
        (side, side),
        gt_boxes=Boxes(boxes),
        gt_classes=torch.zeros(count, dtype=torch.int64),
        gt_masks=BitMasks(masks),
    )
    batch = [{"image": torch.randint(0, 255, (3, side, side)).byte(), "instances": instances}]

    def step() -> object:
        with EventStorage():
            torch.stack(list(model(batch).values())).sum().backward()
        model.zero_grad()

    return step


def _records(count: int) -> Callable[[], object]:
    """A training loader over so many records with seven boxes each, which are there already."""
    generator = np.random.default_rng(0)
    boxes = generator.uniform(0, 200, (count, 7, 4)).tolist()
    classes = generator.integers(0, 80, (count, 7)).tolist()
    with garbage_collection_off():
        records: list[ImageRecord] = [
            {
                "file_name": f"images/{number:012d}.jpg",
                "image_id": number,
                "height": 480,
                "width": 640,
                "annotations": [
                    {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": c, "iscrowd": 0}
                    for box, c in zip(boxes[number], classes[number], strict=True)
                ],
            }
            for number in range(count)
        ]
    DatasetCatalog.register("curve", lambda: records)
    MetadataCatalog.get("curve").thing_classes = [str(number) for number in range(80)]
    cfg = get_config(_LARGE)
    cfg.merge_from_list(["DATASETS.TRAIN", ["curve"], "DATALOADER.NUM_WORKERS", 0])

    def start() -> object:
        return build_detection_train_loader(cfg, mapper=lambda record: record)

    return start


def _detections(count: int) -> Callable[[], object]:
    """COCO's AP of so many boxes on 80 classes."""
    from coco_scoring import synthetic_detections

    from detkit.evaluation.coco.results import CocoProtocol
    from detkit.evaluation.coco.scoring import score_detections

    truth, detections = synthetic_detections(max(1, count // 38))
    return lambda: score_detections(truth, detections, CocoProtocol())


def _masks(count: int) -> Callable[[], object]:
    """`COCOEvaluator` over images of 480 x 640 with 100 detected masks each, scored."""
    side, per_image = (480, 640), 100
    generator = np.random.default_rng(0)

    def detected() -> Instances:
        corners = generator.uniform(0, 1, (per_image, 2)) * (440, 600)
        boxes = np.concatenate([corners, corners + generator.uniform(8, 40, (per_image, 2))], 1)
        masks = torch.zeros(per_image, *side, dtype=torch.bool)
        for mask, (y1, x1, y2, x2) in zip(masks, boxes.astype(int).tolist(), strict=True):
            mask[y1:y2, x1:x2] = True
        return Instances(
            side,
            pred_boxes=Boxes(torch.as_tensor(boxes[:, [1, 0, 3, 2]]).float()),
            pred_masks=masks,
            pred_classes=torch.zeros(per_image, dtype=torch.int64),
            scores=torch.rand(per_image),
        )

    box = [100.0, 100.0, 150.0, 150.0]
    outline = [box[0], box[1], box[2], box[1], box[2], box[3], box[0], box[3]]
    records: list[ImageRecord] = [
        {
            "file_name": f"{number}.jpg",
            "image_id": number,
            "height": side[0],
            "width": side[1],
            "annotations": [
                {
                    "bbox": box,
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": 0,
                    "iscrowd": 0,
                    "segmentation": [outline],
                }
            ],
        }
        for number in range(count // per_image)
    ]
    DatasetCatalog.register("curve_masks", lambda: records)
    MetadataCatalog.get("curve_masks").thing_classes = ["thing"]
    evaluator = COCOEvaluator("curve_masks", tasks=["bbox", "segm"])

    def evaluate() -> object:
        evaluator.reset()
        for number in range(count // per_image):
            model_input: ModelInput = {"image": torch.empty(0), "image_id": number}
            evaluator.process([model_input], [{"instances": detected()}])
        return evaluator.evaluate()

    return evaluate


def _workers(count: int) -> Callable[[], dict[str, float]]:
    """Images of 480 x 640 from JPEG files to batches at 800 x 1067, by so many workers."""
    num_images = 400
    folder = tempfile.TemporaryDirectory(prefix="detkit-benchmark-")
    record = write_record(Path(folder.name))
    records: list[ImageRecord] = [{**record, "image_id": number} for number in range(num_images)]
    DatasetCatalog.register("curve_images", lambda: records)
    MetadataCatalog.get("curve_images").thing_classes = [str(number) for number in range(80)]
    cfg = get_config(_LARGE)
    cfg.merge_from_list(["DATASETS.TRAIN", ["curve_images"], "DATALOADER.NUM_WORKERS", count])
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", [800], "SOLVER.IMS_PER_BATCH", 2])

    def load() -> dict[str, float]:
        start, clock = processor_seconds(), time.perf_counter()
        batches = iter(build_detection_train_loader(cfg))
        for _ in range(num_images // 2):
            next(batches)
        seconds = time.perf_counter() - clock
        memory = [written_mb(process.pid) for process in multiprocessing.active_children()]
        assert len(memory) == count
        del batches  # ends the workers, whose time counts from then on
        folder.cleanup()
        return {
            "seconds": (processor_seconds() - start) / num_images,
            "clock": seconds / num_images,
            "peak_mb": sum(memory) / count,
        }

    return load


def _processes(count: int) -> Callable[[], dict[str, float]]:
    """Training steps of an image of 256 x 256 in each of so many processes."""

    def train() -> dict[str, float]:
        with tempfile.TemporaryDirectory(prefix="detkit-benchmark-") as folder:
            launch(_train_in_process, count, args=(folder,))
            points = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
        assert len(points) == count
        return {key: sum(point[key] for point in points) / count for key in points[0]}

    return train


def _train_in_process(folder: str) -> None:
    num_steps, task = 10, Task(torch.device("cpu"), (256, 256))
    torch.set_num_threads(1)
    reuse_freed_memory()
    step = config_step(_SMALL, [], 1, task, torch.float32)
    for number in range(num_steps + 2):
        if number == 2:
            start, clock = time.process_time(), time.perf_counter()
        step()
    point = {
        "seconds": (time.process_time() - start) / num_steps,
        "clock": (time.perf_counter() - clock) / num_steps / comm.get_world_size(),
        "peak_mb": written_mb(os.getpid()),
    }
    (Path(folder) / f"{comm.get_rank()}.json").write_text(json.dumps(point))


_KEEP_ALL = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.99)
CURVES = {
    "image_size": Curve(
        "side of one square image, Faster R-CNN R50-FPN",
        (256, 512, 768, 1024, 1536, 2048),
        lambda side: _inference(_LARGE, side, 1),
    ),
    "batch": Curve(
        "images of 256 x 256 in a batch, Faster R-CNN R50-FPN",
        (1, 2, 4, 8, 16),
        lambda count: _inference(_LARGE, 256, count),
    ),
    "objects": Curve(
        "objects with masks on one image, training step, R18-FPN",
        (1, 10, 100, 1000, 3000),
        _objects,
    ),
    "detected": Curve(
        "detections with masks on one image of 512 x 512, R18-FPN",
        (10, 100, 1000, 3000),
        lambda count: _inference(
            _SMALL, 512, 1, *_KEEP_ALL, "TEST.DETECTIONS_PER_IMAGE", count,
            "MODEL.RPN.POST_NMS_TOPK_TEST", count, "MODEL.RPN.PRE_NMS_TOPK_TEST", count,
        ),
    ),
    "proposals": Curve(
        "proposals on one image of 512 x 512, Faster R-CNN R50-FPN",
        (100, 500, 1000, 2000, 4000),
        lambda count: _inference(
            _LARGE, 512, 1,
            "MODEL.RPN.POST_NMS_TOPK_TEST", count, "MODEL.RPN.PRE_NMS_TOPK_TEST", 2 * count,
        ),
    ),
    "classes": Curve(
        "classes, one image of 512 x 512, R18-FPN, scores above 0.0001",
        (1, 10, 80, 1203, 5000),
        lambda count: _inference(
            _SMALL, 512, 1,
            "MODEL.ROI_HEADS.NUM_CLASSES", count, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0001,
        ),
    ),
    "records": Curve(
        "records in the data set, start of a training loader",
        (1000, 10_000, 100_000, 1_000_000),
        _records,
        is_called_once=True,
    ),
    "detections": Curve(
        "boxes scored by COCO's AP", (10_000, 100_000, 1_000_000, 5_000_000), _detections,
        is_called_once=True,
    ),
    "masks": Curve(
        "masks encoded and scored by COCO's AP, 100 on each image of 480 x 640",
        (1000, 10_000, 100_000),
        _masks,
        is_called_once=True,
    ),
    "workers": Curve(
        "workers of a training loader, an image to 800 x 1067",
        (1, 2, 4),
        _workers,
        has_processes=True,
    ),
    "processes": Curve(
        "processes of a training with an image of 256 x 256 each, Mask R-CNN R18-FPN",
        (1, 2, 4),
        _processes,
        has_processes=True,
    ),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        argv: Words of the command line; None takes those of this process.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("curves", nargs="*", metavar="|".join(CURVES), help="which (default: all)")
    add("--output", default="curves", metavar="DIR", help="takes curves.json and curves.png")
    add("--quick", action="store_true", help="the first three points of each")
    add("--point", type=int, help=argparse.SUPPRESS)  # the child of a point
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Measure the curves asked for, a process per point, and draw them."""
    for name in args.curves:
        if name not in CURVES:
            hint = did_you_mean(name, CURVES)
            raise UnknownNameError(f"no curve {name!r}.{hint} There are: {', '.join(CURVES)}")
    if args.point is not None:
        print(json.dumps(_measure(CURVES[args.curves[0]], args.point)))
        return
    points: dict[str, list[dict[str, float]]] = {}
    for name in args.curves or CURVES:
        values = CURVES[name].values[: 3 if args.quick else None]
        points[name] = [_measured_alone(name, value) for value in values]
        print(f"{name}: time grows with its power {_slope(points[name]):.2f}", flush=True)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "curves.json").write_text(json.dumps(points, indent=1))
    _draw(points, folder / "curves.png")


def _measure(curve: Curve, value: int) -> dict[str, float]:
    call = curve.prepare(value)
    if curve.has_processes:
        return {"value": value, **call()}
    before = _resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    if not curve.is_called_once:
        call()
    start = processor_seconds()
    kept = call()
    seconds = processor_seconds() - start
    peak = _resident_mb("VmHWM") - before
    del kept
    return {"value": value, "seconds": seconds, "peak_mb": peak}


def _resident_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def written_mb(pid: int | None) -> float:
    """Return the memory that a process has written and shares with no other, in MB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/{pid}/smaps_rollup has no Private_Dirty")


def _measured_alone(name: str, value: int) -> dict[str, float]:
    command = [sys.executable, __file__, name, "--point", str(value)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    point = json.loads(output.splitlines()[-1])
    clock = f", {point['clock']:.3g} s by the clock" if "clock" in point else ""
    print(
        f"{name} {value}: {point['seconds']:.3g} s, +{point['peak_mb']:.0f} MB{clock}", flush=True
    )
    return point


def _slope(points: Sequence[dict[str, float]]) -> float:
    """Return the slope of the last piece in a plot with two logarithmic axes: 1 is linear.

    Example:
        >>> _slope([{"value": 10, "seconds": 1.0}, {"value": 20, "seconds": 4.0}])
        2.0
    """
    (x0, y0), (x1, y1) = ((p["value"], max(p["seconds"], 1e-9)) for p in points[-2:])
    return math.log(y1 / y0) / math.log(x1 / x0)


def _draw(points: dict[str, list[dict[str, float]]], path: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError:
        raise MissingPackageError(
            "curves are drawn by matplotlib: pip install matplotlib"
        ) from None
    columns = min(2, len(points))
    rows = math.ceil(len(points) / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(6 * columns, 3.2 * rows), squeeze=False, layout="constrained"
    )
    for axis, (name, of_curve) in zip(axes.flat, points.items(), strict=False):
        values = [point["value"] for point in of_curve]
        axis.plot(values, [point["seconds"] for point in of_curve], "o-", color="tab:blue")
        axis.set(xscale="log", yscale="log", xlabel=CURVES[name].title)
        axis.set_ylabel("processor seconds", color="tab:blue")
        if CURVES[name].has_processes:
            # Few values, and flat if all is well: from 0 on.
            axis.set(yscale="linear", ylim=(0, None), xticks=values, xticklabels=values)
            axis.minorticks_off()
            axis.set_ylabel("processor seconds per image", color="tab:blue")
        axis.grid(visible=True, alpha=0.3)
        memory = axis.twinx()
        memory.plot(values, [point["peak_mb"] for point in of_curve], "s--", color="tab:orange")
        memory.set_ylim(bottom=0)
        each = " of each" if CURVES[name].has_processes else ""
        memory.set_ylabel(f"memory{each}, MB", color="tab:orange")
    for axis in list(axes.flat)[len(points) :]:
        axis.axis("off")
    figure.savefig(str(path), dpi=80)


if __name__ == "__main__":
    sys.exit(main())
