"""The whole check of the data of a config: read, look at every file, hold against the config.

Legend: N images, K classes.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np

from detkit.config import CfgNode
from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.data.datasets.faults import Fault, collected_faults
from detkit.data.doctor.anchors import AnchorLevel, check_anchors
from detkit.data.doctor.annotations import (
    Objects,
    check_annotations,
    check_between,
    num_classes_of,
    objects_per_class,
    resize_scales,
)
from detkit.data.doctor.finding import SEVERITIES, Example, Findings
from detkit.data.doctor.images import ImageFacts, copies, facts_of_all, look_alikes
from detkit.data.record_files import spread
from detkit.data.wrappers import DatasetFromList
from detkit.structures import ImageRecord
from detkit.utils.errors import UnknownNameError, UserError
from detkit.utils.logger import progress_bar
from detkit.utils.text import listed

logger = logging.getLogger(__name__)

_FEW = 4  # images are decoded before a worker process has started
_LARGE = 9  # times the pixels that the model is fed
_LOOKED_AT = 2000  # images, before a training: a fraction of a second
_TOLD_BEFORE_TRAINING = (
    "doubled-box",
    "contradicting-box",
    "tiny-object",
    "mask-without-area",
    "mask-off-box",
    "keypoint-outside",
    "anchor-recall",
)


@dataclass
class Report:
    """What a check has found."""

    findings: Findings
    records: dict[str, list[ImageRecord]]
    """Data set -> its images, without the entries that cannot be used."""
    faults: dict[str, list[Fault]]
    """Data set -> what its reader had to leave out."""
    train: list[str]
    test: list[str]
    classes: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    """Data set -> class name and number of objects."""
    anchors: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the report as the content of a JSON file."""
        sets = {
            name: {
                "images": len(records),
                "annotations": sum(len(r.get("annotations", ())) for r in records),
                "use": [use for use in ("train", "test") if name in getattr(self, use)],
                "objects_per_class": dict(self.classes.get(name, [])),
            }
            for name, records in self.records.items()
        }
        counts = self.findings.counts()
        return {
            "counts": {severity: counts[severity] for severity in SEVERITIES},
            "datasets": sets,
            "anchors": self.anchors,
            "findings": self.findings.as_json(),
        }


def check_datasets(
    cfg: CfgNode,
    *,
    num_workers: int = 0,
    checkpoint_classes: Sequence[str] = (),
    anchors: Sequence[AnchorLevel] = (),
) -> Report:
    """Look at every image and annotation of the training and test data of a config.

    Args:
        cfg: Names the data sets, which are registered, and what they must fit.
        num_workers: Processes that decode images; 0 decodes in this one.
        checkpoint_classes: Names of the classes of MODEL.WEIGHTS; empty if not known.
        anchors: Those of the model; empty if it has none.
    """
    findings = Findings()
    train, test = list(cfg.DATASETS.TRAIN), list(cfg.DATASETS.TEST)
    records: dict[str, list[ImageRecord]] = {}
    faults: dict[str, list[Fault]] = {}
    for name in dict.fromkeys([*train, *test]):
        if name not in train:
            _expect_classes(cfg, name)
        records[name], faults[name] = _read(name, findings)
    facts = {
        name: _look_at(cfg, name, found, findings, num_workers) for name, found in records.items()
    }
    objects: dict[str, Objects] = {}
    report = Report(findings, records, faults, train, test)
    for name, found in records.items():
        objects[name] = check_annotations(cfg, name, found, findings, is_train=name in train)
        _check_label_maps(cfg, name, found, facts[name], findings)
        counts = objects_per_class(objects[name])
        names = MetadataCatalog.get(name).get("thing_classes") or []
        report.classes[name] = [(class_name, counts[k]) for k, class_name in enumerate(names)]
    in_train = [objects[name] for name in train]
    in_test = [objects[name] for name in test if name not in train]
    check_between(in_train, in_test, findings, checkpoint_classes)
    report.anchors = check_anchors(cfg, in_train, anchors, findings)
    _check_copies(train, [o.name for o in in_test], records, facts, findings)
    return report


