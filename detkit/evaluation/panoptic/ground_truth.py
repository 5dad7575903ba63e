"""The true segments of a data set, from its records or from COCO's panoptic json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from detkit.data.catalog import DatasetCatalog, Metadata, MetadataCatalog
from detkit.data.datasets.coco_panoptic import panoptic_annotations, require_panoptic_files
from detkit.data.datasets.json_file import DataFolder, known_id, read_json
from detkit.evaluation.panoptic.quality import Segment
from detkit.structures import ImageRecord, as_flag
from detkit.utils.errors import DataError


class PanopticCategories:
    """The categories of a data set, numbered from 0: things, then stuff, by contiguous ids."""

    def __init__(self, metadata: Metadata) -> None:
        """Read them from the metadata.

        Args:
            metadata: With `thing_dataset_id_to_contiguous_id` and
                `stuff_dataset_id_to_contiguous_id`.

        Raises:
            DataError: One of the two is missing.
        """
        self._name = metadata.name
        keys = ("thing_dataset_id_to_contiguous_id", "stuff_dataset_id_to_contiguous_id")
        for key in keys:
            if metadata.get(key) is None:
                raise DataError(
                    f"panoptic scores need to know things and stuff of data set {self._name!r}: set"
                    f" MetadataCatalog.get({self._name!r}).{key} = {{id in the files: contiguous"
                    " id}"
                )
        things, stuff = dict(metadata.get(keys[0])), dict(metadata.get(keys[1]))
        self.dataset_ids: list[int] = []
        """(C,) category ids of the data set's own files."""
        self._numbers: dict[tuple[bool, int], int] = {}
        for is_thing, ids in ((True, things), (False, stuff)):
            for dataset_id, contiguous in sorted(ids.items(), key=lambda item: item[1]):
                # An id in both is a thing's: heads for stuff that see all things as one class map
                # every id of a thing to that class.
                if is_thing or dataset_id not in things:
                    self._numbers[is_thing, contiguous] = len(self.dataset_ids)
                    self.dataset_ids.append(dataset_id)
        self.is_thing = np.array([dataset_id in things for dataset_id in self.dataset_ids], bool)
        """(C,)"""
        self._numbers_by_dataset_id = {
            dataset_id: number for number, dataset_id in enumerate(self.dataset_ids)
        }

    def __len__(self) -> int:
        return len(self.dataset_ids)

    def number_of(self, is_thing: bool, contiguous_id: int, where: str) -> int:
        """Return the number in [0, C) of a category.

        Args:
            is_thing: Whether it is one of things or of stuff.
            contiguous_id: Its id among those.
            where: What has a segment of it, for the error message.

        Raises:
            DataError: There is no such category.
        """
        number = self._numbers.get((bool(is_thing), int(contiguous_id)))
        if number is None:
            kind = "things" if is_thing else "stuff"
            known = sorted(id_ for thing, id_ in self._numbers if thing == bool(is_thing))
            raise DataError(
                f"{where} has a segment of category {contiguous_id} of {kind}, but data set"
                f" {self._name!r} has {known}"
            )
        return number

    def number_of_dataset_id(self, dataset_id: int, where: str) -> int:
        """Return the number in [0, C) of a category by its id in the data set's own files.

        Raises:
            DataError: There is no such category.
        """
        known = known_id(dataset_id, self._numbers_by_dataset_id)
        if known is None:
            raise DataError(
                f"{where} has a segment of category {dataset_id}, which data set {self._name!r}"
                " lacks"
            )
        return self._numbers_by_dataset_id[known]


@dataclass(frozen=True)
class PanopticTruth:
    """The true segments of one image."""

    file_name: str
    """The png whose pixels hold their ids."""
    segments: list[Segment]


def load_panoptic_ground_truth(
    dataset_name: str, categories: PanopticCategories, records: Sequence[ImageRecord] | None = None
) -> dict[int | str, PanopticTruth]:
    """Return the true segments of each image of a data set, by its id.

    They are read from `pan_seg_file_name` and `segments_info` of the records; without these from
    the metadata's `panoptic_json` and `panoptic_root`, for data sets that train on instances and
    stuff.

    Args:
        dataset_name: Its name.
        categories: Its categories.
        records: What its loader returns, if it has been called already; None calls it.

    Raises:
        FileNotFoundError: A png that the json names does not exist.
        DataError: There is neither, an image id appears twice or has no entry, or a category is
            unknown.
    """
    records = DatasetCatalog.get(dataset_name) if records is None else records
    metadata = MetadataCatalog.get(dataset_name)
    truth: dict[int | str, PanopticTruth] = {}
    if records and all("segments_info" in record for record in records):
        for record in records:
            truth[record["image_id"]] = _truth_of_record(record, categories)
    elif metadata.get("panoptic_json") is not None and metadata.get("panoptic_root") is not None:
        json_file, root = metadata.panoptic_json, str(metadata.panoptic_root)
        annotations = panoptic_annotations(read_json(json_file), json_file)
        entries = {annotation["image_id"]: annotation for annotation in annotations}
        folder, used = DataFolder(root, json_file), []
        for record in records:
            image_id = record["image_id"]
            key = known_id(image_id, entries)
            if key is None:
                raise DataError(f"{json_file} has no annotation of image {image_id!r}")
            entry = entries[key]
            used.append(entry)
            segments = _segments_of_entry(entry, f"image {image_id!r} in {json_file}", categories)
            truth[image_id] = PanopticTruth(folder.path_of(entry["file_name"]), segments)
        # Now, and not after an hour of inference.
        require_panoptic_files(used, root, json_file)
    else:
        raise DataError(
            f"data set {dataset_name!r} has no panoptic ground truth: its records need"
            " 'pan_seg_file_name' and 'segments_info', or its metadata 'panoptic_json' and"
            " 'panoptic_root'"
        )
    if len(truth) < len(records):
        raise DataError(
            f"data set {dataset_name!r} uses an image id twice: {len(records)} images,"
            f" {len(truth)} ids"
        )
    return truth


def _truth_of_record(record: ImageRecord, categories: PanopticCategories) -> PanopticTruth:
    where = f"image {record['image_id']!r} ({record['file_name']})"
    if "pan_seg_file_name" not in record:
        raise DataError(
            f"{where} has 'segments_info', but no 'pan_seg_file_name' that says where their"
            " pixels are"
        )
    segments = []
    for info in record.get("segments_info", ()):
        # Records hold contiguous ids, those of things and of stuff apart.
        category = categories.number_of(info.get("isthing", True), info["category_id"], where)
        segments.append(Segment(info["id"], category, bool(as_flag(info.get("iscrowd")))))
    return PanopticTruth(record["pan_seg_file_name"], segments)


def _segments_of_entry(
    entry: Mapping[str, Any], where: str, categories: PanopticCategories
) -> list[Segment]:
    segments = []
    for info in entry["segments_info"]:
        category = categories.number_of_dataset_id(info["category_id"], where)
        segments.append(Segment(info["id"], category, bool(as_flag(info.get("iscrowd")))))
    return segments
