"""Data sets declared in YAML: both formats, where paths are looked for, and what is refused."""

import functools
import http.server
import itertools
import json
import shutil
import threading

import pytest
import torch

from detkit.config import get_cfg
from detkit.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_train_loader,
    register_declared_datasets,
)
from detkit.data.dataset_mapper import DatasetMapper
from detkit.utils import remote_files
from detkit.utils.colormap import class_colors
from detkit.utils.errors import ConfigError, DataError, MissingFileError
from detkit.utils.image import read_image

COCO = {"name": "mine", "format": "coco", "images": "images", "annotations": "train.json"}
VOC = {"name": "mine", "format": "voc", "root": "voc", "split": "train", "classes": ["cell"]}


@pytest.fixture(autouse=True)
def _root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETKIT_DATASETS", str(tmp_path))


@pytest.fixture
def voc_tree(write_voc, make_voc_xml):
    return write_voc({name: make_voc_xml([("cell", (1, 1, 9, 9))]) for name in ("a", "b")})


def test_coco_below_the_root_of_data_sets(write_coco, tmp_path):
    write_coco()
    register_declared_datasets([COCO])
    assert len(DatasetCatalog.get("mine")) == 3
    metadata = MetadataCatalog.get("mine")
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.json_file == str(tmp_path / "train.json")
    assert metadata.get("evaluator_type", "coco") == "coco"


def test_root_of_data_sets_may_be_set_after_registering(write_coco, monkeypatch, tmp_path):
    write_coco()
    monkeypatch.setenv("DETKIT_DATASETS", "/nowhere")
    register_declared_datasets([COCO])
    monkeypatch.setenv("DETKIT_DATASETS", str(tmp_path))
    assert len(DatasetCatalog.get("mine")) == 3
    assert MetadataCatalog.get("mine").image_root == str(tmp_path / "images")


def test_classes_select_and_are_known_before_loading(write_coco):
    write_coco()
    register_declared_datasets([{**COCO, "classes": ["dog"], "evaluator": "pascal_voc"}])
    assert MetadataCatalog.get("mine").thing_classes == ["dog"]
    assert MetadataCatalog.get("mine").evaluator_type == "pascal_voc"
    assert sum(len(r["annotations"]) for r in DatasetCatalog.get("mine")) == 1


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"root": "voc", "split": "train"}, id="root-and-name"),
        pytest.param({"root": "voc", "split": "voc/ImageSets/Main/train.txt"}, id="root-and-file"),
        pytest.param({"root": "voc"}, id="root-alone"),
        pytest.param({"images": "voc/JPEGImages", "annotations": "voc/Annotations"}, id="folders"),
        pytest.param(
            {"images": "voc/JPEGImages", "annotations": "voc/Annotations", "split": "train"},
            id="folders-name",
        ),
        pytest.param({"root": "voc", "images": "voc/JPEGImages"}, id="root-and-images"),
    ],
)
def test_voc_in_all_its_forms(voc_tree, fields):
    register_declared_datasets([{"name": "mine", "format": "voc", "classes": ["cell"], **fields}])
    assert [r["image_id"] for r in DatasetCatalog.get("mine")] == ["a", "b"]
    assert MetadataCatalog.get("mine").thing_classes == ["cell"]


def test_split_selects(voc_tree):
    (voc_tree / "ImageSets" / "Main" / "val.txt").write_text("b\n")
    register_declared_datasets([{**VOC, "split": "val"}])
    assert [r["image_id"] for r in DatasetCatalog.get("mine")] == ["b"]
    assert MetadataCatalog.get("mine").split == "val"
    assert MetadataCatalog.get("mine").dirname == str(voc_tree)


def test_folder_named_like_the_split_does_not_confuse(voc_tree, tmp_path):
    # The config makes paths absolute that exist beside the YAML file: a folder `train` there turns the name into a path.
    (tmp_path / "train").mkdir()
    register_declared_datasets([{**VOC, "split": str(tmp_path / "train")}])
    assert len(DatasetCatalog.get("mine")) == 2


def test_paths_beside_the_yaml_file(write_coco, tmp_path, monkeypatch):
    write_coco()
    monkeypatch.setenv("DETKIT_DATASETS", "/nowhere")
    yaml = tmp_path / "config.yaml"
    yaml.write_text(
        "DATASETS:\n  REGISTER:\n    - {name: mine, format: coco, images: images, annotations: train.json}\n"
    )
    cfg = get_cfg()
    cfg.merge_from_file(str(yaml))
    register_declared_datasets(cfg.DATASETS.REGISTER)
    assert len(DatasetCatalog.get("mine")) == 3


