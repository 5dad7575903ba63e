"""What was found in the data sets of a run, in tables and warnings.

Legend: K classes.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tabulate import tabulate

from detkit.structures import ImageRecord

logger = logging.getLogger(__name__)

# Rounding puts many boxes of public data sets half a pixel over the edge.
EDGE_TOLERANCE = 1.0
_SUSPICIOUS_SHARE = 0.2


@dataclass
class DataReport:
    """What was found in the data sets of a run, and what was left out of them."""

    names: list[str]
    num_images: int = 0
    num_annotations: int = 0
    num_crowd: int = 0
    dropped_images: Counter[str] = field(default_factory=Counter)
    dropped_boxes: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> the annotations, by id and file."""
    sticking_out: list[str] = field(default_factory=list)

    def add_boxes(self, reason: str, where: Sequence[str]) -> None:
        """Note annotations that are left out."""
        if where:
            self.dropped_boxes.setdefault(reason, []).extend(where)

    def table(self) -> str:
        """Return the counts, with a line for each reason that left something out."""
        dropped_boxes = {reason: len(where) for reason, where in self.dropped_boxes.items()}
        used_objects = self.num_annotations - self.num_crowd - sum(dropped_boxes.values())
        rows: list[tuple[str, int]] = [
            ("images", self.num_images),
            *((f"- left out: {reason}", count) for reason, count in self.dropped_images.items()),
            ("images used", self.num_images - self.dropped_images.total()),
            ("annotations", self.num_annotations),
            *((f"- left out: {reason}", count) for reason, count in dropped_boxes.items()),
            *([("- regions of crowds, not trained on", self.num_crowd)] if self.num_crowd else []),
            ("objects", used_objects),
        ]
        return tabulate(rows, headers=[", ".join(self.names), "number"], tablefmt="pipe")


def log_report(report: DataReport) -> None:
    """Log the table, and warn of what was left out or will be clipped."""
    logger.info("data of %s:\n%s", ", ".join(report.names), report.table())
    for reason, where in report.dropped_boxes.items():
        logger.warning("%d annotations are left out, %s: %s", len(where), reason, listed(where))
    if report.sticking_out:
        suspicion = ""
        if len(report.sticking_out) > _SUSPICIOUS_SHARE * report.num_annotations:
            suspicion = (
                " So many may mean that corners (x1, y1, x2, y2) were stored as (x, y, width,"
                " height)."
            )
        logger.warning(
            "%d boxes stick out of their image by more than %g pixel and will be clipped: %s.%s",
            len(report.sticking_out),
            EDGE_TOLERANCE,
            listed(report.sticking_out),
            suspicion,
        )
    if report.dropped_images:
        logger.warning(
            "%d of %d images are left out (see the table). Images of background teach what is no"
            " object: DATALOADER.FILTER_EMPTY_ANNOTATIONS False keeps them, in keypoint models with"
            " MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE 0.",
            report.dropped_images.total(),
            report.num_images,
        )


def print_instances_class_histogram(
    dataset_dicts: Sequence[ImageRecord], class_names: Sequence[str] | None = None
) -> None:
    """Log how many objects each class has, crowds left aside, and warn of classes that have none.

    Args:
        dataset_dicts: Records whose class ids lie in [0, K).
        class_names: K names; None shows the ids that appear.
    """
    counts = Counter(
        annotation["category_id"]
        for record in dataset_dicts
        for annotation in record.get("annotations", ())
        if annotation.get("iscrowd", 0) == 0
    )
    names = dict(enumerate(class_names)) if class_names else {}
    rows = {name: counts.get(class_id, 0) for class_id, name in names.items()}
    rows.update(
        {
            f"class {class_id}": count
            for class_id, count in sorted(counts.items())
            if class_id not in names
        }
    )
    logger.info(
        "objects per class, over %d images:\n%s", len(dataset_dicts), _histogram_table(rows)
    )
    absent = [name for name, count in rows.items() if count == 0]
    if absent:
        logger.warning(
            "%d of %d classes have no object: %s. Classes with objects: %s.",
            len(absent),
            len(rows),
            listed(absent),
            listed([name for name, count in rows.items() if count]) or "none",
        )


def _histogram_table(rows: dict[str, int], num_columns: int = 3) -> str:
    """Lay the classes out in columns, first down, then across, with the total last."""
    cells = [*rows.items(), ("total", sum(rows.values()))]
    height = -(-len(cells) // num_columns)
    columns = [cells[start : start + height] for start in range(0, len(cells), height)]
    lines = itertools.zip_longest(*columns, fillvalue=(None, None))
    headers = ["class", "objects"] * len(columns)
    return tabulate(
        [list(itertools.chain.from_iterable(line)) for line in lines],
        headers=headers,
        tablefmt="pipe",
    )


def listed(values: Sequence[str], limit: int = 10) -> str:
    """Return the first few, and how many there are."""
    more = f", ... ({len(values)} in all)" if len(values) > limit else ""
    return ", ".join(values[:limit]) + more
