"""The public data sets: names, classes, and folders that follow the environment."""

import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.data.datasets import load_voc_folders, register_builtin_datasets
from detkit.data.datasets.builtin_meta import (
    CITYSCAPES_CATEGORIES,
    COCO_CATEGORIES,
    COCO_THINGS,
    VOC_CLASSES,
    cityscapes_metadata,
    coco_panoptic_metadata,
    coco_panoptic_separated_metadata,
    coco_person_metadata,
)
from detkit.utils.file_io import packaged_configs

COCO_NAMES = {category.id: category.name for category in COCO_THINGS}


def test_coco_has_80_classes_with_gaps_in_the_ids():
    assert len(COCO_NAMES) == len(set(COCO_NAMES.values())) == 80
    assert list(COCO_NAMES) == sorted(COCO_NAMES)
    assert all(re.fullmatch("[a-z]+( [a-z]+)?", name) for name in COCO_NAMES.values())
    # The ids that COCO leaves out. Source: the categories of instances_val2017.json.
    assert set(range(1, 91)) - set(COCO_NAMES) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert (COCO_NAMES[1], COCO_NAMES[13], COCO_NAMES[90]) == (
        "person",
        "stop sign",
        "toothbrush",
    )


def test_categories_are_listed_in_the_form_of_detectron2():
    assert [c["isthing"] for c in COCO_CATEGORIES] == [1] * 80 + [0] * 53
    assert COCO_CATEGORIES[0] == {
        "color": [220, 20, 60],
        "isthing": 1,
        "id": 1,
        "name": "person",
    }
    assert (COCO_CATEGORIES[80]["id"], COCO_CATEGORIES[-1]["name"]) == (92, "rug-merged")
    assert [c["trainId"] for c in CITYSCAPES_CATEGORIES] == list(range(19))
    assert [c["isthing"] for c in CITYSCAPES_CATEGORIES] == [0] * 11 + [1] * 8
    assert CITYSCAPES_CATEGORIES[11] == {
        "color": (220, 20, 60),
        "isthing": 1,
        "id": 24,
        "trainId": 11,
        "name": "person",
    }


def test_panoptic_coco_has_133_classes_in_133_colors():
    metadata = coco_panoptic_metadata()
    assert len(set(metadata["stuff_classes"])) == len(set(metadata["stuff_colors"])) == 133
    ids = {
        **metadata["thing_dataset_id_to_contiguous_id"],
        **metadata["stuff_dataset_id_to_contiguous_id"],
    }
    assert sorted(ids.values()) == list(range(133))
    assert (metadata["stuff_classes"][80], ids[200], metadata["stuff_classes"][132]) == (
        "banner",
        132,
        "rug-merged",
    )


def test_separated_coco_sees_things_as_one_class_of_stuff():
    metadata = coco_panoptic_separated_metadata()
    assert len(metadata["stuff_classes"]) == len(metadata["stuff_colors"]) == 54
    assert metadata["stuff_classes"][0] == "things"
    assert metadata["stuff_classes"][53] == "rug"
    assert metadata["stuff_dataset_id_to_contiguous_id"][200] == 53
    assert len(metadata["thing_classes"]) == 80


def test_persons_have_17_keypoints_and_8_pairs():
    metadata = coco_person_metadata()
    names = metadata["keypoint_names"]
    assert len(set(names)) == 17
    assert len(metadata["keypoint_flip_map"]) == 8
    assert {end for rule in metadata["keypoint_connection_rules"] for end in rule[:2]} <= set(names)


def test_cityscapes_has_19_classes_of_which_8_are_things():
    metadata = cityscapes_metadata()
    assert len(metadata["stuff_classes"]) == 19
    assert metadata["thing_classes"] == metadata["stuff_classes"][11:]
    assert metadata["thing_dataset_id_to_contiguous_id"][33] == 7


def test_voc_has_20_classes_in_alphabetical_order():
    assert len(VOC_CLASSES) == 20
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)


