"""Panoptic json and png: what is read, and what is refused with file and image named."""

import json

import numpy as np
import pytest
from PIL import Image

from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.data.datasets import (
    load_coco_panoptic_json,
    merge_to_panoptic,
    register_coco_panoptic,
    register_coco_panoptic_separated,
    separate_coco_semantic_from_panoptic,
)
from detkit.data.datasets.coco_panoptic import load_separated, read_panoptic_png
from detkit.utils.errors import DataError

META = {
    "thing_dataset_id_to_contiguous_id": {3: 0, 7: 1},
    "stuff_dataset_id_to_contiguous_id": {9: 2},
}
SEGMENTS = [
    {"id": 5, "category_id": 9, "area": 700, "iscrowd": 0},
    {"id": 70000, "category_id": 7, "area": 68, "iscrowd": 0},
]


@pytest.fixture
def write(tmp_path):
    """Write one image's panoptic ground truth: stuff all over, a thing, and one pixel of nothing."""

    def write(segments=SEGMENTS, names=("0.png",), **more):
        ids = np.full((24, 32), 5)
        ids[:4, :17] = 70000
        ids[23, 31] = 0
        colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)
        (tmp_path / "panoptic").mkdir(exist_ok=True)
        for name in names:
            Image.fromarray(colors).save(tmp_path / "panoptic" / name)
        annotation = {"image_id": 0, "file_name": "0.png", "segments_info": segments, **more}
        (tmp_path / "panoptic.json").write_text(
            json.dumps({"annotations": [annotation], "images": []})
        )
        return str(tmp_path / "panoptic.json"), str(tmp_path / "images"), str(tmp_path / "panoptic")

    return write


def test_segments_get_contiguous_ids(write, tmp_path):
    (record,) = load_coco_panoptic_json(*write(), META)
    assert record["file_name"] == str(tmp_path / "images/0.jpg")
    assert record["pan_seg_file_name"] == str(tmp_path / "panoptic/0.png")
    assert [(s["category_id"], s["isthing"]) for s in record["segments_info"]] == [
        (2, False),
        (1, True),
    ]


def test_category_of_both_kinds_is_a_thing(write):
    both = {**META, "stuff_dataset_id_to_contiguous_id": {9: 2, 7: 3}}
    (record,) = load_coco_panoptic_json(*write(), both)
    assert (record["segments_info"][1]["category_id"], record["segments_info"][1]["isthing"]) == (
        1,
        True,
    )


def test_png_holds_ids(write):
    _, _, folder = write()
    assert np.unique(read_panoptic_png(f"{folder}/0.png")).tolist() == [0, 5, 70000]


@pytest.mark.parametrize("name", ["../../a.png", "/etc/passwd", "a/../../../b.png"])
def test_name_that_leads_out_of_the_folder_is_refused(write, tmp_path, name):
    path, images, folder = write(file_name=name)
    for read in (
        lambda: load_coco_panoptic_json(path, images, folder, META),
        lambda: separate_coco_semantic_from_panoptic(path, folder, str(tmp_path / "maps"), {9: 1}),
    ):
        with pytest.raises(
            ValueError,
            match=r"panoptic\.json names the image .* which lies outside of the image folder",
        ):
            read()
    assert not (tmp_path / "maps").exists()  # where the png would have been written to


def test_missing_png_is_named_with_its_image(write):
    with pytest.raises(
        FileNotFoundError, match=r"1 of 1 panoptic png that .*panoptic.json .*/0.png of image id 0"
    ):
        load_coco_panoptic_json(*write(names=("1.png",)), META)
    with pytest.raises(FileNotFoundError, match=r"a/0.png of image id 0"):
        load_coco_panoptic_json(*write(file_name="a/0.png"), META)


def test_unknown_category_is_named(write):
    segments = [{"id": 5, "category_id": 1}]
    with pytest.raises(
        ValueError, match=r"segment 5 of image id 0 in .*json has category 1, which is neither"
    ):
        load_coco_panoptic_json(*write(segments), META)


def test_annotation_without_segments_is_refused(write):
    path, *folders = write()
    with open(path, "w") as file:
        json.dump({"annotations": [{"image_id": 0, "file_name": "0.png"}]}, file)
    with pytest.raises(
        ValueError, match=r"lacks segments_info; it has \['file_name', 'image_id'\]"
    ):
        load_coco_panoptic_json(path, *folders, META)


@pytest.mark.parametrize("key", ["image_id", "id"])
def test_ids_of_more_than_64_bits_are_refused(write, key):
    path, *folders = write()
    with open(path) as file:
        content = json.load(file)
    entry = content["annotations"][0]
    (entry if key == "image_id" else entry["segments_info"][0])[key] = 2**70
    with open(path, "w") as file:
        json.dump(content, file)
    with pytest.raises(ValueError, match="id 1180591620717411303424, need integers of at most 64"):
        load_coco_panoptic_json(path, *folders, META)


