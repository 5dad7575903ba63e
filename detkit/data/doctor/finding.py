"""What the doctor can find: kinds with their severity and remedy, and the findings of a check.

An *error* stops a run, or makes it learn or score something else than was meant; a *warning* costs
accuracy or is probably a mistake; a *note* is good to know.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

SEVERITIES = ("error", "warning", "note")
MAX_EXAMPLES = 20


class Kind(NamedTuple):
    """One kind of fault."""

    severity: str
    title: str
    remedy: str
    """The key or the command that settles it."""
    fix: str = ""
    """What `--fix` does to each place, see `detkit.data.doctor.fix`; empty leaves it."""


_FIX = "`detkit check-dataset --fix OUT`"
_DROP = f"Correct it in the file; {_FIX} writes a copy without it."
_CLASSES = "`classes: [...]` in the entry of the data set under DATASETS.REGISTER"
_KEEP = "DATALOADER.FILTER_EMPTY_ANNOTATIONS"
_BAD = f"Get the file again, or leave it out: {_FIX}; DATALOADER.ON_BAD_IMAGE: skip in training."

KINDS: dict[str, Kind] = {
    # What readers say.
    "unreadable-data-set": Kind(
        "error", "The data set cannot be read", "Correct what the message names."
    ),
    "empty-data-set": Kind(
        "error",
        "The data set has no images",
        "Correct its paths or `split` under DATASETS.REGISTER.",
    ),
    "reader-warning": Kind("warning", "The reader of the format warns", "See the message."),
    "broken-image-entry": Kind("error", "The entry of an image cannot be used", _DROP),
    "unknown-image-id": Kind(
        "error", "Annotations name an image that the file does not list", _DROP
    ),
    "unknown-category-id": Kind(
        "error", "Annotations name a category that the file does not list", _DROP
    ),
    "repeated-annotation-id": Kind(
        "error", "Ids of annotations repeat or are no ids", f"Number them anew: {_FIX}."
    ),
    "broken-box": Kind("error", "An object has no usable box", _DROP),
    "broken-row": Kind("error", "A row or a shape cannot be used", _DROP),
    "broken-polygon": Kind(
        "error",
        "A polygon cannot be used",
        f"`drop_bad_polygons: true` under DATASETS.REGISTER keeps the box alone, as does {_FIX}.",
    ),
    "broken-run-length": Kind(
        "error",
        "A run-length mask cannot be used",
        f"`drop_bad_polygons: true` under DATASETS.REGISTER keeps the box alone, as does {_FIX}.",
    ),
    "broken-keypoints": Kind(
        "error",
        "Keypoints cannot be used",
        f"Correct them in the file; {_FIX} writes a copy without them.",
    ),
    "broken-flag": Kind(
        "error", "A flag is neither 0 nor 1", f"Correct it in the file; {_FIX} writes 0."
    ),
    "broken-area": Kind(
        "error",
        "An area is no number",
        f"Correct it in the file; {_FIX} writes that of the mask or the box.",
    ),
    "broken-annotation-file": Kind(
        "error",
        "The annotation file of an image cannot be read",
        f"Write it anew; {_FIX} writes a copy without the image.",
    ),
    "missing-annotation-file": Kind(
        "error",
        "The annotation file of an image is missing",
        f"Take the image out of the split, as {_FIX} does.",
    ),
    # Files.
    "missing-image": Kind(
        "error",
        "Image files do not exist",
        f"Correct `images` under DATASETS.REGISTER, or leave them out: {_FIX}.",
        "drop-image",
    ),
    "empty-file": Kind("error", "Image files are empty (0 bytes)", _BAD, "drop-image"),
    "not-an-image": Kind(
        "error", "Files are no images, or of an unknown format", _BAD, "drop-image"
    ),
    "damaged-image": Kind("error", "Image files are damaged or truncated", _BAD, "drop-image"),
    "too-many-pixels": Kind(
        "error",
        "Images have more pixels than are allowed",
        "Raise INPUT.MAX_IMAGE_PIXELS, or save them smaller.",
        "drop-image",
    ),
    "channel-count": Kind(
        "error",
        "Images have other channels than the model",
        "MODEL.PIXEL_MEAN and PIXEL_STD need a number per channel.",
        "drop-image",
    ),
    "mislabelled-file": Kind(
        "warning",
        "The ending of a file name is not that of its format",
        "Rename the files; detkit reads them by their content, other tools may not.",
    ),
    "bit-depth": Kind(
        "warning", "Images of 16 bits are read as 8 bits", "INPUT.FORMAT: RAW keeps all bits."
    ),
    "exif-orientation": Kind(
        "note",
        "Images are turned by their EXIF data",
        "None: detkit turns them upright. Other tools may not, where the images were annotated.",
    ),
    "xmp-orientation": Kind(
        "note",
        "Images are turned by their XMP data",
        "None: detkit turns them upright. Most tools do not, so look at the boxes: `detkit"
        " show-batch`.",
    ),
    "slow-format": Kind(
        "note",
        "Image formats that are slow to decode",
        "Save them as baseline JPEG, or raise DATALOADER.NUM_WORKERS.",
    ),
    "large-image": Kind(
        "note",
        "Images are far larger than what the model is fed",
        "INPUT.REDUCED_JPEG: True, or save them smaller: most of the time of loading is decoding.",
    ),
    "blank-image": Kind(
        "warning", "Images have one value in all pixels", f"Leave them out: {_FIX}.", "drop-image"
    ),
    "size-differs": Kind(
        "error",
        "The annotated size is not that of the image",
        f"Correct it, with the boxes if these were made for another size; {_FIX} writes the real"
        " one.",
        "set-size",
    ),
    "size-not-upright": Kind(
        "error",
        "Width and height are exchanged, or the image was annotated before it was turned upright",
        "Annotate the image upright (its metadata turn it), or remove its orientation: `exiftool"
        " -Orientation= FILE`.",
        "drop-image",
    ),
    "bad-label-map": Kind(
        "error",
        "A label map cannot be used",
        "Correct the file, or `classes` or `ignore_label` under DATASETS.REGISTER.",
    ),
    "empty-label-maps": Kind(
        "warning",
        "The label maps hold nothing to learn",
        "Correct the files, or `ignore_label` under DATASETS.REGISTER.",
    ),
    # Copies.
    "duplicate-image": Kind(
        "warning",
        "Files of one split have the same content",
        f"Keep one of each: {_FIX}.",
        "drop-image",
    ),
    "near-duplicate": Kind(
        "warning",
        "Images of one split look the same",
        "Keep one of each where they are no intended frames.",
    ),
    "leaked-image": Kind(
        "error",
        "Images of a test set are in the training set as well: its score is too good",
        f"Take them out of the training set: {_FIX}.",
        "drop-image",
    ),
    "near-leaked-image": Kind(
        "warning",
        "Images of a test set look like some of the training set: its score may be too good",
        "Split by scene or video, not by image.",
    ),
    "listed-twice": Kind(
        "warning",
        "A file is listed as several images",
        "Give all annotations of a file one image id.",
    ),
    # Classes.
    "class-count": Kind(
        "error",
        "The data set has another number of classes than the model",
        "Set the number of classes.",
    ),
    "class-id-range": Kind(
        "error",
        "Class ids are out of range for the model",
        "Correct the ids, or set the number of classes.",
        "drop-object",
    ),
    "unknown-class": Kind(
        "error", "Objects have classes that are not listed", f"Correct the names, or {_CLASSES}."
    ),
    "class-names-differ": Kind(
        "error",
        "Class names differ between the data sets",
        f"Give all of them the same {_CLASSES}.",
    ),
    "checkpoint-classes": Kind(
        "warning",
        "The class names are not those of MODEL.WEIGHTS",
        f"Where they mean the same classes: {_CLASSES}, in the order of the checkpoint.",
    ),
    "alike-class-names": Kind(
        "warning",
        "Class names differ by case, spaces or plural alone",
        f"Give objects of one class one name, or {_CLASSES}.",
    ),
    "class-without-objects": Kind(
        "warning", "Classes have no object", f"Add some, or leave the class out: {_CLASSES}."
    ),
    "class-not-trained": Kind(
        "warning",
        "Classes have objects in the test set, and none in the training set",
        "Add some to the training set.",
    ),
    "rare-class": Kind(
        "note",
        "Classes have few objects",
        "DATALOADER.SAMPLER_TRAIN: RepeatFactorTrainingSampler, or ClassAwareTrainingSampler.",
    ),
    # Boxes.
    "box-not-finite": Kind("error", "Boxes are not finite", _DROP, "drop-object"),
    "box-without-area": Kind(
        "warning", "Boxes have no area; training leaves them out", _DROP, "drop-object"
    ),
    "box-outside": Kind(
        "warning",
        "Boxes lie outside of their image; training leaves them out",
        _DROP,
        "drop-object",
    ),
    "box-sticks-out": Kind(
        "warning",
        "Boxes stick out of their image; training clips them",
        f"Correct them; {_FIX} clips them.",
        "clip-box",
    ),
    "boxes-as-corners": Kind(
        "error",
        "Boxes are probably corners (x1, y1, x2, y2) stored as (x, y, width, height)",
        "Write width and height in the file.",
    ),
    "boxes-as-fractions": Kind(
        "error",
        "Coordinates are probably fractions of the image",
        "Multiply x and width by the width of the image, y and height by its height; or"
        " `normalized: true` in the entry of a csv under DATASETS.REGISTER.",
    ),
    "doubled-box": Kind(
        "warning", "An object is annotated twice", f"Keep one of each: {_FIX}.", "drop-object"
    ),
    "contradicting-box": Kind("warning", "One box has two classes", "Keep the right one."),
    "whole-image-box": Kind(
        "note",
        "A box is the whole image",
        "Draw the box around the object, if that does not fill the image.",
    ),
    "tiny-object": Kind(
        "warning",
        "Objects are smaller than a pixel when the model sees them",
        "Raise INPUT.MIN_SIZE_TRAIN and MAX_SIZE_TRAIN (and _TEST), or cut the images into tiles.",
    ),
    # Masks and keypoints.
    "missing-mask": Kind(
        "error",
        "Objects lack the mask that MODEL.MASK_ON needs",
        "MODEL.MASK_ON: False, or add the masks.",
        "drop-object",
    ),
    "mask-outside": Kind("warning", "Masks lie outside of their image", _DROP),
    "mask-without-area": Kind("warning", "Masks have no area", _DROP, "drop-mask"),
    "mask-off-box": Kind(
        "warning",
        "Mask and box of an object lie apart",
        f"Correct the one that is wrong; {_FIX} draws the box around the mask.",
        "box-of-mask",
    ),
    "keypoint-count": Kind(
        "error",
        "The number of keypoints is not that of the model",
        "Set MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS.",
    ),
    "keypoint-outside": Kind(
        "warning",
        "Labelled keypoints lie outside of their image",
        "Correct them, or set their visibility to 0.",
    ),
    # Against the config.
    "only-crowds": Kind(
        "warning", "All objects are regions of crowds", "Set iscrowd to 0 for single objects."
    ),
    "empty-image": Kind(
        "note",
        "Images have no object",
        f"{_KEEP}: True leaves them out of training, False keeps them.",
    ),
    "many-objects": Kind(
        "warning",
        "Images have more objects than detections are kept and scored",
        "Raise TEST.DETECTIONS_PER_IMAGE.",
    ),
    "many-keypoint-objects": Kind(
        "warning",
        "Images have more objects with keypoints than are scored",
        "Raise TEST.KEYPOINT_DETECTIONS_PER_IMAGE.",
    ),
    "anchor-recall": Kind(
        "warning", "Anchors miss objects that others would meet", "Set MODEL.ANCHOR_GENERATOR."
    ),
}


@dataclass
class Example:
    """One place of a finding."""

    file: str = ""
    annotation: str | int | None = None
    detail: str = ""
    box: list[float] | None = None
    """XYXY in pixels of the image."""
    other: str = ""
    """The image that it is a copy of."""


@dataclass
class Finding:
    """All faults of one kind in one data set."""

    code: str
    dataset: str
    severity: str
    title: str
    remedy: str
    fix: str = ""
    count: int = 0
    examples: list[Example] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    """All of them: number of the record, and of the annotation in it, -1 for the image."""


class Findings:
    """The findings of a check, by kind and data set."""

    def __init__(self) -> None:
        self._by_key: dict[tuple[str, str], Finding] = {}

    def add(
        self,
        code: str,
        dataset: str,
        example: Example | None = None,
        *,
        place: tuple[int, int] | None = None,
        count: int = 1,
        remedy: str = "",
    ) -> None:
        """Note a fault.

        Args:
            code: A key of `KINDS`.
            dataset: Its name.
            example: Where it is; the first ones are kept.
            place: As in `Finding.places`.
            count: How many these are.
            remedy: What settles it, if that can be said better than by the kind.
        """
        kind = KINDS[code]
        finding = self._by_key.setdefault(
            (code, dataset),
            Finding(code, dataset, kind.severity, kind.title, kind.remedy, kind.fix),
        )
        finding.count += count
        finding.remedy = remedy or finding.remedy
        if example is not None and len(finding.examples) < MAX_EXAMPLES:
            finding.examples.append(example)
        if place is not None:
            finding.places.append(place)

    def __iter__(self) -> Iterator[Finding]:
        """Yield findings, the worst first."""
        order = {code: k for k, code in enumerate(KINDS)}
        by_rank = sorted(self._by_key.values(), key=lambda f: (order[f.code], f.dataset))
        return iter(sorted(by_rank, key=lambda f: SEVERITIES.index(f.severity)))

    def of(self, dataset: str) -> list[Finding]:
        """Return the findings of a data set."""
        return [finding for finding in self if finding.dataset == dataset]

    def counts(self) -> Counter[str]:
        """Return severity -> number of findings."""
        return Counter(finding.severity for finding in self)

    def as_json(self) -> list[dict[str, Any]]:
        """Return the findings without their places."""
        return [{k: v for k, v in asdict(f).items() if k != "places"} for f in self]
