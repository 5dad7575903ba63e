"""What the data sets of a run hold, in tables, counts and warnings.

Legend: K classes.
"""

import itertools
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tabulate import tabulate

from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.structures import ImageRecord, as_flag
from detkit.utils.errors import ConfigError
from detkit.utils.logger import FILE_ONLY, MAX_CLASSES, ONCE
from detkit.utils.text import counted, listed, printable

logger = logging.getLogger(__name__)

# Rounding puts many boxes of public data sets half a pixel over the edge.
EDGE_TOLERANCE = 1.0
CROWDS_HINT = (
    " An annotation with iscrowd 1 stands for a group: if these are single objects, which some"
    " tools mark so because their masks are run lengths, set iscrowd to 0."
)
_SUSPICIOUS_SHARE = 0.2
_NOTABLE_SHARE = 0.01


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

    @property
    def num_objects(self) -> int:
        """Annotations that are neither left out nor regions of crowds."""
        num_dropped = sum(len(where) for where in self.dropped_boxes.values())
        return self.num_annotations - self.num_crowd - num_dropped

    def table(self) -> str:
        """Return the counts, with a line for each reason that left something out."""
        rows: list[tuple[str, int]] = [("images", self.num_images)]
        rows += [(f"- left out: {reason}", count) for reason, count in self.dropped_images.items()]
        rows.append(("images used", self.num_images - self.dropped_images.total()))
        rows.append(("annotations", self.num_annotations))
        rows += [(f"- left out: {key}", len(where)) for key, where in self.dropped_boxes.items()]
        if self.num_crowd:
            rows.append(("- regions of crowds, not trained on", self.num_crowd))
        rows.append(("objects", self.num_objects))
        return tabulate(rows, headers=[", ".join(self.names), "number"], tablefmt="pipe")


def log_report(report: DataReport) -> None:
    """Log the table, and warn of what was left out or will be clipped."""
    logger.info("data of %s:\n%s", ", ".join(report.names), report.table(), extra=ONCE)
    for reason, where in report.dropped_boxes.items():
        count = counted(len(where), "annotation is", "annotations are")
        logger.warning("%s left out, %s: %s", count, reason, listed(where), extra=ONCE)
    if report.sticking_out:
        suspicion = ""
        if len(report.sticking_out) > _SUSPICIOUS_SHARE * report.num_annotations:
            suspicion = (
                " So many may mean that corners (x1, y1, x2, y2) were stored as (x, y, width,"
                " height)."
            )
        logger.warning(
            "%s out of %s image by more than %g pixel and will be clipped: %s.%s",
            counted(len(report.sticking_out), "box sticks", "boxes stick"),
            "its" if len(report.sticking_out) == 1 else "their",
            EDGE_TOLERANCE,
            listed(report.sticking_out),
            suspicion,
            extra=ONCE,
        )
    if report.num_crowd and report.num_objects == 0:
        logger.warning(
            "all %d annotations are regions of crowds: none is an object to train on or to find.%s",
            report.num_crowd,
            CROWDS_HINT,
        )
    num_dropped = report.dropped_images.total()
    if num_dropped:
        # The table counts them; where they are few, that is enough for a screen.
        shown = ONCE if num_dropped >= _NOTABLE_SHARE * report.num_images else FILE_ONLY
        logger.warning(
            "%d of %s left out (see the table). Images of background teach what is no"
            " object: DATALOADER.FILTER_EMPTY_ANNOTATIONS False keeps them, in keypoint models with"
            " MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE 0.",
            num_dropped,
            counted(report.num_images, "image is", "images are"),
            extra=shown,
        )


def print_instances_class_histogram(
    dataset_dicts: Sequence[ImageRecord], class_names: Sequence[str] | None = None
) -> None:
    """Log how many objects each class has, without crowds, and warn of classes that have none.

    Args:
        dataset_dicts: Records whose class ids lie in [0, K).
        class_names: K names; None shows the ids that appear.
    """
    counts = Counter(
        annotation["category_id"]
        for record in dataset_dicts
        for annotation in record.get("annotations", ())
        if not as_flag(annotation.get("iscrowd"))
    )
    rows = {name: counts[class_id] for class_id, name in enumerate(class_names or ())}
    for class_id, count in sorted(counts.items()):
        if class_id not in range(len(class_names or ())):
            rows[f"class {class_id}"] = count
    head = f"objects per class, over {counted(len(dataset_dicts), 'image', 'images')}"
    shown = ONCE
    if len(rows) > MAX_CLASSES:
        fewest, most = min(rows.values()), max(rows.values())
        short = f"{head}: {fewest:,} to {most:,} of each of {len(rows)} (the table is in log.txt)"
        shown = {**ONCE, "console": short}
    logger.info("%s:\n%s", head, _histogram_table(rows), extra=shown)
    absent = [name for name, count in rows.items() if count == 0]
    if absent:
        logger.warning(
            "%d of %s no object: %s. Classes with objects: %s.",
            len(absent),
            counted(len(rows), "class has", "classes have"),
            listed(absent),
            listed([name for name, count in rows.items() if count]) or "none",
            extra=ONCE,
        )


def _histogram_table(rows: dict[str, int]) -> str:
    """Lay the classes out in three columns, first down, then across, with the total last."""
    cells = [(printable(name), count) for name, count in rows.items()]
    cells.append(("total", sum(rows.values())))
    height = math.ceil(len(cells) / 3)
    columns = [cells[start : start + height] for start in range(0, len(cells), height)]
    lines = itertools.zip_longest(*columns, fillvalue=(None, None))
    return tabulate(
        [list(itertools.chain.from_iterable(line)) for line in lines],
        headers=["class", "objects"] * len(columns),
        tablefmt="pipe",
    )


def count_images_per_class(dataset_names: Sequence[str], num_classes: int) -> list[int]:
    """Return, for each of K classes, the number of images with an object of it, over all data sets.

    A data set whose metadata has `class_image_count`, a list of `{"id", "image_count"}` in which
    classes are ordered by `id`, as LVIS has it, is not read for that.

    Args:
        dataset_names: Registered names.
        num_classes: K.

    Raises:
        ConfigError: A `class_image_count` does not have K entries.
    """
    totals = Counter[int]()
    for name in dataset_names:
        known = MetadataCatalog.get(name).get("class_image_count")
        if known is None:
            for record in DatasetCatalog.get(name):
                # A set: an image counts once for a class, however many objects it shows.
                totals.update({a["category_id"] for a in record.get("annotations", [])})
            continue
        if len(known) != num_classes:
            raise ConfigError(
                f"class_image_count of data set {name!r} has {len(known)} classes,"
                f" MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}"
            )
        for class_id, entry in enumerate(sorted(known, key=lambda entry: entry["id"])):
            totals[class_id] += entry["image_count"]
    return [totals[class_id] for class_id in range(num_classes)]
