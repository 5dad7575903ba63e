"""What is checked and reported before anything is trained."""

import gc
import logging
import math
import tracemalloc

import pytest

from detkit.data import (
    DatasetCatalog,
    MetadataCatalog,
    check_dataset_against_model,
    dataset_dicts,
    filter_images_with_few_keypoints,
    filter_images_with_only_crowd_annotations,
    get_detection_dataset_dicts,
    print_instances_class_histogram,
)
from detkit.structures import BoxMode
from detkit.utils.errors import ConfigError, DataError


def annotation(box=(1, 2, 10, 8), category_id=0, **more):
    return {
        "bbox": list(box),
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": category_id,
        "iscrowd": 0,
        **more,
    }


def record(index, *annotations):
    return {
        "file_name": f"{index}.jpg",
        "image_id": index,
        "height": 24,
        "width": 32,
        "annotations": list(annotations),
    }


def register(name, records, classes=("cat", "dog")):
    DatasetCatalog.register(name, lambda: records)
    if classes is not None:
        MetadataCatalog.get(name).thing_classes = list(classes)


GOOD = [record(0, annotation()), record(1, annotation(category_id=1), annotation())]


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.INFO)


@pytest.mark.parametrize(
    "boxes",
    [
        pytest.param([(0.2, 0.3, 0.5, 0.4), (0.1, 0.1, 0.9, 0.9)], id="xywh"),
        pytest.param([(0, 0, 1, 1)], id="whole-image"),
        pytest.param([(-0.8, -0.7, 0.3, 0.2)], id="voc"),
    ],
)
def test_boxes_as_fractions_are_refused(boxes):
    register("a", GOOD)
    register("b", [record(i, annotation(box, id=7)) for i, box in enumerate(boxes)])
    with pytest.raises(
        DataError, match=r"boxes of data set 'b' .* annotation 7 of 0.jpg: .*fractions"
    ):
        get_detection_dataset_dicts(["a", "b"])


def test_one_small_box_among_others_is_no_fraction():
    register("a", [record(0, annotation((0, 0, 1, 1)), annotation())])
    assert len(get_detection_dataset_dicts("a")[0]["annotations"]) == 2


def test_objects_without_usable_mask_are_left_out_where_masks_are_needed(caplog):
    triangle = [[1, 1, 5, 1, 5, 5]]
    register("a", [record(0, annotation(segmentation=triangle), annotation(id=8, segmentation=[]))])
    assert len(get_detection_dataset_dicts("a")[0]["annotations"]) == 2
    (left,) = get_detection_dataset_dicts("a", needs_masks=True)[0]["annotations"]
    assert left["segmentation"] == triangle
    assert "mask has nothing that can be used: annotation 8 of 0.jpg" in caplog.text


def test_crowds_alone_are_said_with_the_remedy(caplog):
    register("a", [record(0, annotation(iscrowd=True))])
    assert get_detection_dataset_dicts("a", filter_empty=False)
    assert "all 1 annotations are regions of crowds" in caplog.text
    with pytest.raises(DataError, match="regions of crowds only.* set iscrowd to 0"):
        get_detection_dataset_dicts("a")


@pytest.mark.parametrize("crowd", ["0", 0.0, None, False])
def test_every_form_of_an_unset_flag_is_an_object(crowd):
    records = [record(0, annotation(iscrowd=crowd))]
    register("a", records)
    assert get_detection_dataset_dicts("a") == records


def test_records_of_several_data_sets_come_in_order():
    register("a", GOOD)
    register("b", [record(5, annotation())])
    assert [r["image_id"] for r in get_detection_dataset_dicts(["a", "b"])] == [0, 1, 5]
    assert [r["image_id"] for r in get_detection_dataset_dicts("b")] == [5]


@pytest.mark.parametrize(("num_good", "on_screen"), [(99, True), (100, False)])
def test_a_few_images_left_out_are_for_the_file(num_good, on_screen, caplog):
    register("a", [*(record(i, annotation()) for i in range(num_good)), record(num_good)])
    get_detection_dataset_dicts("a")
    (told,) = [r for r in caplog.records if "left out (see the table)" in r.getMessage()]
    assert (getattr(told, "console", None) != "") == on_screen


