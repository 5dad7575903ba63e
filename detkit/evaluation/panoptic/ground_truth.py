"""The true segments of a data set, from its records or from COCO's panoptic json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from detkit.data.catalog import DatasetCatalog, Metadata, MetadataCatalog
from detkit.data.datasets.coco_panoptic import require_panoptic_files
from detkit.data.datasets.data_folder import DataFolder
from detkit.data.datasets.json_file import read_json, section
from detkit.evaluation.panoptic.quality import Segment
from detkit.structures import ImageRecord


class PanopticCategories:
    """The categories of a data set, numbered in a row: things, then stuff, each in the order of
    contiguous ids.
    """

    def __init__(self, metadata: Metadata) -> None:
        """Look them up.

        Args:
            metadata: With `thing_dataset_id_to_contiguous_id` and
                `stuff_dataset_id_to_contiguous_id`. An id that both have is a thing's: where a head
                for stuff sees all things as one class, they share it.

        Raises:
            ValueError: One of the two is missing.
        """
        self._name = metadata.name
        things = _contiguous_ids(metadata, "thing_dataset_id_to_contiguous_id")
        stuff = _contiguous_ids(metadata, "stuff_dataset_id_to_contiguous_id")
        stuff = {
            dataset_id: contiguous
            for dataset_id, contiguous in stuff.items()
            if dataset_id not in things
        }
        ordered = [(True, *item) for item in things.items()] + [
            (False, *item) for item in stuff.items()
        ]
        ordered.sort(key=lambda entry: (not entry[0], entry[2]))
        self.dataset_ids = [dataset_id for _, dataset_id, _ in ordered]
        """(C,) category ids of the data set's own files."""
        self.is_thing = np.array([is_thing for is_thing, _, _ in ordered], dtype=bool)
        """(C,)"""
        self._numbers = {
            (is_thing, contiguous): n for n, (is_thing, _, contiguous) in enumerate(ordered)
        }
        self._numbers_by_dataset_id = {
            dataset_id: n for n, dataset_id in enumerate(self.dataset_ids)
        }

    def __len__(self) -> int:
        return len(self.dataset_ids)

    def number_of(self, is_thing: bool, contiguous_id: int, where: str) -> int:
        """Return the number in [0, C) of a category.

        Args:
            is_thing: Whether it is one of things or of stuff.
            contiguous_id: Its id among those.
            where: Whose it is, for the error message.

        Raises:
            ValueError: There is none.
        """
        number = self._numbers.get((bool(is_thing), int(contiguous_id)))
        if number is None:
            kind = "things" if is_thing else "stuff"
            known = sorted(
                contiguous for thing, contiguous in self._numbers if thing == bool(is_thing)
            )
            raise ValueError(
                f"{where} has a segment of category {contiguous_id} of {kind}, but data set"
                f" {self._name!r} has {known}"
            )
        return number

    def number_of_dataset_id(self, dataset_id: int, where: str) -> int:
        """Return the number in [0, C) of a category by its id in the data set's own files.

        Raises:
            ValueError: There is none.
        """
        if dataset_id not in self._numbers_by_dataset_id:
            raise ValueError(
                f"{where} has a segment of category {dataset_id}, which data set {self._name!r}"
                " lacks"
            )
        return self._numbers_by_dataset_id[dataset_id]


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

    They come from `pan_seg_file_name` and `segments_info` of the records; without these from the
    metadata's `panoptic_json` and `panoptic_root`, for data sets that train on instances and stuff.

    Args:
        dataset_name: Its name.
        categories: Its categories.
        records: What its loader gives, where it has been called already; None calls it.

    Raises:
        FileNotFoundError: A png that the json names does not exist.
        ValueError: There is neither, an image id appears twice or has no entry, or a category is
            unknown.
    """
    records = DatasetCatalog.get(dataset_name) if records is None else records
    metadata = MetadataCatalog.get(dataset_name)
    if records and all("segments_info" in record for record in records):
        truth = {record["image_id"]: _truth_of_record(record, categories) for record in records}
    elif metadata.get("panoptic_json") is not None and metadata.get("panoptic_root") is not None:
        entries = _read_entries(metadata.panoptic_json)
        truth = {
            record["image_id"]: _truth_of_entry(record, entries, metadata, categories)
            for record in records
        }
        # Now, and not after an hour of inference.
        require_panoptic_files(
            [entries[i] for i in truth], metadata.panoptic_root, metadata.panoptic_json
        )
    else:
        raise ValueError(
            f"data set {dataset_name!r} has no panoptic ground truth: its records need"
            " 'pan_seg_file_name' and 'segments_info', or its metadata 'panoptic_json' and"
            " 'panoptic_root'"
        )
    if len(truth) < len(records):
        raise ValueError(
            f"data set {dataset_name!r} uses an image id twice: {len(records)} images,"
            f" {len(truth)} ids"
        )
    return truth


def _truth_of_record(record: ImageRecord, categories: PanopticCategories) -> PanopticTruth:
    where = f"image {record['image_id']!r} ({record['file_name']})"
    if "pan_seg_file_name" not in record:
        raise ValueError(
            f"{where} has 'segments_info', but no 'pan_seg_file_name' that says where their"
            " pixels are"
        )
    segments = [
        Segment(
            s["id"],
            categories.number_of(s.get("isthing", True), s["category_id"], where),
            bool(s.get("iscrowd")),
        )
        for s in record.get("segments_info", ())
    ]
    return PanopticTruth(record["pan_seg_file_name"], segments)


def _truth_of_entry(
    record: ImageRecord,
    entries: Mapping[int | str, Mapping[str, Any]],
    metadata: Metadata,
    categories: PanopticCategories,
) -> PanopticTruth:
    entry = entries.get(record["image_id"])
    if entry is None:
        raise ValueError(
            f"{metadata.panoptic_json} has no annotation of image {record['image_id']!r}"
        )
    where = f"image {record['image_id']!r} in {metadata.panoptic_json}"
    segments = [
        Segment(
            s["id"],
            categories.number_of_dataset_id(s["category_id"], where),
            bool(s.get("iscrowd")),
        )
        for s in entry["segments_info"]
    ]
    folder = DataFolder(str(metadata.panoptic_root), metadata.panoptic_json)
    return PanopticTruth(folder.path_of(entry["file_name"]), segments)


def _read_entries(json_file: str) -> dict[int | str, Mapping[str, Any]]:
    annotations = section(read_json(json_file), "annotations", json_file)
    return {annotation["image_id"]: annotation for annotation in annotations}


def _contiguous_ids(metadata: Metadata, key: str) -> dict[int, int]:
    ids = metadata.get(key)
    if ids is None:
        raise ValueError(
            f"panoptic scores need to know things and stuff of data set {metadata.name!r}: "
            f"set MetadataCatalog.get({metadata.name!r}).{key} = {{id in the files: contiguous id}}"
        )
    return dict(ids)