@pytest.mark.parametrize(
    "name", ["coco_2017_train", "coco_2017_val", "coco_2014_minival", "coco_2017_test-dev"]
)
def test_coco_names_are_registered(name):
    metadata = MetadataCatalog.get(name)
    assert name in DatasetCatalog
    assert metadata.evaluator_type == "coco"
    assert metadata.thing_classes[0] == "person"
    assert metadata.thing_dataset_id_to_contiguous_id[90] == 79


def test_every_data_set_of_the_zoo_is_registered():
    configs = packaged_configs()
    named = {
        name
        for file in configs.rglob("*.yaml")
        if "REGISTER:" not in file.read_text()  # these bring their own
        for name in re.findall(
            r"[a-z]+\w*(?:_train|_val|_test)[\w.]*", " ".join(_data_set_lines(file))
        )
    }
    assert len(named) > 15
    assert {name for name in named if name not in DatasetCatalog} == set()


def _data_set_lines(file):
    return re.findall(r"^\s+(?:TRAIN|TEST): (.*)$", file.read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "evaluator", "things", "stuff"),
    [
        ("keypoints_coco_2017_train", "coco", 1, 0),
        ("coco_2017_val_panoptic", "coco_panoptic_seg", 133, 133),
        ("coco_2017_train_panoptic_separated", "coco_panoptic_seg", 80, 54),
        ("coco_2017_val_100_panoptic_stuffonly", "sem_seg", 80, 54),
        ("lvis_v1_train", "lvis", 0, 0),
        ("lvis_v0.5_val_cocofied", "lvis", 80, 0),
        ("cityscapes_fine_instance_seg_train", "cityscapes_instance", 8, 19),
        ("cityscapes_fine_sem_seg_val", "cityscapes_sem_seg", 8, 19),
        ("cityscapes_fine_panoptic_val", "cityscapes_panoptic_seg", 19, 19),
    ],
)
def test_families_are_registered_with_their_classes(name, evaluator, things, stuff):
    metadata = MetadataCatalog.get(name)
    assert name in DatasetCatalog
    assert metadata.evaluator_type == evaluator
    assert len(metadata.get("thing_classes") or ()) == things
    assert len(metadata.get("stuff_classes") or ()) == stuff


def test_panoptic_coco_is_read_below_the_root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETKIT_DATASETS", str(tmp_path))
    Image.new("RGB", (32, 24), (5, 0, 0)).save(_made(tmp_path / "coco/panoptic_val2017/1.png"))
    Image.new("L", (32, 24)).save(_made(tmp_path / "coco/panoptic_stuff_val2017/1.png"))
    Image.new("RGB", (32, 24)).save(_made(tmp_path / "coco/val2017/1.jpg"))
    panoptic = {
        "image_id": 1,
        "file_name": "1.png",
        "segments_info": [{"id": 5, "category_id": 200}],
    }
    _made(tmp_path / "coco/annotations/panoptic_val2017.json").write_text(
        json.dumps({"annotations": [panoptic]})
    )
    instances = {
        "images": [{"id": 1, "file_name": "1.jpg"}],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in COCO_NAMES.items()],
    }
    (tmp_path / "coco/annotations/instances_val2017.json").write_text(json.dumps(instances))
    (joined,) = DatasetCatalog.get("coco_2017_val_panoptic")
    assert joined["segments_info"][0]["category_id"] == 132
    (separated,) = DatasetCatalog.get("coco_2017_val_panoptic_separated")
    assert (separated["image_id"], separated["annotations"]) == (1, [])
    assert separated["sem_seg_file_name"] == str(tmp_path / "coco/panoptic_stuff_val2017/1.png")
    assert len(DatasetCatalog.get("coco_2017_val_panoptic_stuffonly")) == 1