def test_declaring_again_is_nothing_new():
    for _ in range(2):
        register_declared_datasets([COCO, {**VOC, "name": "other"}])
    with pytest.raises(ValueError, match="'mine' is already registered with other contents"):
        register_declared_datasets([{**COCO, "images": "photos"}])


def test_nothing_to_declare():
    before = set(DatasetCatalog.list())
    register_declared_datasets([])
    assert set(DatasetCatalog.list()) == before


def test_one_wrong_entry_registers_none():
    with pytest.raises(ValueError, match=r"DATASETS.REGISTER\[1\]"):
        register_declared_datasets([COCO, {**VOC, "classes": None, "name": "x", "typo": 1}])
    assert "mine" not in DatasetCatalog


SEM_SEG = {
    "name": "mine",
    "format": "sem_seg",
    "images": "images",
    "labels": "labels",
    "classes": ["road", "rest"],
}
PANOPTIC = {
    "name": "mine",
    "format": "coco_panoptic",
    "images": "images",
    "annotations": "panoptic.json",
    "segments": "segments",
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETKIT_DATASETS", str(tmp_path))
    return tmp_path


def test_keypoints_are_named_beside_the_file(write_coco, root):
    box = {
        "id": 1,
        "image_id": 0,
        "category_id": 3,
        "bbox": [1, 2, 3, 4],
        "keypoints": [1, 2, 2, 3, 4, 2],
    }
    write_coco(1, annotations=[box])
    declared = {"name": "mine", "format": "coco", "images": "images", "annotations": "train.json"}
    register_declared_datasets([{**declared, "keypoints": ["a", "b"], "flip_pairs": [["a", "b"]]}])
    register_declared_datasets(
        [{**declared, "name": "other", "keypoints": ["left_eye", "right_eye"]}]
    )
    assert len(DatasetCatalog.get("mine")) == 1
    assert MetadataCatalog.get("mine").keypoint_flip_map == [("a", "b")]
    assert MetadataCatalog.get("other").keypoint_flip_map == [("left_eye", "right_eye")]


def test_bad_polygons_are_left_out_where_that_is_asked_for(write_coco, root, caplog):
    box = {"image_id": 0, "category_id": 3, "bbox": [1, 2, 3, 4]}
    good, bad = ([[0, 0, 4, 0, 4, 4]], [[1, 1, 5, 5]])
    write_coco(
        1,
        annotations=[{**box, "id": 1, "segmentation": good}, {**box, "id": 2, "segmentation": bad}],
    )
    declared = {"name": "mine", "format": "coco", "images": "images", "annotations": "train.json"}
    register_declared_datasets([declared, {**declared, "name": "other", "drop_bad_polygons": True}])
    with pytest.raises(
        ValueError,
        match=r"annotation 2 of .*train.json .* or leave such .* drop_bad_polygons: true",
    ):
        DatasetCatalog.get("mine")
    annotations = DatasetCatalog.get("other")[0]["annotations"]
    assert [a["segmentation"] for a in annotations] == [good, []]
    assert "left out 1 polygons" in caplog.text


def test_label_maps(write_image, root):
    write_image("images/a.png")
    write_image("labels/a.png")
    register_declared_datasets([{**SEM_SEG, "image_ending": ".png", "ignore_label": 9}])
    assert [r["sem_seg_file_name"] for r in DatasetCatalog.get("mine")] == [
        str(root / "labels/a.png")
    ]
    metadata = MetadataCatalog.get("mine")
    assert (metadata.stuff_classes, metadata.ignore_label, metadata.evaluator_type) == (
        ["road", "rest"],
        9,
        "sem_seg",
    )
    assert metadata.get("thing_classes") is None


@pytest.mark.parametrize("is_separated", [False, True])
def test_panoptic_joined_and_separated(write_coco, write_image, root, is_separated):
    write_coco(1)
    write_image("segments/0.png")
    write_image("labels/0.png")
    # In the order of neither ids nor names.
    names = (("sky", 9, 0), ("ant", 7, 1), ("cat", 3, 1), ("bog", 12, 0))
    content = {
        "annotations": [
            {"image_id": 0, "file_name": "0.png", "segments_info": [{"id": 5, "category_id": 9}]}
        ],
        "categories": [
            {"id": number, "name": name, "isthing": isthing} for name, number, isthing in names
        ],
    }
    (root / "panoptic.json").write_text(json.dumps(content))
    apart = {"instances": "train.json", "labels": "labels"} if is_separated else {}
    register_declared_datasets([{**PANOPTIC, **apart}])
    (record,) = DatasetCatalog.get("mine")
    metadata = MetadataCatalog.get("mine")
    assert metadata.evaluator_type == "coco_panoptic_seg"
    if is_separated:
        assert (metadata.thing_classes, metadata.stuff_classes) == (
            ["cat", "dog"],
            ["things", "sky", "bog"],
        )
        assert metadata.stuff_colors == class_colors(3)
        assert record["annotations"]
    else:
        assert metadata.stuff_classes == ["cat", "ant", "sky", "bog"]
        assert metadata.thing_colors == metadata.stuff_colors == class_colors(4)
        assert record["segments_info"][0]["category_id"] == 2
    assert len(DatasetCatalog.get("mine")) == 1  # and loads again


def test_panoptic_categories_of_no_kind_are_refused(root):
    categories = [{"id": 1, "name": "ant", "isthing": "1"}, {"id": 2, "name": "sky"}]
    (root / "panoptic.json").write_text(json.dumps({"annotations": [], "categories": categories}))
    for folder in (PANOPTIC["images"], PANOPTIC["segments"]):
        (root / folder).mkdir(parents=True, exist_ok=True)
    register_declared_datasets([PANOPTIC])
    with pytest.raises(DataError, match=r"1 of 2 categories of .*json lack isthing: .*: sky"):
        DatasetCatalog.get("mine")


def test_lvis(root):
    (root / "coco").mkdir()
    image = {"id": 7, "coco_url": "http://x/train2017/7.jpg", "neg_category_ids": [1]}
    category = {"id": 1, "name": "a", "image_count": 3}
    (root / "lvis.json").write_text(
        json.dumps({"images": [image], "annotations": [], "categories": [category]})
    )
    register_declared_datasets(
        [{"name": "mine", "format": "lvis", "images": "coco", "annotations": "lvis.json"}]
    )
    (record,) = DatasetCatalog.get("mine")
    assert record["file_name"] == str(root / "coco/train2017/7.jpg")
    assert MetadataCatalog.get("mine").class_image_count == [{"id": 1, "image_count": 3}]


def without(entry, *fields):
    return {key: value for key, value in entry.items() if key not in fields}


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        pytest.param("coco", TypeError, r"DATASETS.REGISTER\[0\] must be a mapping", id="text"),
        pytest.param(
            without(COCO, "format"),
            ValueError,
            r"\(mine\) needs a format, one of coco, voc, .*, yolo, .*, lvis, sem_seg, coco_panoptic, got None",
            id="none",
        ),
        pytest.param(
            {**COCO, "format": "cocoo"}, ValueError, "got 'cocoo'. Did you mean 'coco'", id="format"
        ),
        pytest.param(
            {**COCO, "anotations": "x"},
            ValueError,
            "unknown field 'anotations'. Did you mean 'annotations'.*Fields of format coco: name, format, images",
            id="misspelt",
        ),
        pytest.param(
            {**COCO, "json_file": "x"},
            ValueError,
            "'json_file'. Did you mean 'annotations'",
            id="synonym",
        ),
        pytest.param(
            {**COCO, "split": "train"},
            ValueError,
            "unknown field 'split'",
            id="field-of-the-other-format",
        ),
        pytest.param(
            without(COCO, "images"),
            ValueError,
            "lacks 'images': format coco needs name, images",
            id="missing",
        ),
        pytest.param(
            without(COCO, "name"), ValueError, r"DATASETS.REGISTER\[0\] lacks 'name'", id="no-name"
        ),
        pytest.param(without(VOC, "classes"), ValueError, "lacks 'classes'", id="voc-no-classes"),
        pytest.param(
            without(VOC, "root"),
            ValueError,
            "lacks 'images', 'annotations': without root, format voc needs",
            id="no-root",
        ),
        pytest.param(
            {**COCO, "name": 5},
            TypeError,
            "name must be text, got 5; put it in quotes",
            id="number-name",
        ),
        pytest.param({**COCO, "images": ""}, TypeError, "images must be text, got ''", id="empty"),
        pytest.param(
            {**VOC, "classes": "cell"},
            TypeError,
            "classes must be a list of names",
            id="classes-text",
        ),
        pytest.param({**VOC, "classes": []}, TypeError, "at least one", id="classes-empty"),
        pytest.param(
            {**VOC, "classes": [True]},
            TypeError,
            "class names must be text, got True; put it",
            id="yaml-yes",
        ),
        pytest.param(
            {**VOC, "classes": ["a", "b", "a"]}, ValueError, "classes repeats a", id="classes-twice"
        ),
        pytest.param(
            {**COCO, "keypoint_names": ["a"]},
            ValueError,
            "Did you mean 'keypoints'",
            id="keypoint-synonym",
        ),
        pytest.param(
            {**COCO, "keypoints": "nose"},
            TypeError,
            "keypoints must be a list of names",
            id="keypoints",
        ),
        pytest.param(
            {**COCO, "flip_pairs": [["a", "b"]]},
            ValueError,
            "which must be named as well",
            id="pairs-alone",
        ),
        pytest.param(
            {**COCO, "keypoints": ["a", "b"], "flip_pairs": ["ab"]},
            TypeError,
            "a list of pairs",
            id="pairs-text",
        ),
        pytest.param(
            {**COCO, "keypoints": ["a", "b"], "flip_pairs": [["a", "c"]]},
            ValueError,
            "flip_pairs names c, which is not among keypoints: a, b",
            id="pairs-stray",
        ),
        pytest.param(
            without(SEM_SEG, "labels"),
            ValueError,
            "lacks 'labels': format sem_seg needs",
            id="labels",
        ),
        pytest.param(
            {**COCO, "drop_bad_polygons": "yes"},
            TypeError,
            "must be true or false, got 'yes'",
            id="drop",
        ),
        pytest.param(
            {**SEM_SEG, "ignore_label": "x"},
            TypeError,
            "ignore_label must be a number",
            id="ignore",
        ),
        pytest.param(
            {**PANOPTIC, "instances": "a.json"},
            ValueError,
            "lacks 'labels': to train instances and stuff apart, format coco_panoptic needs",
            id="panoptic-half",
        ),
        pytest.param(
            {**VOC, "evaluator": "voc"},
            ValueError,
            "evaluator must be one of coco, pascal_voc",
            id="evaluator",
        ),
    ],
)
def test_wrong_entries_are_explained(entry, error, message):
    with pytest.raises(error, match=message):
        register_declared_datasets([entry])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param(
            {"images": "photoz"}, "does not exist: photoz, .*mean 'photos'", id="misspelt"
        ),
        pytest.param(
            {"annotations": "b.json"}, "a file that does not exist: b.json, .*mean 'a.json'", id="b"
        ),
        pytest.param({"images": "a.json"}, "needs a folder, .*a.json is a file", id="file"),
        pytest.param({"annotations": "photos"}, "needs a file, .*photos is a folder", id="folder"),
    ],
)
def test_folder_is_checked_before_anything_is_read(root, changed, message):
    (root / "photos").mkdir()
    (root / "a.json").write_text("{}")
    entry = {"name": "mine", "format": "coco", "images": "photos", "annotations": "a.json"}
    register_declared_datasets([{**entry, **changed}])
    with pytest.raises(MissingFileError, match=message):
        DatasetCatalog.get("mine")


