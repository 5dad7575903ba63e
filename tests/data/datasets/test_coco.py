"""Reading COCO json: what is taken over, what may be missing, and what is refused."""

import numpy as np
import pytest

from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.data.datasets import load_coco_json, register_coco_instances
from detkit.data.datasets.coco import note_keypoints
from detkit.data.datasets.coco_export import category_ids_of
from detkit.structures import BoxMode
from detkit.utils.errors import DataError

IMAGE = {"id": 0, "file_name": "0.jpg", "height": 24, "width": 32}
BOX = {"id": 1, "image_id": 0, "category_id": 3, "bbox": [1, 2, 3, 4]}


def test_images_and_annotations_are_read(write_coco):
    records = load_coco_json(*write_coco(2))
    assert [r["image_id"] for r in records] == [0, 1]
    assert records[1]["file_name"].endswith("images/1.jpg")
    assert (records[0]["height"], records[0]["width"]) == (24, 32)
    annotation = records[1]["annotations"][0]
    assert annotation == {
        "id": 101,
        "bbox": [2, 2, 10, 8],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 1,
        "iscrowd": 0,
    }


def test_images_come_in_the_order_of_their_ids(write_coco):
    images = [{**IMAGE, "id": i} for i in (5, 2, 9)]
    assert [
        r["image_id"] for r in load_coco_json(*write_coco(1, images=images, annotations=[]))
    ] == [2, 5, 9]


def test_classes_come_in_the_order_of_their_ids(write_coco):
    categories = [{"id": 7, "name": "ant"}, {"id": 10, "name": "cow"}, {"id": 3, "name": "cat"}]
    file = write_coco(2, categories=categories)
    records = load_coco_json(*file, dataset_name="mine")
    assert MetadataCatalog.get("mine").thing_classes == ["cat", "ant", "cow"]
    assert [r["annotations"][0]["category_id"] for r in records] == [0, 1]


def test_optional_keys_are_kept(write_coco):
    full = {
        **BOX,
        "iscrowd": 1,
        "area": 12.5,
        "segmentation": [[0, 0, 4, 0, 4, 4]],
        "keypoints": [1, 2, 2],
        "score": 5,
    }
    path, root = write_coco(1, annotations=[full, {**BOX, "id": 2, "segmentation": []}])
    first, second = load_coco_json(path, root, extra_annotation_keys=["score"])[0]["annotations"]
    assert {key: first[key] for key in ("iscrowd", "area", "segmentation", "score")} == {
        key: full[key] for key in ("iscrowd", "area", "segmentation", "score")
    }
    assert first["keypoints"] == [1.5, 2.5, 2]  # from the number of a pixel to its middle
    assert "segmentation" not in second
    assert "score" not in load_coco_json(path, root)[0]["annotations"][0]


def test_image_without_annotations_is_background(write_coco):
    assert load_coco_json(*write_coco(2, annotations=[]))[1]["annotations"] == []


def test_file_without_annotations_is_a_test_set(write_coco):
    assert all("annotations" not in r for r in load_coco_json(*write_coco(2, annotations=None)))


def test_image_without_size_has_no_size(write_coco):
    record = load_coco_json(*write_coco(1, images=[{"id": 0, "file_name": "0.jpg"}]))[0]
    assert "height" not in record


def test_classes_select_and_order(write_coco, caplog):
    path, root = write_coco(3)
    records = load_coco_json(path, root, "mine", classes=["dog"])
    assert [len(r["annotations"]) for r in records] == [0, 1, 0]
    assert MetadataCatalog.get("mine").thing_classes == ["dog"]
    assert "left out annotations" in caplog.text
    assert "cat: 2" in caplog.text
    reordered = load_coco_json(path, root, classes=["dog", "cat"])
    assert [r["annotations"][0]["category_id"] for r in reordered] == [1, 0, 1]


def test_registered_data_set_loads(write_coco):
    path, root = write_coco()
    register_coco_instances("mine", {"evaluator_type": "pascal_voc", "note": 1}, path, root)
    register_coco_instances("mine", {"evaluator_type": "pascal_voc", "note": 1}, path, root)
    assert len(DatasetCatalog.get("mine")) == 3
    assert MetadataCatalog.get("mine").json_file == path
    assert MetadataCatalog.get("mine").evaluator_type == "pascal_voc"
    with pytest.raises(ValueError, match="already registered with other contents"):
        register_coco_instances("mine", {}, path, root + "2")