def warn_before_training(cfg: CfgNode, records: Any, anchors: Sequence[AnchorLevel]) -> None:
    """Log what is odd about training data, as far as it shows without opening images.

    Faults that building the loader has reported are not repeated. Of many images, only a sample
    that is spread over all of them is looked at.

    Args:
        cfg: What they must fit.
        records: The training data. Anything but a list, and records without boxes, are ignored.
        anchors: As in `check_datasets`.
    """
    # A data set of the user's own may open an image for each of its items.
    if not cfg.DATASETS.TRAIN or not isinstance(records, list | DatasetFromList):
        return
    findings, name = Findings(), cfg.DATASETS.TRAIN[0]
    try:
        looked_at = [records[k] for k in spread(range(len(records)), _LOOKED_AT)]
        looked_at = [record for record in looked_at if _has_boxes(record)]
        objects = check_annotations(cfg, name, looked_at, findings, is_train=True)
        check_anchors(cfg, [objects], anchors, findings)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        # A mapper of the user's own may take records of another form.
        logger.debug("the training data are not looked at: %r", error)
        return
    told = [finding for finding in findings if finding.code in _TOLD_BEFORE_TRAINING]
    for finding in told:
        logger.warning(
            "%s: %d in the %d training images that were looked at, such as annotation %s of %s. %s",
            finding.title,
            finding.count,
            len(looked_at),
            finding.examples[0].annotation,
            finding.examples[0].file,
            finding.remedy,
        )
    if told:
        logger.info("`detkit check-dataset --html report.html` looks at all data, and shows them")


def _has_boxes(record: Any) -> bool:
    if not isinstance(record, dict) or "file_name" not in record:
        return False
    return all("bbox_mode" in annotation for annotation in record.get("annotations", ()))


def _expect_classes(cfg: CfgNode, name: str) -> None:
    """Have a test set number its classes as the training set does, as a run does."""
    model, metadata = num_classes_of(cfg), MetadataCatalog.get(name)
    known = (
        MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes")
        if cfg.DATASETS.TRAIN
        else None
    )
    if model and known and len(known) == model[1] and metadata.get("thing_classes") is None:
        with contextlib.suppress(UserError):  # of another check in this process
            metadata.set(model_classes=list(known))


class _Listener(logging.Handler):
    """Takes the warnings of readers."""

    def __init__(self, name: str, findings: Findings) -> None:
        super().__init__(logging.WARNING)
        self._name, self._findings = name, findings

    def emit(self, record: logging.LogRecord) -> None:
        code = getattr(record, "code", "reader-warning")
        if code:
            self._findings.add(code, self._name, Example(detail=record.getMessage()))


@contextlib.contextmanager
def _heard(name: str, findings: Findings) -> Iterator[None]:
    logger, listener = logging.getLogger("detkit"), _Listener(name, findings)
    handlers, propagate = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [listener], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate


def _read(name: str, findings: Findings) -> tuple[list[ImageRecord], list[Fault]]:
    """Return the records of a data set, and what its reader finds wrong, which is noted."""
    with _heard(name, findings), collected_faults() as faults:
        try:
            records = DatasetCatalog.get(name)
        except UnknownNameError:
            raise
        except (UserError, OSError) as error:
            findings.add("unreadable-data-set", name, Example(detail=str(error)))
            return [], faults
    for fault in faults:
        findings.add(fault.code, name, Example(fault.file, fault.annotation, fault.message))
    if not records and not faults:
        findings.add("empty-data-set", name)
    return records, faults


def _look_at(
    cfg: CfgNode, name: str, records: list[ImageRecord], findings: Findings, num_workers: int
) -> list[ImageFacts]:
    """Look at the images of a data set; records without a size get that of their file."""
    all_facts = facts_of_all(
        records,
        cfg.INPUT.FORMAT,
        cfg.INPUT.MAX_IMAGE_PIXELS,
        num_workers if len(records) > _FEW else 0,
    )
    kept = []
    for i, facts in enumerate(progress_bar(all_facts, total=len(records), unit="image", desc=name)):
        record, file = records[i], str(records[i]["file_name"])
        for code, detail in _faults_of(cfg, record, facts):
            # The file is named beside it.
            detail = detail.replace(f"image file {file} ", "").replace(f"{file} ", "")
            findings.add(code, name, Example(file, detail=detail), place=(i, -1))
        if facts.size is not None and (record.get("height") is None or record.get("width") is None):
            record["height"], record["width"] = facts.size
        kept.append(facts)
    return kept


