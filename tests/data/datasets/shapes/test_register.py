"""The names of the generated shapes: every one loads, and all agree."""

from pathlib import Path

import numpy as np
import pytest

from detkit.data import DatasetCatalog, DatasetMapper, MetadataCatalog, get_detection_dataset_dicts
from detkit.data.datasets.coco_panoptic import (
    read_panoptic_png,
    separate_coco_semantic_from_panoptic,
)
from detkit.data.datasets.shapes import SHAPES_CLASSES, generate_shapes, register_shapes
from detkit.structures import BitMasks
from detkit.utils.image import read_label_map


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_shapes(
        tmp_path_factory.mktemp("data") / "shapes", num_train=5, num_val=2, seed=3
    )


@pytest.fixture(autouse=True)
def _root(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETKIT_DATASETS", str(folder.parent))


@pytest.mark.parametrize(
    "ending",
    ["", "_keypoints", "_sem_seg", "_panoptic", "_panoptic_separated", "_panoptic_stuffonly"],
)
def test_every_name_loads_its_own_split(ending: str) -> None:
    for split, count in (("train", 5), ("val", 2)):
        records = get_detection_dataset_dicts(f"shapes_{split}{ending}")
        assert len(records) == count
        assert all(Path(record["file_name"]).name.startswith(split) for record in records)


def test_segments_cover_the_picture_and_have_the_areas_they_say() -> None:
    for record in DatasetCatalog.get("shapes_train_panoptic"):
        ids = read_panoptic_png(record.get("pan_seg_file_name", ""))
        segments = record.get("segments_info", [])
        assert set(np.unique(ids)) == {segment["id"] for segment in segments}
        assert all((ids == segment["id"]).sum() == segment.get("area") for segment in segments)
        assert [segment.get("isthing") for segment in segments].count(False) == 1


def test_stuff_is_what_separating_the_panoptic_png_gives(folder: Path, tmp_path: Path) -> None:
    to_contiguous = MetadataCatalog.get(
        "shapes_val_panoptic_stuffonly"
    ).stuff_dataset_id_to_contiguous_id
    separate_coco_semantic_from_panoptic(
        str(folder / "panoptic_val.json"),
        str(folder / "panoptic_val"),
        str(tmp_path / "stuff"),
        to_contiguous,
    )
    for file in sorted((tmp_path / "stuff").iterdir()):
        assert np.array_equal(
            read_label_map(str(file)),
            read_label_map(str(folder / "panoptic_stuff_val" / file.name)),
        )


def test_classes_of_all_nine_agree_with_segments() -> None:
    joined = DatasetCatalog.get("shapes_train_panoptic")
    for record, labelled in zip(joined, DatasetCatalog.get("shapes_train_sem_seg"), strict=True):
        ids = read_panoptic_png(record.get("pan_seg_file_name", ""))
        labels = read_label_map(labelled.get("sem_seg_file_name", ""))
        for segment in record.get("segments_info", []):
            assert set(np.unique(labels[ids == segment["id"]])) == {segment["category_id"]}


def test_separated_sample_has_instances_and_stuff() -> None:
    mapper = DatasetMapper(is_train=True, augmentations=[], use_instance_mask=True)
    sample = mapper(DatasetCatalog.get("shapes_train_panoptic_separated")[0])
    assert sample.get("sem_seg") is not None
    instances = sample.get("instances")
    assert instances is not None
    assert len(instances.gt_masks) == len(instances) > 0
    # Pixels of things, which are 0 in the map of stuff, are those of the masks, up to their outlines.
    height, width = sample["image"].shape[1:]
    drawn = BitMasks.from_polygon_masks(instances.gt_masks, height, width).tensor.any(dim=0)
    assert ((sample.get("sem_seg") == 0) != drawn).float().mean() < 0.03


def test_metadata_counts_classes() -> None:
    separated = MetadataCatalog.get("shapes_train_panoptic_separated")
    assert (len(separated.thing_classes), len(separated.stuff_classes)) == (5, 5)
    joined = MetadataCatalog.get("shapes_val_panoptic")
    assert len(joined.stuff_classes) == len(joined.stuff_colors) == 9
    assert MetadataCatalog.get("shapes_train").keypoint_flip_map == [("left", "right")]


def test_registered_names_load_what_lies_under_the_datasets_folder(folder: Path) -> None:
    register_shapes()  # the built-in names, registered again: nothing changes
    assert (
        len(DatasetCatalog.get("shapes_train")) == len(DatasetCatalog.get("shapes_voc_train")) == 5
    )
    assert len(DatasetCatalog.get("shapes_val")) == len(DatasetCatalog.get("shapes_voc_val")) == 2
    assert MetadataCatalog.get("shapes_val").json_file == str(folder / "instances_val.json")
    assert MetadataCatalog.get("shapes_voc_val").dirname == str(folder)
    assert MetadataCatalog.get("shapes_val").thing_classes == list(SHAPES_CLASSES)