CSV = {"name": "mine", "format": "csv", "images": "images", "annotations": "boxes.csv"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        pytest.param({**CSV, "columns": {"lable": "x"}}, "Did you mean 'label'", id="meaning"),
        pytest.param({**CSV, "columns": "label"}, "columns must map meanings", id="text"),
        pytest.param({**CSV, "columns": {"label": 3}}, "must be text", id="number"),
        pytest.param({**CSV, "normalized": "yes"}, "normalized must be true or false", id="flag"),
        pytest.param(
            {"name": "mine", "format": "yolo", "images": "images"},
            "lacks 'classes': without data, format yolo needs images, classes",
            id="yolo",
        ),
    ],
)
def test_wrong_fields_of_tables_and_yolo_are_explained(entry, message):
    with pytest.raises(ConfigError, match=message):
        register_declared_datasets([entry])


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The address at which a server on this machine has the folder of the test."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DETKIT_OFFLINE", raising=False)
    monkeypatch.setattr(remote_files, "SCHEMES", ("http",))
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def _trained_on(entry, num_images, num_workers=2):
    """The pixels of each image as the loader of a training gives them, by image id."""
    register_declared_datasets([entry])
    loader = build_detection_train_loader(
        DatasetCatalog.get("mine"),
        mapper=DatasetMapper(True, augmentations=[]),
        total_batch_size=1,
        num_workers=num_workers,
        seed=3,
        skip_bad_images=True,
    )
    batches = itertools.islice(loader, 4 * num_images)
    pixels = {sample["image_id"]: sample["image"] for batch in batches for sample in batch}
    DatasetCatalog.remove("mine")
    MetadataCatalog.remove("mine")
    return pixels