def test_images_without_objects_are_left_out_loudly(caplog):
    crowd = record(8, annotation(iscrowd=1))
    register("a", [*GOOD, record(7), crowd, {"file_name": "9.jpg", "image_id": 9}])
    assert [r["image_id"] for r in get_detection_dataset_dicts("a")] == [0, 1]
    assert "3 of 5 images are left out" in caplog.text
    assert "DATALOADER.FILTER_EMPTY_ANNOTATIONS" in caplog.text
    table = " ".join(caplog.text.split())
    for line in (
        "| images | 5 |",
        "| - left out: no annotation with a usable box | 2 |",
        "| - left out: regions of crowds only | 1 |",
        "| images used | 2 |",
        "| annotations | 4 |",
        "| - regions of crowds, not trained on | 1 |",
        "| objects | 3 |",
    ):
        assert line in table
    assert len(get_detection_dataset_dicts("a", filter_empty=False)) == 5


def test_filters_by_their_detectron2_names():
    records = [*GOOD, record(7), record(8, annotation(iscrowd=1))]
    assert filter_images_with_only_crowd_annotations(records) == GOOD
    seen = record(9, annotation(keypoints=[1, 1, 2, 5, 5, 0, 6, 6, 1]))
    assert filter_images_with_few_keypoints([*GOOD, seen], 2) == [seen]
    assert filter_images_with_few_keypoints([seen], 3) == []


def test_few_keypoints_are_reported(caplog):
    register("a", [record(9, annotation(keypoints=[1, 1, 2])), *GOOD])
    assert len(get_detection_dataset_dicts("a", min_keypoints=1)) == 1
    assert "fewer than 1 visible keypoints" in caplog.text


# --- boxes ---


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        pytest.param((1, 2, 0, 8), "box has no area", id="no-width"),
        pytest.param((1, 2, 10, -8), "box has no area", id="negative-height"),
        pytest.param((1, math.nan, 10, 8), "box is not finite", id="nan"),
        pytest.param((1, 2, math.inf, 8), "box is not finite", id="infinite"),
        pytest.param((32, 2, 10, 8), "box lies outside of the image", id="right-of-the-image"),
        pytest.param((-20, 2, 10, 8), "box lies outside of the image", id="left-of-the-image"),
        pytest.param((-10, 2, 10, 8), "box lies outside of the image", id="up-to-the-left-edge"),
        pytest.param((1, 24, 10, 8), "box lies outside of the image", id="from-the-lower-edge"),
    ],
)
def test_unusable_boxes_are_dropped_by_id(caplog, box, reason):
    bad = record(3, annotation(id=41), annotation(box, id=42))
    register("a", [*GOOD, bad])
    kept = get_detection_dataset_dicts("a")[-1]["annotations"]
    assert [a["id"] for a in kept] == [41]
    assert f"1 annotation is left out, {reason}: annotation 42 of 3.jpg" in caplog.text
    assert len(bad["annotations"]) == 2


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        pytest.param((10, 12, 0, 8, 30), "box has no area", id="no width"),
        pytest.param((10, 12, 4, math.nan, 30), "box is not finite", id="nan"),
        pytest.param((40, 12, 10, 4, 30), "box lies outside of the image", id="right of the image"),
        pytest.param((40, 12, 18, 4, 30), None, id="a corner in the image"),
    ],
)
def test_unusable_rotated_boxes_are_dropped(caplog, box, reason):
    rotated = {**annotation(id=42), "bbox": list(box), "bbox_mode": BoxMode.XYWHA_ABS}
    register("a", [*GOOD, record(3, annotation(id=41), rotated)])
    kept = get_detection_dataset_dicts("a")[-1]["annotations"]
    assert [a["id"] for a in kept] == ([41, 42] if reason is None else [41])
    assert reason is None or f"left out, {reason}: annotation 42 of 3.jpg" in caplog.text
    assert "sticks out" not in caplog.text