# --- refused ---


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        pytest.param(
            {"images": None, "image": []},
            "has no 'images', only .*Did you mean 'image'",
            id="no-images",
        ),
        pytest.param({"categories": None}, "has no 'categories'", id="no-categories"),
        pytest.param(
            {"images": {"a": 1}}, "'images' of .* must be a list of objects", id="images-no-list"
        ),
        pytest.param(
            {"annotations": [1]},
            "'annotations' of .* must be a list of objects",
            id="annotations-no-objects",
        ),
        pytest.param(
            {"images": [{"file_name": "a"}]},
            r"image number 0 \(from 0\) of .* has no id",
            id="image-no-id",
        ),
        pytest.param(
            {"images": [IMAGE, IMAGE]}, "uses image ids more than once: 0", id="image-twice"
        ),
        pytest.param({"images": [{"id": 0}]}, "image 0 of .* has no file_name", id="no-file-name"),
        pytest.param(
            {"images": [{**IMAGE, "width": 0}]}, r"image 0 \(0.jpg\) .* has width 0", id="no-width"
        ),
        pytest.param(
            {"images": [{**IMAGE, "height": "24px"}]},
            "has height '24px', need pixels",
            id="text-height",
        ),
        pytest.param({"categories": [{"id": 3}]}, "category 3 of .* needs a name", id="no-name"),
        pytest.param(
            {"categories": [{"id": 3, "name": "a"}] * 2},
            "uses category ids more than once: 3",
            id="cat-twice",
        ),
        pytest.param(
            {"annotations": [BOX, BOX]},
            "uses annotation ids more than once: 1",
            id="annotation-twice",
        ),
        pytest.param(
            {"annotations": [{**BOX, "image_id": 77}]},
            "1 annotations of .* name an image that the file does not list: image_id 77 in annotations 1",
            id="unknown-image",
        ),
        pytest.param(
            {"annotations": [{**BOX, "category_id": 4}, {**BOX, "id": 2, "category_id": 4}]},
            "2 annotations of .*category_id 4 in annotations 1, 2",
            id="unknown-category",
        ),
        pytest.param(
            {"annotations": [{**BOX, "bbox": []}]},
            r"annotation 1 of .* four numbers.*has \[\]",
            id="no-box",
        ),
        pytest.param(
            {"annotations": [{**BOX, "bbox": [1, 2, "3cm", 4]}]}, "four numbers", id="text-in-box"
        ),
    ],
)
def test_contradictions_are_refused(write_coco, sections, message):
    with pytest.raises(ValueError, match=message):
        load_coco_json(*write_coco(1, **sections))


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "/etc/passwd", "a/../../b.jpg", "a/../../../images2/b.jpg"]
)
def test_name_that_leads_out_of_the_image_folder_is_refused(write_coco, name):
    path, root = write_coco(1, images=[{**IMAGE, "file_name": name}])
    with pytest.raises(ValueError, match="lies outside of the image folder"):
        load_coco_json(path, root)


@pytest.mark.parametrize("root", ["", ".", "../images"])
def test_name_that_leads_out_of_a_relative_folder_is_refused(write_coco, root):
    path, _ = write_coco(1, images=[{**IMAGE, "file_name": "../a.jpg"}])
    with pytest.raises(ValueError, match="lies outside of the image folder"):
        load_coco_json(path, root)


@pytest.mark.parametrize("name", ["a/../b.jpg", "a..b.jpg", "..a.jpg", "sub/a:b.jpg"])
@pytest.mark.parametrize("root", ["", "images", "../images", "/images"])
def test_unusual_name_inside_the_image_folder_is_fine(write_coco, root, name):
    path, _ = write_coco(1, images=[{**IMAGE, "file_name": name}])
    assert load_coco_json(path, root)[0]["file_name"].endswith(name)


def test_absolute_names_are_allowed_below_the_root_of_the_file_system(write_coco, write_image):
    absolute = write_image("elsewhere/a.jpg")
    path, _ = write_coco(1, images=[{**IMAGE, "file_name": absolute}])
    assert load_coco_json(path, "/")[0]["file_name"] == absolute