def test_training_reads_addresses(write_coco, served, tmp_path):
    pytest.importorskip("fsspec")
    write_coco()
    expected = _trained_on(COCO, 3, num_workers=0)
    assert len(expected) == 3
    shutil.make_archive(str(tmp_path / "shard"), "zip", tmp_path, "images")
    for images, annotations in (
        (f"{served}/images", f"{served}/train.json"),
        ("zip://images::shard.zip", "train.json"),
        (f"zip://images::{served}/shard.zip", f"{served}/train.json"),
    ):
        found = _trained_on({**COCO, "images": images, "annotations": annotations}, 3)
        assert found.keys() == expected.keys()
        for image_id, pixels in expected.items():
            torch.testing.assert_close(found[image_id], pixels, rtol=0, atol=0)


def test_a_bad_address_is_a_bad_image(write_coco, served, tmp_path, caplog):
    write_coco()
    (tmp_path / "images" / "1.jpg").unlink()
    found = _trained_on({**COCO, "images": f"{served}/images"}, 2)
    assert found.keys() == {0, 2}
    assert "1.jpg cannot be read" in caplog.text
    assert "404" in caplog.text


def test_names_do_not_lead_out_of_an_address(write_coco, served):
    for name in ("../a.jpg", "x::/etc/passwd", "/a.jpg", "x/../../a.jpg"):
        image = {"id": 0, "file_name": name, "height": 24, "width": 32}
        write_coco(images=[image], annotations=[])
        register_declared_datasets([{**COCO, "images": f"{served}/images"}])
        with pytest.raises(DataError, match="lies outside of the image folder"):
            DatasetCatalog.get("mine")
        DatasetCatalog.remove("mine")
        MetadataCatalog.remove("mine")