@pytest.mark.parametrize("images_at_a_time", [1, 2, 3])
def test_images_are_judged_alike_however_many_at_a_time(images_at_a_time, monkeypatch, caplog):
    line, outside, over = (1, 2, 0, 8), (40, 2, 5, 5), (20, 2, 14, 8)
    records = [
        record(0, annotation(), annotation(line), annotation(iscrowd=1)),
        record(1, annotation(outside)),
        record(2),
        record(3, annotation(outside), annotation(), annotation(over, id=9), annotation(line)),
        record(4, annotation(line, iscrowd=1), annotation(category_id=1)),
    ]
    register("a", records)
    expected, expected_log = get_detection_dataset_dicts("a"), caplog.messages.copy()
    assert [r["image_id"] for r in expected] == [0, 3, 4]
    assert [len(r["annotations"]) for r in expected] == [2, 2, 1]
    caplog.clear()
    monkeypatch.setattr(dataset_dicts, "_IMAGES_AT_A_TIME", images_at_a_time)
    assert get_detection_dataset_dicts("a") == expected
    assert caplog.messages == expected_log
    assert len(records[3]["annotations"]) == 4


def test_looking_through_records_takes_little_memory(monkeypatch):
    records = [record(i, *(annotation() for _ in range(7))) for i in range(1500)]
    register("a", records)
    monkeypatch.setattr(dataset_dicts, "_IMAGES_AT_A_TIME", 64)
    tracemalloc.start()
    try:
        kept = get_detection_dataset_dicts("a")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(kept) == len(records)
    # Tables of all boxes took 200 bytes for each of them.
    assert peak < 40 * 7 * len(records)


def test_garbage_is_not_looked_for_while_records_are_read():
    collects = []

    def read():
        collects.append(gc.isenabled())
        return GOOD

    DatasetCatalog.register("a", read)
    get_detection_dataset_dicts("a")
    assert collects == [False]
    assert gc.isenabled()


def test_annotation_without_id_is_named_by_its_place(caplog):
    register("a", [*GOOD, record(3, annotation(), annotation((0, 0, 0, 0)))])
    get_detection_dataset_dicts("a")
    assert "object 2 of 3.jpg" in caplog.text


def test_image_whose_boxes_are_all_unusable_is_left_out():
    register("a", [*GOOD, record(3, annotation((0, 0, 0, 0)))])
    assert [r["image_id"] for r in get_detection_dataset_dicts("a")] == [0, 1]
    assert get_detection_dataset_dicts("a", filter_empty=False)[2]["annotations"] == []


def test_box_over_the_edge_is_kept_and_reported(caplog):
    register(
        "a",
        # Exactly one pixel over the edge is tolerated.
        [*GOOD, record(3, annotation((20, 2, 13, 8), id=1), annotation((20, 2, 20, 8), id=2))],
    )
    assert len(get_detection_dataset_dicts("a")[-1]["annotations"]) == 2
    assert (
        "1 box sticks out of its image by more than 1 pixel and will be clipped: annotation 2 of 3.jpg"
        in caplog.text
    )


def test_corners_stored_as_sizes_are_suspected(caplog):
    register("a", [record(i, annotation((15, 12, 30, 22), id=i)) for i in range(5)])
    get_detection_dataset_dicts("a")
    assert "corners (x1, y1, x2, y2) were stored as (x, y, width, height)" in caplog.text


def test_a_fifth_of_the_boxes_over_the_edge_is_not_suspicious(caplog):
    boxes = [(15, 12, 30, 22), *[(1, 2, 10, 8)] * 4]
    register("a", [record(i, annotation(box, id=i)) for i, box in enumerate(boxes)])
    get_detection_dataset_dicts("a")
    assert "1 box sticks out" in caplog.text
    assert "corners" not in caplog.text