def test_classes_that_the_file_lacks_list_expected_and_found(write_coco):
    with pytest.raises(
        ValueError,
        match=r"no category 'cats'. Did you mean 'cat'.*Expected classes: cats, dog. Found .*cat, dog",
    ):
        load_coco_json(*write_coco(), classes=["cats", "dog"])


def test_class_without_object_may_be_missing_in_the_file(write_coco, caplog):
    path, root = write_coco()
    records = load_coco_json(path, root, "mine", classes=["cat", "yak", "dog"])
    assert [r["annotations"][0]["category_id"] for r in records] == [0, 2, 0]
    assert MetadataCatalog.get("mine").thing_classes == ["cat", "yak", "dog"]
    assert MetadataCatalog.get("mine").thing_dataset_id_to_contiguous_id == {3: 0, 7: 2}
    assert category_ids_of("mine") == [3, 9, 7]
    assert "lists no category yak" in caplog.text


@pytest.mark.parametrize("order", [["dog", "cat"], ["dog", "yak", "cat"]])
def test_classes_of_a_model_are_matched_by_name(write_coco, order):
    MetadataCatalog.get("mine").set(model_classes=order)
    records = load_coco_json(*write_coco(), dataset_name="mine")
    found = [order[r["annotations"][0]["category_id"]] for r in records]
    assert found == ["cat", "dog", "cat"]
    assert MetadataCatalog.get("mine").thing_classes == order


def test_objects_that_a_model_does_not_know_are_an_error_with_the_remedy(write_coco):
    MetadataCatalog.get("mine").set(model_classes=["cat"])
    path, root = write_coco()
    with pytest.raises(
        DataError, match=r"does not have: dog: 1\. .* `classes: \[cat\]` in the entry"
    ):
        load_coco_json(path, root, "mine")
    assert len(load_coco_json(path, root, "mine", classes=["cat"])) == 3


TWO_CATS = [{"id": 3, "name": "cat"}, {"id": 7, "name": "cat"}]


def test_two_categories_of_one_name_are_kept_apart(write_coco, caplog):
    records = load_coco_json(*write_coco(categories=TWO_CATS), dataset_name="mine")
    assert [r["annotations"][0]["category_id"] for r in records] == [0, 1, 0]
    assert MetadataCatalog.get("mine").thing_classes == ["cat (id 3)", "cat (id 7)"]
    assert "several categories of one name" in caplog.text


def test_name_of_two_categories_picks_neither(write_coco):
    path, root = write_coco(categories=[*TWO_CATS, {"id": 9, "name": "dog"}])
    with pytest.raises(DataError, match="no category 'cat'.* Several categories are called cat"):
        load_coco_json(path, root, classes=["cat", "dog"])
    assert len(load_coco_json(path, root, classes=["cat (id 7)", "dog"])) == 3


def test_not_a_number_is_read_for_the_report_to_find(write_coco):
    record = load_coco_json(*write_coco(1, annotations=[{**BOX, "bbox": [1, 2, float("nan"), 4]}]))[
        0
    ]
    assert np.isnan(record["annotations"][0]["bbox"][2])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        pytest.param(
            {"images": [{**IMAGE, "id": [1]}]},
            r"image ids that are all integers, or all text: .*\[1\]",
            id="id",
        ),
        pytest.param(
            {"images": [IMAGE, {**IMAGE, "id": "1"}]},
            "image ids that are all integers",
            id="mixed-ids",
        ),
        pytest.param(
            {"images": [{**IMAGE, "height": float("inf")}]},
            "has height inf, need pixels",
            id="endless",
        ),
        pytest.param(
            {"categories": [{"id": 1, "name": "a", "keypoints": 3}], "annotations": []},
            "category 1 .* list of names",
            id="names",
        ),
    ],
)
def test_values_of_the_wrong_kind_are_named(write_coco, sections, message):
    with pytest.raises(ValueError, match=message):
        load_coco_json(*write_coco(1, **sections))


# --- classes and keypoints as metadata ---


def test_classes_are_noted(write_coco):
    load_coco_json(*write_coco(), dataset_name="mine")
    metadata = MetadataCatalog.get("mine")
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1}
    assert len(metadata.thing_colors) == 2