def test_archive_beside_the_yaml_file(write_coco, tmp_path, monkeypatch):
    pytest.importorskip("fsspec")
    write_coco()
    shutil.make_archive(str(tmp_path / "shard"), "zip", tmp_path / "images")
    monkeypatch.setenv("DETKIT_DATASETS", "/nowhere")
    entry = {**COCO, "images": "zip://::shard.zip"}
    (tmp_path / "c.yaml").write_text(json.dumps({"DATASETS": {"REGISTER": [entry]}}))
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "c.yaml"))
    register_declared_datasets(cfg.DATASETS.REGISTER)
    file = DatasetCatalog.get("mine")[0]["file_name"]
    assert file == f"zip://0.jpg::{tmp_path}/shard.zip"
    assert read_image(file).shape == (24, 32, 3)


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        ({**VOC, "root": "s3://b/x"}, "root"),
        ({**PANOPTIC, "segments": "s3://b/x"}, "segments"),
        ({**PANOPTIC, "images": "s3://b/x", "instances": "a.json", "labels": "b"}, "images"),
    ],
)
def test_folders_that_are_listed_take_no_address(entry, field):
    with pytest.raises(ConfigError, match=f"{field} must be a local path, got 's3://b/x'"):
        register_declared_datasets([entry])


def test_other_formats_take_addresses_of_images(write_coco, tmp_path):
    write_coco(
        images=[
            {
                "id": 1,
                "coco_url": "http://x/a/1.jpg",
                "height": 24,
                "width": 32,
                "neg_category_ids": [],
                "not_exhaustive_category_ids": [],
            }
        ],
        annotations=[],
    )
    (tmp_path / "a.xml").write_text(
        '<annotations><image id="0" name="a/1.jpg" width="32" height="24"/></annotations>'
    )
    for form, file in (("lvis", "train.json"), ("cvat", "a.xml")):
        entry = {"name": form, "format": form, "images": "https://x.org/b", "annotations": file}
        register_declared_datasets([entry])
        assert DatasetCatalog.get(form)[0]["file_name"] == "https://x.org/b/a/1.jpg"


def test_an_address_is_checked_before_anything_is_read(write_coco):
    write_coco()
    register_declared_datasets([{**COCO, "images": "http://x.org/images"}])
    with pytest.raises(ConfigError, match="only https is"):
        DatasetCatalog.get("mine")