def test_other_modes_and_unknown_sizes_are_not_judged():
    rotated = {**annotation((5, 5, 4, 2, 30)), "bbox_mode": BoxMode.XYWHA_ABS}
    unsized = {"file_name": "b.jpg", "image_id": 4, "annotations": [annotation((500, 500, 5, 5))]}
    corners = {**annotation((1, 1, 5, 5)), "bbox_mode": BoxMode.XYXY_ABS}
    register("a", [record(3, rotated, corners), unsized])
    assert [len(r["annotations"]) for r in get_detection_dataset_dicts("a")] == [2, 1]


# --- classes ---


def test_objects_per_class_are_listed(caplog):
    register("a", GOOD)
    get_detection_dataset_dicts("a")
    assert "| cat     |         2 | dog     |         1 | total   |         3 |" in caplog.text


def test_class_without_objects_is_warned_of(caplog):
    register(
        "a", [record(0, annotation(), annotation(category_id=1, iscrowd=1))], ("cat", "dog", "cow")
    )
    get_detection_dataset_dicts("a")
    assert "2 of 3 classes have no object: dog, cow. Classes with objects: cat." in caplog.text


def test_histogram_without_names(caplog):
    print_instances_class_histogram(GOOD)
    assert "class 0" in caplog.text


def test_unannotated_data_set_has_no_histogram(caplog):
    register("a", [{"file_name": "0.jpg", "image_id": 0}])
    get_detection_dataset_dicts("a", filter_empty=False, num_classes=2)
    assert "objects per class" not in caplog.text


def test_classes_that_fit():
    register("a", GOOD)
    assert len(get_detection_dataset_dicts("a", num_classes=2)) == 2


@pytest.mark.parametrize(
    ("ids", "classes", "num_classes", "expected"),
    [
        pytest.param(
            [0, 2, 2],
            ("cat", "dog", "cow"),
            2,
            [
                "has class ids outside of the range 0 to 1: 2 (2 objects, first in 1.jpg)",
                "has 3 classes (cat, dog, cow), the model 2",
                "set MODEL.ROI_HEADS.NUM_CLASSES to 3",
            ],
            id="model-too-small",
        ),
        pytest.param(
            [0, 1],
            ("cat", "dog"),
            80,
            [
                "has 2 classes (cat, dog), the model 80",
                "MODEL.ROI_HEADS.NUM_CLASSES is 80; set MODEL.ROI_HEADS.NUM_CLASSES to 2",
            ],
            id="model-too-large",
        ),
        pytest.param(
            [0, 7],
            None,
            2,
            ["7 (1 object, first in 1.jpg)", "NUM_CLASSES to at least 8"],
            id="no-names",
        ),
        pytest.param(
            [1, 2],
            ("cat", "dog"),
            2,
            ["range 0 to 1: 2", "correct the ids, which must count from 0"],
            id="from-1",
        ),
        pytest.param(
            [-1], ("cat", "dog"), 2, ["range 0 to 1: -1", "correct the ids"], id="negative"
        ),
        pytest.param(
            ["cat"], ("cat", "dog"), 2, ["range 0 to 1: 'cat'", "correct the ids"], id="text"
        ),
        pytest.param([True], ("cat", "dog"), 2, ["range 0 to 1: True"], id="truth-value"),
    ],
)
def test_classes_that_do_not_fit_give_one_error(ids, classes, num_classes, expected):
    register("a", [record(i, annotation(category_id=c)) for i, c in enumerate(ids)], classes)
    with pytest.raises(ValueError) as caught:
        get_detection_dataset_dicts("a", num_classes=num_classes)
    assert "data set 'a' does not fit the model" in str(caught.value)
    for text in expected:
        assert text in str(caught.value)


def test_key_of_another_model_is_named():
    register("a", GOOD)
    with pytest.raises(ValueError, match="set MODEL.RETINANET.NUM_CLASSES to 2"):
        check_dataset_against_model("a", GOOD, 5, "MODEL.RETINANET.NUM_CLASSES")


def test_data_sets_of_different_classes_are_refused():
    register("a", GOOD)
    register("b", GOOD, ("dog", "cat"))
    with pytest.raises(
        ValueError,
        match=r"same classes in the same order: 'a' has \['cat', 'dog'\], 'b' has \['dog', 'cat'\]",
    ):
        get_detection_dataset_dicts(["a", "b"])