def _made(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.parametrize(
    "name", ["voc_2007_trainval", "voc_2007_test", "voc_2012_train", "voc_2012_trainval"]
)
def test_voc_names_are_registered(name):
    metadata = MetadataCatalog.get(name)
    assert name in DatasetCatalog
    assert (metadata.evaluator_type, metadata.year) == ("pascal_voc", int(name.split("_")[1]))
    assert metadata.thing_classes == list(VOC_CLASSES)


def test_registering_again_is_nothing_new():
    before = set(DatasetCatalog.list())
    register_builtin_datasets()
    assert set(DatasetCatalog.list()) == before


def test_folders_follow_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DETKIT_DATASETS", str(tmp_path))
    assert MetadataCatalog.get("coco_2017_val").json_file == str(
        tmp_path / "coco/annotations/instances_val2017.json"
    )
    assert MetadataCatalog.get("voc_2007_test").dirname == str(tmp_path / "VOC2007")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("coco_2017_val", ["coco/annotations/instances_val2017.json", "coco/val2017"]),
        (
            "keypoints_coco_2017_train",
            ["coco/annotations/person_keypoints_train2017.json", "coco/train2017"],
        ),
        (
            "coco_2017_val_panoptic_separated",
            ["coco/panoptic_val2017", "coco/panoptic_stuff_val2017"],
        ),
        ("coco_2017_val_panoptic_stuffonly", ["coco/val2017", "coco/panoptic_stuff_val2017"]),
        ("lvis_v1_train", ["lvis/lvis_v1_train.json", "takes .*coco"]),
        (
            "cityscapes_fine_instance_seg_val",
            ["cityscapes/leftImg8bit/val", "cityscapes/gtFine/val"],
        ),
        ("voc_2007_test", ["VOC2007/ImageSets/Main/test.txt", "takes VOC2007"]),
    ],
)
def test_missing_files_are_named_with_the_folders_expected(name, parts, tmp_path, monkeypatch):
    monkeypatch.setenv("DETKIT_DATASETS", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=rf"{tmp_path}.* does not exist.*{name!r} takes .*README"
    ) as error:
        DatasetCatalog.get(name)
    assert all(re.search(part, str(error.value)) for part in parts)


def test_coco_file_with_cocos_categories_loads(tmp_path, monkeypatch, write_image):
    monkeypatch.setenv("DETKIT_DATASETS", str(tmp_path))
    write_image("coco/val2017/000000000001.jpg")
    content = {
        "images": [{"id": 1, "file_name": "000000000001.jpg", "height": 24, "width": 32}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 90, "bbox": [1, 1, 5, 5]}],
        "categories": [{"id": i, "name": name} for i, name in COCO_NAMES.items()],
    }
    square, line = [1, 1, 5, 1, 5, 5, 1, 5], [1, 1, 5, 5]
    content["annotations"][0]["segmentation"] = [line, square]
    (tmp_path / "coco/annotations").mkdir()
    (tmp_path / "coco/annotations/instances_val2017.json").write_text(json.dumps(content))
    (annotation,) = DatasetCatalog.get("coco_2017_val")[0]["annotations"]
    assert annotation["category_id"] == 79
    assert [list(polygon) for polygon in annotation["segmentation"]] == [
        square
    ]  # of a public file, a line is left out


def test_voc_tree_loads(tmp_path, monkeypatch, write_voc, make_voc_xml):
    monkeypatch.setenv("DETKIT_DATASETS", str(tmp_path))
    write_voc(
        {"000001": make_voc_xml([("tvmonitor", (1, 1, 9, 9))])}, split="trainval", root="VOC2007"
    )
    assert DatasetCatalog.get("voc_2007_trainval")[0]["annotations"][0]["category_id"] == 19


@pytest.fixture
def bccd_root(monkeypatch):
    folder = Path(os.environ.get("DETKIT_DATASETS", "datasets")) / "bccd"
    if not folder.is_dir():
        pytest.skip(f"the BCCD data set is not at {folder}: set DETKIT_DATASETS")
    return folder


def test_bccd_loads_whole(bccd_root):
    records = load_voc_folders(
        str(bccd_root / "JPEGImages"), str(bccd_root / "Annotations"), ["RBC", "WBC", "Platelets"]
    )
    assert len(records) == len(list((bccd_root / "Annotations").glob("*.xml")))
    assert sum(len(r["annotations"]) for r in records) > 4000
