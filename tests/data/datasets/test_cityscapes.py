"""Cityscapes: polygons and maps of instances agree, and what is missing is named."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from detkit.data.datasets import load_cityscapes_instances, load_cityscapes_semantic
from detkit.data.datasets.builtin_meta import cityscapes_panoptic_metadata
from detkit.data.datasets.cityscapes import (
    load_cityscapes_panoptic,
    write_train_ids,
)
from detkit.structures.mask_formats import rle_to_bitmask
from detkit.utils.colormap import id2rgb
from detkit.utils.image import read_label_map

SIZE = (40, 60)
OBJECTS = [
    {"label": "road", "polygon": [[0, 20], [59, 20], [59, 39], [0, 39]]},
    {"label": "car", "polygon": [[5, 5], [30, 5], [30, 25], [5, 25]]},
    {"label": "cargroup", "polygon": [[40, 2], [70, 2], [70, 12], [40, 12]]},
    {"label": "person", "polygon": [[20, 10], [25, 10], [25, 30], [20, 30]]},
    {"label": "bus", "polygon": [[21, 12], [24, 12], [24, 20], [21, 20]]},
    {"label": "traffic sign", "polygon": [[20, 11], [26, 11], [26, 21], [20, 21]]},
    {"label": "license plate", "polygon": [[6, 6], [29, 6], [29, 24], [6, 24]]},
]
IDS = {"road": 7, "car": 26000, "cargroup": 26, "person": 24000, "bus": 28000, "traffic sign": 20}


@pytest.fixture
def folders(tmp_path):
    """Write one image with the annotation files that Cityscapes' scripts would make of `OBJECTS`."""
    images, truth = tmp_path / "leftImg8bit/train", tmp_path / "gtFine/train"
    for folder in (images / "ulm", truth / "ulm"):
        folder.mkdir(parents=True)
    Image.new("RGB", SIZE[::-1]).save(images / "ulm/ulm_0_leftImg8bit.png")
    content = {"imgHeight": SIZE[0], "imgWidth": SIZE[1], "objects": OBJECTS}
    (truth / "ulm/ulm_0_gtFine_polygons.json").write_text(json.dumps(content))
    drawn = Image.new("I", SIZE[::-1])
    for entry in OBJECTS:
        if entry["label"] in IDS:
            ImageDraw.Draw(drawn).polygon(
                [tuple(p) for p in entry["polygon"]], fill=IDS[entry["label"]]
            )
    ids = np.asarray(drawn)
    Image.fromarray(ids.astype(np.uint16)).save(truth / "ulm/ulm_0_gtFine_instanceIds.png")
    labels = np.where(ids >= 1000, ids // 1000, ids).astype(np.uint8)
    Image.fromarray(labels).save(truth / "ulm/ulm_0_gtFine_labelIds.png")
    return str(images), str(truth)


def test_polygons_and_map_give_the_same_instances(folders):
    (by_json,), (by_png,) = (
        load_cityscapes_instances(*folders, from_json=choice) for choice in (True, False)
    )

    def by_class(annotation):
        return annotation["category_id"], annotation["iscrowd"]

    assert sorted(by_json["annotations"], key=by_class) == sorted(
        by_png["annotations"], key=by_class
    )
    assert {key: by_json[key] for key in ("image_id", "height", "width")} == {
        "image_id": "ulm_0_leftImg8bit.png",
        "height": 40,
        "width": 60,
    }


def test_objects_in_front_hide_those_behind(folders):
    (record,) = load_cityscapes_instances(*folders)
    # The bus lies wholly behind the traffic sign, and is not there.
    assert sorted((a["category_id"], a["iscrowd"]) for a in record["annotations"]) == [
        (0, 0),
        (2, 0),
        (2, 1),
    ]
    masks = [rle_to_bitmask(a["segmentation"]) for a in record["annotations"]]
    assert sum(masks).max() == 1
    for mask, annotation in zip(masks, record["annotations"], strict=True):
        rows, columns = np.nonzero(mask)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert annotation["bbox"] == box


def test_label_maps_are_those_of_training(folders):
    with pytest.raises(
        FileNotFoundError,
        match=r"1 of 1 images .*labelTrainIds.png. Write them with datasets/prepare",
    ):
        load_cityscapes_semantic(*folders)
    assert write_train_ids(folders[1]) == 1
    (record,) = load_cityscapes_semantic(*folders)
    labels = read_label_map(record["sem_seg_file_name"])
    assert set(np.unique(labels)) == {0, 7, 11, 13, 255}
    assert (record["height"], record["width"]) == SIZE


def test_missing_annotations_and_folders_are_named(folders, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"1 of 1 images .* first .*ulm_0_gtFine_polygons.json"
    ):
        load_cityscapes_instances(folders[0], str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere of Cityscapes does not exist"):
        load_cityscapes_instances("nowhere", folders[1])
    with pytest.raises(FileNotFoundError, match=r"has no CITY/\*_leftImg8bit.png"):
        load_cityscapes_instances(str(tmp_path), folders[1])


def test_segments_are_those_that_cityscapes_scripts_write(folders, tmp_path):
    images, _ = folders
    root = tmp_path / "gtFine/cityscapes_panoptic_train"
    root.mkdir()
    Image.fromarray(id2rgb(np.full(SIZE, 26000))).save(root / "ulm_0_gtFine_panoptic.png")
    segments = [{"id": 26000, "category_id": 26, "iscrowd": 0}]
    segments.append({"id": 7, "category_id": 7, "iscrowd": 0})
    # The json's own names of images lack the folder, and have an ending of no file.
    content = {
        "images": [{"id": "ulm_0", "file_name": "ulm_0_gtFine_leftImg8bit.png"}],
        "annotations": [
            {
                "image_id": "ulm_0",
                "file_name": "ulm_0_gtFine_panoptic.png",
                "segments_info": segments,
            }
        ],
    }
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    metadata = cityscapes_panoptic_metadata()
    arguments = (images, str(root), str(tmp_path / "panoptic.json"), metadata)
    (record,) = load_cityscapes_panoptic(*arguments)
    assert record["file_name"] == f"{images}/ulm/ulm_0_leftImg8bit.png"
    assert (record["height"], record["width"]) == SIZE
    found = [(s["category_id"], s["isthing"]) for s in record["segments_info"]]
    assert found == [(13, True), (0, False)]
    assert [metadata["thing_classes"][k] for k, _ in found] == ["car", "road"]
    Path(record["file_name"]).unlink()
    with pytest.raises(FileNotFoundError, match="ulm_0_leftImg8bit"):
        load_cityscapes_panoptic(*arguments)
