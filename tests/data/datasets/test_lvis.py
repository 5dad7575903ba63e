"""LVIS json of both versions: names, files, and what is known to be absent."""

import json

import pytest

from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.data.datasets import load_lvis_json, register_lvis_instances
from detkit.data.datasets.lvis import class_image_count, get_lvis_instances_meta

CATEGORIES = [
    {
        "id": 2,
        "name": "alarm_clock",
        "synonyms": ["alarm clock"],
        "image_count": 4,
        "frequency": "r",
    },
    {
        "id": 1,
        "name": "aerosol_can",
        "synonyms": ["aerosol_can", "spray_can"],
        "image_count": 9,
        "frequency": "c",
    },
]
IMAGE = {
    "id": 7,
    "coco_url": "http://images.cocodataset.org/train2017/000000000007.jpg",
    "height": 24,
    "width": 32,
    "not_exhaustive_category_ids": [2],
    "neg_category_ids": [1],
}
OBJECT = {
    "id": 1,
    "image_id": 7,
    "category_id": 2,
    "bbox": [1, 2, 3, 4],
    "segmentation": [[0, 0, 4, 0, 4, 4]],
}


@pytest.fixture
def write(tmp_path):
    def write(image=IMAGE, categories=CATEGORIES):
        content = {"images": [image], "annotations": [OBJECT], "categories": categories}
        (tmp_path / "lvis.json").write_text(json.dumps(content))
        return str(tmp_path / "lvis.json")

    return write


def test_images_lie_in_cocos_folders(write):
    (record,) = load_lvis_json(write(), "coco/")
    assert record["file_name"] == "coco/train2017/000000000007.jpg"
    assert (record["not_exhaustive_category_ids"], record["neg_category_ids"]) == ([2], [1])
    assert record["annotations"][0]["category_id"] == 1


def test_ids_in_the_lists_of_images_may_be_text(write):
    image = {**IMAGE, "neg_category_ids": ["1"], "not_exhaustive_category_ids": [2.0]}
    (record,) = load_lvis_json(write(image), "coco/")
    assert (record["not_exhaustive_category_ids"], record["neg_category_ids"]) == ([2], [1])


def test_synonyms_that_are_no_list_name_no_class(write):
    categories = [{**CATEGORIES[0], "synonyms": "clock"}, CATEGORIES[1]]
    load_lvis_json(write(categories=categories), "coco/", "clocks")
    assert MetadataCatalog.get("clocks").thing_classes == ["aerosol_can", "alarm_clock"]
    MetadataCatalog.remove("clocks")


def test_image_without_address_has_a_file_name(write):
    image = {key: value for key, value in IMAGE.items() if key != "coco_url"}
    assert (
        load_lvis_json(write({**image, "file_name": "a.jpg"}), "coco")[0]["file_name"]
        == "coco/a.jpg"
    )
    with pytest.raises(
        ValueError, match=r"image 7 of .*lvis.json has neither coco_url nor file_name"
    ):
        load_lvis_json(write(image), "coco")


def test_classes_are_named_by_their_first_synonym(write):
    load_lvis_json(write(), "coco", "mine")
    metadata = MetadataCatalog.get("mine")
    assert metadata.thing_classes == ["aerosol_can", "alarm clock"]
    assert metadata.thing_dataset_id_to_contiguous_id == {1: 0, 2: 1}


def test_images_per_class_are_known_before_the_data_set_is_loaded(write):
    register_lvis_instances("mine", {}, write(), "coco")
    assert MetadataCatalog.get("mine").class_image_count == [
        {"id": 2, "image_count": 4},
        {"id": 1, "image_count": 9},
    ]
    assert MetadataCatalog.get("mine").evaluator_type == "lvis"
    assert len(DatasetCatalog.get("mine")) == 1


def test_key_within_a_text_does_not_mislead(tmp_path):
    (tmp_path / "odd.json").write_text(
        json.dumps({"info": '"categories": [', "categories": CATEGORIES})
    )
    assert [c["id"] for c in class_image_count(str(tmp_path / "odd.json"))] == [2, 1]


def test_metadata_without_a_file_are_those_of_cocos_classes_or_none():
    assert get_lvis_instances_meta("lvis_v1_train") == {}
    assert len(get_lvis_instances_meta("lvis_v0.5_val_cocofied")["thing_classes"]) == 80
    with pytest.raises(ValueError, match="no LVIS data set is called 'coco_2017_val'"):
        get_lvis_instances_meta("coco_2017_val")


def test_images_per_class_are_unknown_without_counts_or_file(write, tmp_path):
    assert class_image_count(str(tmp_path / "none.json")) is None
    assert class_image_count(write(categories=[{"id": 1, "name": "a"}])) is None