# --- nothing to train on ---


def test_unknown_data_set_is_explained():
    register("cells_train", GOOD)
    with pytest.raises(
        KeyError, match="'cells_trian' is not registered. Did you mean 'cells_train'"
    ):
        get_detection_dataset_dicts("cells_trian")


def test_no_names_are_refused():
    with pytest.raises(ValueError, match="DATASETS.TRAIN"):
        get_detection_dataset_dicts([])


def test_empty_data_set_is_refused():
    register("a", [])
    with pytest.raises(ValueError, match="data set 'a' has no images"):
        get_detection_dataset_dicts("a")


def test_empty_data_set_is_refused_with_its_file():
    register("a", [])
    MetadataCatalog.get("a").set(json_file="labels/train.json", image_root="photos")
    with pytest.raises(
        ValueError, match=r"data set 'a' has no images: labels/train\.json lists none"
    ):
        get_detection_dataset_dicts("a")


def test_nothing_left_lists_the_reasons():
    register(
        "a", [record(0), record(1, annotation(iscrowd=1)), record(2, annotation((0, 0, 0, 0)))]
    )
    with pytest.raises(ValueError) as caught:
        get_detection_dataset_dicts("a")
    message = str(caught.value)
    assert "no usable image in 'a': all 3 were left out" in message
    assert "2 images: no annotation with a usable box" in message
    assert "1 images: regions of crowds only" in message
    assert "1 boxes: box has no area" in message
    assert (
        "FILTER_EMPTY_ANNOTATIONS False keeps images without objects, in keypoint models with MODEL."
        in message
    )


def test_data_set_without_proposal_file_is_refused():
    register("a", GOOD)
    register("b", GOOD)
    with pytest.raises(
        ValueError, match=r"PROPOSAL_FILES_\*\) per data set: got 1 files for 2 data sets \(a, b\)"
    ):
        get_detection_dataset_dicts(["a", "b"], proposal_files=["p.pkl"])


def test_objects_without_a_mask_are_listed_where_masks_are_needed():
    polygon = [[0, 0, 4, 0, 4, 4]]
    register(
        "a",
        [
            record(0, annotation(segmentation=polygon), annotation(iscrowd=1)),
            record(1, annotation(id=77)),
        ],
    )
    assert len(get_detection_dataset_dicts("a")) == 2
    with pytest.raises(
        ValueError,
        match=r"MODEL.MASK_ON .* 1 objects of data set 'a' have none: annotation 77 of 1.jpg",
    ):
        get_detection_dataset_dicts("a", needs_masks=True)


def test_images_of_label_maps_alone_are_not_left_out():
    register("a", [{"file_name": "0.jpg", "image_id": 0, "sem_seg_file_name": "0.png"}])
    assert len(get_detection_dataset_dicts("a", filter_empty=True)) == 1


def test_stuff_classes_must_fit_the_model():
    register("a", GOOD)
    MetadataCatalog.get("a").set(stuff_classes=["things", "sky"])
    assert get_detection_dataset_dicts("a", num_stuff_classes=2)
    with pytest.raises(
        ValueError,
        match=r"'a' .* 2 stuff classes \(things, sky\), the model 54; set MODEL.SEM_SEG_HEAD",
    ):
        get_detection_dataset_dicts("a", num_stuff_classes=54)
    with pytest.raises(ValueError, match="set MODEL.MINE.NUM_CLASSES to 2"):
        get_detection_dataset_dicts(
            "a", num_stuff_classes=54, num_stuff_classes_key="MODEL.MINE.NUM_CLASSES"
        )


def test_class_without_objects_may_be_left_out():
    # As Roboflow exports: class 0 is the name of the project.
    register(
        "a",
        [record(1, annotation(category_id=1), annotation(category_id=2))],
        ("pets", "cat", "dog"),
    )
    with pytest.raises(ConfigError, match=r"to 3, or leave out pets, .*`classes: \[cat, dog\]`"):
        get_detection_dataset_dicts("a", num_classes=2)