def test_other_classes_than_noted_list_expected_and_found(write_coco):
    MetadataCatalog.get("mine").set(thing_classes=["dog", "cat"])
    with pytest.raises(
        ValueError,
        match=r"not those noted for data set 'mine'. Expected: dog, cat. Found: cat, dog",
    ):
        load_coco_json(*write_coco(), dataset_name="mine")


CAT = {
    "id": 3,
    "name": "cat",
    "keypoints": ["nose", "left_ear", "right_ear"],
    "skeleton": [[1, 2], [3, 1]],
}
NOTHING = {"id": 4, "name": "hat"}


@pytest.fixture
def metadata():
    yield MetadataCatalog.get("with keypoints")
    MetadataCatalog.remove("with keypoints")


@pytest.mark.parametrize(
    "categories", [[CAT], [NOTHING, CAT], [CAT, {**CAT, "id": 5}]], ids=["one", "some", "alike"]
)
def test_keypoints_their_mirror_and_their_lines_are_noted(metadata, categories):
    note_keypoints(metadata, categories, "a.json")
    assert metadata.keypoint_names == ["nose", "left_ear", "right_ear"]
    assert metadata.keypoint_flip_map == [("left_ear", "right_ear")]
    assert [rule[:2] for rule in metadata.keypoint_connection_rules] == [
        ("nose", "left_ear"),
        ("right_ear", "nose"),
    ]


@pytest.mark.parametrize(
    "categories",
    [[], [NOTHING], [CAT, {**CAT, "keypoints": ["tail"]}]],
    ids=["none", "no", "two kinds"],
)
def test_keypoints_that_are_not_those_of_all_are_not_noted(metadata, categories):
    note_keypoints(metadata, categories, "a.json")
    assert metadata.get("keypoint_names") is None


def test_what_is_noted_by_hand_stays(metadata):
    metadata.set(keypoint_flip_map=[], keypoint_connection_rules=[])
    note_keypoints(metadata, [CAT], "a.json")
    assert (metadata.keypoint_flip_map, metadata.keypoint_connection_rules) == ([], [])


def test_other_keypoints_than_noted_list_expected_and_found(metadata):
    metadata.set(keypoint_names=["tail"])
    with pytest.raises(
        ValueError,
        match=r"of a\.json are not those .* Expected: tail\. Found: nose, left_ear, right_ear",
    ):
        note_keypoints(metadata, [CAT], "a.json")


@pytest.mark.parametrize(
    "skeleton",
    [[[1, 4]], [[0, 1]], [[1]], [1, 2, 2, 3], "1-2", [["nose", "tail"]], [[float("inf"), 1]], 7],
)
def test_skeleton_of_other_keypoints_is_not_drawn(metadata, skeleton, caplog):
    note_keypoints(metadata, [{**CAT, "skeleton": skeleton}], "a.json")
    assert metadata.keypoint_names == CAT["keypoints"]
    assert metadata.get("keypoint_connection_rules") is None
    assert "a.json: the skeleton must be pairs of keypoints, which count from 1 to 3" in caplog.text


@pytest.mark.parametrize("is_used", [True, False])
def test_unused_class_0_of_roboflow_is_left_out(is_used, write_coco, caplog):
    caplog.set_level("INFO")
    categories = [{"id": 0, "name": "cells", "supercategory": "none"}]
    categories += [{"id": k, "name": n, "supercategory": "cells"} for k, n in ((3, "a"), (7, "b"))]
    box = {"id": 1, "image_id": 0, "category_id": 0 if is_used else 3, "bbox": [1, 2, 3, 4]}
    load_coco_json(*write_coco(1, categories=categories, annotations=[box]), "roboflow_test")
    expected = ["cells", "a", "b"] if is_used else ["a", "b"]
    assert MetadataCatalog.get("roboflow_test").thing_classes == expected
    assert ("left out the unused class 0, 'cells'" in caplog.text) is not is_used


def test_reference_written_as_text_or_as_a_fraction_means_the_id(write_coco):
    annotation = {"id": 1, "image_id": "0", "category_id": 3.0, "bbox": [1, 1, 5, 5]}
    path, root = write_coco(1, annotations=[annotation])
    (record,) = load_coco_json(path, root)
    assert [a["category_id"] for a in record["annotations"]] == [0]
