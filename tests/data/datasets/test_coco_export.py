import copy
import itertools
import json

import numpy as np
import pytest
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.data.datasets.coco import load_coco_json
from detkit.data.datasets.coco_export import (
    annotation_area,
    convert_to_coco_dict,
    convert_to_coco_json,
)
from detkit.structures import BoxMode

_counter = itertools.count()
SQUARE = [[1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0, 5.0]]


@pytest.fixture
def register():
    names = []

    def add(records, **metadata):
        names.append(f"coco_export_test_{next(_counter)}")
        DatasetCatalog.register(names[-1], lambda: records)
        MetadataCatalog.get(names[-1]).set(**metadata)
        return names[-1]

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def record(image_id, *annotations):
    size = {"height": 30, "width": 40}
    return {
        "file_name": f"images/{image_id}.jpg",
        "image_id": image_id,
        **size,
        "annotations": list(annotations),
    }


def annotation(box=(1.0, 2.0, 4.0, 6.0), category_id=0, **extra):
    return {"bbox": list(box), "bbox_mode": BoxMode.XYXY_ABS, "category_id": category_id, **extra}


def test_boxes_become_xywh_with_area_and_ids_from_one(register):
    name = register(
        [record(7, annotation()), record(3, annotation(category_id=1))],
        thing_classes=["cat", "dog"],
    )
    coco = convert_to_coco_dict(name)
    assert coco["images"] == [
        {"id": 7, "file_name": "images/7.jpg", "height": 30, "width": 40},
        {"id": 3, "file_name": "images/3.jpg", "height": 30, "width": 40},
    ]
    assert coco["categories"] == [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    common = {"bbox": [1.0, 2.0, 3.0, 4.0], "area": 12.0, "iscrowd": 0}
    assert coco["annotations"] == [
        {"id": 1, "image_id": 7, "category_id": 0, **common},
        {"id": 2, "image_id": 3, "category_id": 1, **common},
    ]


def test_category_ids_are_those_of_the_data_set(register):
    ids = {90: 0, 18: 1}
    name = register(
        [record(1, annotation(category_id=1))],
        thing_classes=["cat", "dog"],
        thing_dataset_id_to_contiguous_id=ids,
    )
    coco = convert_to_coco_dict(name)
    assert coco["categories"] == [{"id": 90, "name": "cat"}, {"id": 18, "name": "dog"}]
    assert coco["annotations"][0]["category_id"] == 18


def test_lowest_id_stands_for_a_class_with_several(register):
    ids = {9: 0, 4: 0, 6: 1}
    name = register([], thing_classes=["cat", "dog"], thing_dataset_id_to_contiguous_id=ids)
    assert [category["id"] for category in convert_to_coco_dict(name)["categories"]] == [4, 6]


def test_images_with_names_for_ids_are_numbered(register):
    name = register([record("000005", annotation()), record("2008_000008")], thing_classes=["cat"])
    coco = convert_to_coco_dict(name)
    assert [image["id"] for image in coco["images"]] == [1, 2]
    assert coco["annotations"][0]["image_id"] == 1


def test_crowd_difficult_and_mask_are_carried_along(register):
    extra = {"iscrowd": 1, "difficult": 1, "segmentation": SQUARE}
    name = register([record(1, annotation(**extra))], thing_classes=["cat"])
    (exported,) = convert_to_coco_dict(name)["annotations"]
    assert extra.items() <= exported.items()


def test_keypoints_number_pixels_and_keep_their_names(register):
    keypoints = [1.5, 2.5, 0, 3.5, 4.5, 2]
    rules = [("left_end", "right_end", (1, 2, 3))]
    name = register(
        [record(1, annotation(keypoints=keypoints))],
        thing_classes=["cat"],
        keypoint_names=["left_end", "right_end"],
        keypoint_connection_rules=rules,
    )
    coco = convert_to_coco_dict(name)
    assert coco["annotations"][0]["keypoints"] == [1, 2, 0, 3, 4, 2]
    assert coco["annotations"][0]["num_keypoints"] == 1
    assert coco["categories"][0]["keypoints"] == ["left_end", "right_end"]
    assert coco["categories"][0]["skeleton"] == [[1, 2]]


def test_exported_file_reads_back_as_it_was(register, tmp_path):
    bitmap = np.zeros((30, 40), dtype=bool)
    bitmap[3:9, 5:11] = True
    uncompressed = {"size": [30, 40], "counts": [100, 7, 30 * 40 - 107]}
    masks = [
        SQUARE,
        [np.array(SQUARE[0])],
        bitmap,
        uncompressed,
        mask_util.encode(np.asfortranarray(bitmap, np.uint8)),
    ]
    keypoints = [1.5, 2.5, 0, 3.5, 4.5, 2]
    name = register(
        [record(1, *(annotation(segmentation=m, keypoints=keypoints) for m in masks))],
        thing_classes=["c"],
    )
    convert_to_coco_json(name, tmp_path / "a.json")
    (read,) = load_coco_json(str(tmp_path / "a.json"), "/")
    assert [a["keypoints"] for a in read["annotations"]] == [keypoints] * 5
    again = [a["segmentation"] for a in read["annotations"]]
    assert again[:2] == [SQUARE, SQUARE]
    assert again[3] == uncompressed
    assert np.array_equal(mask_util.decode(again[2]), bitmap)
    assert np.array_equal(mask_util.decode(again[4]), bitmap)


def test_boxes_are_not_rounded(register):
    name = register([record(1, annotation((0.1, 0.2, 0.4, 1 / 3)))], thing_classes=["cat"])
    assert convert_to_coco_dict(name)["annotations"][0]["bbox"] == [
        0.1,
        0.2,
        0.4 - 0.1,
        1 / 3 - 0.2,
    ]


MASK = np.zeros((6, 8), dtype=np.uint8, order="F")
MASK[1:4, 2:7] = 1


@pytest.mark.parametrize(
    ("extra", "area"),
    [
        pytest.param({}, 12.0, id="box"),
        pytest.param({"segmentation": []}, 12.0, id="empty mask"),
        pytest.param({"segmentation": SQUARE}, 16.0, id="polygon"),
        pytest.param(
            {"segmentation": [*SQUARE, [10, 10, 14, 10, 10, 13]]}, 22.0, id="two polygons"
        ),
        pytest.param({"segmentation": mask_util.encode(MASK)}, 15.0, id="compressed runs"),
        pytest.param(
            {"segmentation": {"size": [6, 8], "counts": [13, 3, 30, 2]}},
            5.0,
            id="uncompressed runs",
        ),
        pytest.param({"area": 7.5, "segmentation": SQUARE}, 7.5, id="its own"),
    ],
)
def test_area_is_its_own_or_that_of_the_mask_or_that_of_the_box(extra, area):
    assert annotation_area(extra, [1.0, 2.0, 3.0, 4.0]) == pytest.approx(area)


def test_images_that_are_not_annotated_give_no_annotations(register):
    name = register([{"file_name": "1.jpg", "image_id": 1}], thing_classes=["cat"])
    coco = convert_to_coco_dict(name)
    assert coco["images"] == [{"id": 1, "file_name": "1.jpg"}]
    assert "annotations" not in coco


def test_records_are_not_changed(register):
    records = [record(1, annotation(segmentation=SQUARE))]
    before = copy.deepcopy(records)
    convert_to_coco_dict(register(records, thing_classes=["cat"]))
    assert records == before


def test_file_reads_back_as_the_same_data_set(register, tmp_path):
    objects = [
        annotation(id=1, iscrowd=0, area=3.5),
        annotation((0, 0, 9.5, 9), 1, id=2, iscrowd=1, area=8.0),
    ]
    records = [record(3), record(5, *objects)]
    ids = {10: 0, 20: 1}
    name = register(records, thing_classes=["cat", "dog"], thing_dataset_id_to_contiguous_id=ids)
    path = tmp_path / "new" / "out.json"
    convert_to_coco_json(name, path)
    expected = copy.deepcopy(records)
    for object_ in expected[1]["annotations"]:
        object_.update(
            bbox=BoxMode.convert(object_["bbox"], BoxMode.XYXY_ABS, BoxMode.XYWH_ABS),
            bbox_mode=BoxMode.XYWH_ABS,
        )
    assert load_coco_json(str(path), "") == expected
    assert [p.name for p in path.parent.iterdir()] == ["out.json"]


def test_pycocotools_reads_the_file(register, tmp_path, capsys):
    mask = mask_util.encode(MASK)  # its runs are bytes, which json does not know
    name = register([record("x", annotation(segmentation=mask))], thing_classes=["cat"])
    convert_to_coco_json(name, tmp_path / "out.json")
    coco = COCO(str(tmp_path / "out.json"))
    capsys.readouterr()
    assert coco.annToRLE(coco.anns[1])["counts"] == mask["counts"].decode()


def test_file_is_written_anew_when_the_data_set_changes(register, tmp_path):
    records = [record(1)]
    name = register(records, thing_classes=["cat"])
    convert_to_coco_json(name, tmp_path / "out.json")
    records.append(record(2))
    convert_to_coco_json(name, tmp_path / "out.json", allow_cached=True)
    assert len(json.loads((tmp_path / "out.json").read_text())["images"]) == 2


@pytest.mark.parametrize("metadata", [{}, {"thing_classes": []}], ids=["not set", "none"])
def test_data_set_without_class_names_is_an_error(metadata, register):
    with pytest.raises(ValueError, match="has no class names: set MetadataCatalog.get"):
        convert_to_coco_dict(register([], **metadata))


def test_class_id_outside_the_names_is_an_error(register):
    name = register([record("x", annotation(category_id=1))], thing_classes=["cat"])
    with pytest.raises(
        ValueError,
        match=r"has 1 class names, but an object of class id 1 in image 'x' \(images/x.jpg\)",
    ):
        convert_to_coco_dict(name)


def test_image_id_that_two_images_share_is_an_error(register):
    name = register([record(1), {**record(1), "file_name": "other.jpg"}], thing_classes=["cat"])
    with pytest.raises(ValueError, match=r"uses image id 1 twice: for images/1.jpg and other.jpg"):
        convert_to_coco_dict(name)


def test_rotated_boxes_keep_their_five_numbers(register, tmp_path):
    rotated = {**annotation((10.0, 12.0, 4.0, 6.0, 30.0)), "bbox_mode": BoxMode.XYWHA_ABS}
    name = register([record(1, rotated, annotation())], thing_classes=["a"])
    (first, second) = convert_to_coco_dict(name)["annotations"]
    assert first["bbox"] == [10, 12, 4, 6, 30]
    assert first["area"] == 24
    assert second["bbox"] == [1, 2, 3, 4]
    convert_to_coco_json(name, str(tmp_path / "a.json"))
    (read,) = load_coco_json(str(tmp_path / "a.json"), str(tmp_path))
    assert [a["bbox_mode"] for a in read["annotations"]] == [BoxMode.XYWHA_ABS, BoxMode.XYWH_ABS]