def _faults_of(cfg: CfgNode, record: ImageRecord, facts: ImageFacts) -> Iterator[tuple[str, str]]:
    """Yield the kind and the detail of each fault of an image file."""
    if facts.code:
        yield facts.code, facts.problem
    if facts.size is None:
        return
    height, width = facts.size
    given = (record.get("height"), record.get("width"))
    if None not in given and given != facts.size:
        code = "size-not-upright" if given == (width, height) else "size-differs"
        yield code, f"{width}x{height}, annotated as {given[1]}x{given[0]}"
    elif facts.orientation != 1:
        code = "xmp-orientation" if facts.is_turned_by_xmp else "exif-orientation"
        yield code, f"orientation {facts.orientation}"
    if cfg.INPUT.FORMAT == "RAW":
        needed = len(cfg.MODEL.PIXEL_MEAN)
        if facts.num_channels not in (0, needed):
            yield "channel-count", f"{facts.num_channels} channels, the model {needed}"
        return
    if facts.has_wrong_ending:
        yield "mislabelled-file", f"{facts.format}, named {PurePath(record['file_name']).suffix}"
    if facts.is_deep:
        yield "bit-depth", ""
    if facts.is_slow:
        yield "slow-format", facts.format
    scale = float(resize_scales(cfg, np.array([[width, height]]))[0])
    if scale**2 * _LARGE < 1:
        yield "large-image", f"{width}x{height}, fed at {scale:.0%} of that"


def _check_label_maps(
    cfg: CfgNode,
    name: str,
    records: list[ImageRecord],
    facts: list[ImageFacts],
    findings: Findings,
) -> None:
    """Note label maps that cannot be used, or have values that mean nothing."""
    metadata = MetadataCatalog.get(name)
    ignore_label = metadata.get("ignore_label", cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE)
    num_classes = len(metadata.get("stuff_classes") or ())
    seen: set[int] = set()
    for i, (record, image) in enumerate(zip(records, facts, strict=True)):
        problem = image.label_problem
        stray = [k for k in image.labels if not 0 <= k < num_classes and k != ignore_label]
        if stray and num_classes and not problem:
            problem = (
                f"{record.get('sem_seg_file_name')} has the values {listed(stray)}, which are"
                f" neither classes (0 to {num_classes - 1}) nor the ignore_label {ignore_label}"
            )
        if problem:
            example = Example(record["file_name"], detail=problem)
            findings.add("bad-label-map", name, example, place=(i, -1))
        seen.update(image.labels)
    if seen == {ignore_label} or (num_classes > 1 and seen == {0, ignore_label}):
        detail = f"the label maps hold {listed(sorted(seen))} alone; {ignore_label} is ignored"
        findings.add("empty-label-maps", name, Example(detail=detail))


def _check_copies(
    train: list[str],
    test: list[str],
    records: dict[str, list[ImageRecord]],
    facts: dict[str, list[ImageFacts]],
    findings: Findings,
) -> None:
    """Note files of the same content and images that look the same, within and between splits."""
    places = [(name, i) for name in (*train, *test) for i in range(len(records[name]))]
    everything = [facts[name][i] for name, i in places]

    def note(first: int, other: int, codes: tuple[str, str]) -> None:
        # Of a leak, the one to take out is that of the training set, which comes first.
        is_leak = (places[first][0] in train) != (places[other][0] in train)
        bad, good = (first, other) if is_leak else (other, first)
        (name, i), (good_name, _) = places[bad], places[good]
        example = Example(file_of(bad), detail=f"as {file_of(good)}", other=file_of(good))
        if is_leak:
            example.detail += f" of {good_name}"
        findings.add(codes[is_leak], name, example, place=(i, -1))

    def file_of(k: int) -> str:
        name, i = places[k]
        return str(records[name][i]["file_name"])

    for group in copies(everything):
        in_train = [k for k in group if places[k][0] in train]
        in_test = [k for k in group if places[k][0] not in train]
        for same in (in_train, in_test):
            for k in same[1:]:
                # A file that is listed twice has its own kind.
                if file_of(k) != file_of(same[0]):
                    note(same[0], k, ("duplicate-image", ""))
        if in_train and in_test:
            for k in in_train:
                note(k, in_test[0], ("", "leaked-image"))
    for first, other in look_alikes(everything):
        note(first, other, ("near-duplicate", "near-leaked-image"))
