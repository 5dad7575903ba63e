"""Time and memory of `detkit check-dataset` on many small images, which are written first.

    python benchmarks/doctor.py --images 20000 --folder /tmp/many

Prints seconds, seconds of processor time and the peak memory of this process and of its workers.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from detkit.cli import main

WIDTH, HEIGHT = 320, 240


def write_dataset(folder: Path, num_images: int) -> None:
    """Write images of coloured boxes on noise, with COCO json."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for k in range(num_images):
        ground = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(ground).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        images.append({"id": k, "file_name": f"{k}.jpg", "width": WIDTH, "height": HEIGHT})
        for _ in range(5):
            w, h = random.integers(20, 120, 2).tolist()
            x, y = int(random.integers(0, WIDTH - w)), int(random.integers(0, HEIGHT - h))
            image.paste(tuple(random.integers(0, 256, 3).tolist()), (x, y, x + w, y + h))
            entry = {"id": len(annotations), "image_id": k, "category_id": 1, "bbox": [x, y, w, h]}
            annotations.append(entry)
        image.save(folder / "images" / f"{k}.jpg", quality=85)
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "box"}]
    (folder / "all.json").write_text(json.dumps(content))
    entry = {"name": "many", "format": "coco", "images": "images", "annotations": "all.json"}
    settings = {
        "_BASE_": "detkit://own_data/faster_rcnn_small.yaml",
        "DATASETS": {"REGISTER": [entry], "TRAIN": ["many"], "TEST": []},
        "MODEL": {"ROI_HEADS": {"NUM_CLASSES": 1}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))


def run() -> None:
    """Write the data set if it is not there, check it, and print what that took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    if not args.folder.exists():
        write_dataset(args.folder, args.images)
    before, start = _cpu_seconds(), time.perf_counter()
    config = str(args.folder / "config.yaml")
    status = main(["check-dataset", "--config-file", config, "--workers", str(args.workers)])
    wall, cpu = time.perf_counter() - start, _cpu_seconds() - before
    peaks = [_peak_mb(resource.RUSAGE_SELF), _peak_mb(resource.RUSAGE_CHILDREN)]
    print(f"status {status}: {wall:.1f} s, {cpu:.1f} s of processor time")
    print(f"peak memory: {peaks[0]:.0f} MiB, largest worker {peaks[1]:.0f} MiB")


def _cpu_seconds() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _peak_mb(who: int) -> float:
    peak = resource.getrusage(who).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    run()