def test_absent_and_grey_png_are_named(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "grey.png")
    with pytest.raises(ValueError, match=r"grey.png must be an RGB image, is of mode L"):
        read_panoptic_png(str(tmp_path / "grey.png"))
    with pytest.raises(FileNotFoundError, match=r"panoptic png .*none.png does not exist"):
        read_panoptic_png(str(tmp_path / "none.png"))


def test_stuff_is_separated_from_things(write, tmp_path):
    path, _, folder = write()
    separate_coco_semantic_from_panoptic(path, folder, str(tmp_path / "stuff"), {0: 0, 9: 1})
    labels = np.asarray(Image.open(tmp_path / "stuff/0.png"))
    assert {int(v): int((labels == v).sum()) for v in np.unique(labels)} == {
        0: 68,
        1: 24 * 32 - 69,
        255: 1,
    }


def test_registered_joined_data_set_loads(write):
    path, images, folder = write()
    register_coco_panoptic("mine_panoptic", META, images, folder, path)
    register_coco_panoptic("mine_panoptic", META, images, folder, path)
    assert len(DatasetCatalog.get("mine_panoptic")) == 1
    metadata = MetadataCatalog.get("mine_panoptic")
    assert (metadata.evaluator_type, metadata.ignore_label) == ("coco_panoptic_seg", 255)
    assert metadata.panoptic_root == folder


def test_registered_separated_data_set_loads(write, write_coco, tmp_path):
    path, _, folder = write()
    instances, images = write_coco(2)
    separate_coco_semantic_from_panoptic(path, folder, str(tmp_path / "stuff"), {0: 0, 9: 1})
    meta = {"stuff_classes": ["things", "sky"]}
    register_coco_panoptic_separated(
        "mine", meta, images, folder, path, str(tmp_path / "stuff"), instances
    )
    (record,) = DatasetCatalog.get("mine_separated")
    assert record["image_id"] == 0
    assert record["annotations"]
    assert record["sem_seg_file_name"] == str(tmp_path / "stuff/0.png")
    (stuff,) = DatasetCatalog.get("mine_stuffonly")
    assert "annotations" not in stuff
    assert MetadataCatalog.get("mine_separated").thing_classes == ["cat", "dog"]


def test_label_map_of_an_unknown_image_is_refused():
    with pytest.raises(
        ValueError, match=r"1 of 1 images with a label map .* 0 images with instances, first a.jpg"
    ):
        merge_to_panoptic(
            [], [{"file_name": "a.jpg", "image_id": "a", "sem_seg_file_name": "a.png"}]
        )


def test_images_have_the_names_that_the_json_lists(write, tmp_path):
    path, *folders = write()
    content = json.loads((tmp_path / "panoptic.json").read_text())
    content["images"] = [{"id": "0", "file_name": "photo.png"}]
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    (record,) = load_coco_panoptic_json(path, *folders, META)
    assert record["file_name"] == str(tmp_path / "images/photo.png")


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        pytest.param({"category_id": 9}, "segments with id", id="no-id"),
        pytest.param({"id": "five", "category_id": 9}, "segments with id", id="text-id"),
        pytest.param({"id": 5}, "category_id; it has", id="no-category"),
        pytest.param({"id": 5, "category_id": 9, "iscrowd": "x"}, "wrong iscrowd", id="crowd"),
    ],
)
def test_segments_are_checked(write, segment, message):
    with pytest.raises(DataError, match=rf"annotation of image id 0 in .*json .*{message}"):
        load_coco_panoptic_json(*write([segment]), META)


def test_two_annotations_of_one_image_are_refused(write, tmp_path):
    path, *folders = write()
    content = json.loads((tmp_path / "panoptic.json").read_text())
    content["annotations"] *= 2
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="several annotations of one image: 0"):
        load_coco_panoptic_json(path, *folders, META)


def test_categories_may_be_written_as_text(write):
    segments = [{"id": 5, "category_id": "9"}]
    (record,) = load_coco_panoptic_json(*write(segments), META)
    assert record["segments_info"][0]["category_id"] == 2


@pytest.mark.parametrize("written", ["5", 5.0, "5.0"])
def test_segment_ids_may_be_text_or_whole_floats(write, written):
    (record,) = load_coco_panoptic_json(*write([{**SEGMENTS[0], "id": written}]), META)
    assert [type(s["id"]) for s in record["segments_info"]] == [int]
    assert record["segments_info"][0]["id"] == 5


def test_png_images_are_paired_with_their_label_maps(write_coco, write_image):
    images = [{"id": 0, "file_name": "a.png", "height": 24, "width": 32}]
    path, root = write_coco(1, images=images)
    write_image("images/a.png")
    label = write_image("labels/a.png")
    (record,) = load_separated(path, root, label[: -len("/a.png")], "mine")
    assert (record["file_name"], record["sem_seg_file_name"]) == (f"{root}/a.png", label)


def test_two_images_of_one_file_do_not_shadow_each_other():
    detections = [{"file_name": "a.jpg", "image_id": i} for i in range(2)]
    with pytest.raises(DataError, match="several images with instances have one file: a.jpg"):
        merge_to_panoptic(detections, [{"file_name": "a.jpg"}])
