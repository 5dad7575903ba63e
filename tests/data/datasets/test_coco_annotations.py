"""Masks and keypoints of COCO files: what is taken over, and what is refused with the annotation and the file named."""

import numpy as np
import pytest

from detkit.data import MetadataCatalog
from detkit.data.datasets import load_coco_json
from detkit.data.datasets.coco_annotations import polygon_problem, rle_problem
from detkit.data.datasets.json_file import as_numbers
from detkit.structures import BoxMode
from detkit.structures.mask_formats import bitmask_to_rle
from detkit.utils.errors import DataError

BOX = {"id": 7, "image_id": 0, "category_id": 3, "bbox": [1, 2, 3, 4]}
TRIANGLE = [0, 0, 4, 0, 4, 4]
RLE = {"size": [24, 32], "counts": [100, 20, 24 * 32 - 120]}
NAMED = [
    {
        "id": 3,
        "name": "cat",
        "keypoints": ["nose", "left_ear", "right_ear"],
        "skeleton": [[1, 2], [1, 3]],
    }
]


def load(write_coco, *annotations, categories=None, **kwargs):
    sections = {} if categories is None else {"categories": categories}
    path, root = write_coco(1, annotations=list(annotations), **sections)
    return load_coco_json(path, root, **kwargs)[0]["annotations"]


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        pytest.param(
            [TRIANGLE, [1, 1, 5, 5]],
            "a polygon of 2 points, .1, 1, 5, 5.: it needs at least 3",
            id="points",
        ),
        pytest.param(
            [[0, 0, 4, 0, 4, 4, 1]], "a polygon of 7 numbers, but x and y alternate", id="odd"
        ),
        pytest.param(
            [1, 2, 3, 4, 5, 6], "polygons that are lists of numbers, has 1", id="not nested"
        ),
        pytest.param("mask", "polygons or a run-length mask, has 'mask'", id="text"),
        pytest.param(
            {**RLE, "size": [10, 20]}, "a run-length mask of 10x20 .* its image is 24x32", id="size"
        ),
        pytest.param(
            {"size": [24, 32], "counts": [5, 5]},
            "counts add up to 10, not to 24 x 32 pixels",
            id="counts",
        ),
        pytest.param({"counts": [5, 5]}, "with size .height, width. and counts", id="no size"),
    ],
)
def test_bad_mask_is_an_error_with_annotation_and_file(write_coco, segmentation, message):
    with pytest.raises(ValueError, match=rf"annotation 7 of .*train\.json .*{message}"):
        load(write_coco, {**BOX, "segmentation": segmentation})


def test_masks_of_all_formats_live_in_one_image(write_coco):
    compressed = bitmask_to_rle(np.eye(24, 32))
    masks = [[TRIANGLE], RLE, compressed]
    read = load(
        write_coco, *({**BOX, "id": i, "segmentation": mask} for i, mask in enumerate(masks))
    )
    assert [annotation["segmentation"] for annotation in read] == masks


@pytest.mark.parametrize("nothing", [[], {}, None])
def test_object_without_mask_has_none(write_coco, nothing):
    (read,) = load(write_coco, {**BOX, "segmentation": nothing})
    assert "segmentation" not in read


def test_mask_is_not_measured_against_an_unknown_size(write_coco):
    path, root = write_coco(
        1,
        images=[{"id": 0, "file_name": "0.jpg"}],
        annotations=[{**BOX, "segmentation": {"size": [1, 4], "counts": [4]}}],
    )
    assert load_coco_json(path, root)[0]["annotations"][0]["segmentation"]["size"] == [1, 4]


def test_bad_polygons_of_public_data_sets_are_counted(write_coco, caplog):
    first = {**BOX, "segmentation": [TRIANGLE, [1, 1, 5, 5]]}
    second = {**BOX, "id": 8, "segmentation": [[1, 1, 5, 5]]}
    left, without = load(write_coco, first, second, drop_bad_polygons=True)
    assert left["segmentation"] == [TRIANGLE]
    assert (without["segmentation"], without["bbox"]) == ([], [1, 2, 3, 4])
    assert "left out 2 polygons" in caplog.text
    assert "annotations that have no other keep their box: 8" in caplog.text


def test_polygon_without_points_is_no_mask(write_coco):
    (read,) = load(write_coco, {**BOX, "segmentation": [[]]})
    assert "segmentation" not in read


def test_mask_wholly_outside_of_its_image_is_named(write_coco, caplog):
    beside = [40, 2, 50, 2, 50, 9]
    (read,) = load(write_coco, {**BOX, "segmentation": [beside]})
    assert read["segmentation"] == []
    assert "mask of 1 annotations lies wholly outside of its image" in caplog.text
    (read,) = load(write_coco, {**BOX, "segmentation": [beside, TRIANGLE]})
    assert read["segmentation"] == [beside, TRIANGLE]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        pytest.param([[4e7, 1, 9, 1, 9, 9]], "at most 1,000,000 pixels: got 4e.07", id="far"),
        pytest.param([[float("nan"), 1, 9, 1, 9, 9]], "finite coordinates", id="nan"),
        pytest.param([[10**400, 1, 9, 1, 9, 9]], "cannot be drawn", id="huge"),
        pytest.param(
            [[9e5, 0, -9e5, 0] * 10], "outline of a polygon has at most 10,000,000", id="long"
        ),
        pytest.param(
            {"size": [24, 32], "counts": "b'PPYd0'"}, "cannot be read", id="bytes-as-text"
        ),
        pytest.param(
            {"size": ["24", "32"], "counts": [768]},
            "whose size and counts are numbers",
            id="size-as-text",
        ),
        pytest.param({"size": [24, 32], "counts": "PPYd0"}, "must add up to 768", id="too-long"),
        pytest.param({"size": [24, 32], "counts": [700.5, 67.5]}, "whole numbers", id="halves"),
        pytest.param({"size": [24, 32], "counts": [800, -32]}, "some negative", id="negative"),
    ],
)
def test_mask_that_would_end_the_process_is_an_error(write_coco, mask, message):
    with pytest.raises(DataError, match=rf"annotation 7 of .*{message}.*drop_bad_polygons"):
        load(write_coco, {**BOX, "segmentation": mask})
    (left,) = load(write_coco, {**BOX, "segmentation": mask}, drop_bad_polygons=True)
    assert left["segmentation"] == []


@pytest.mark.parametrize("crowd", [1, True, 1.0, "1", " True ", "yes"])
def test_every_form_of_a_set_flag_is_a_crowd(write_coco, crowd):
    (read,) = load(write_coco, {**BOX, "iscrowd": crowd})
    assert read["iscrowd"] == 1


@pytest.mark.parametrize("crowd", [0, False, 0.0, "0", "false", None, float("nan"), ""])
def test_every_form_of_an_unset_flag_is_no_crowd(write_coco, crowd):
    (read,) = load(write_coco, {**BOX, "iscrowd": crowd})
    assert (type(read["iscrowd"]), read["iscrowd"]) == (int, 0)


@pytest.mark.parametrize("flag", ["iscrowd", "difficult"])
def test_flag_without_meaning_is_an_error(write_coco, flag):
    with pytest.raises(DataError, match=rf"annotation 7 of .*json has a wrong {flag}: .* 'maybe'"):
        load(write_coco, {**BOX, flag: "maybe"})


def test_difficult_is_a_number_where_the_file_says_it(write_coco):
    assert [load(write_coco, {**BOX, "difficult": v})[0]["difficult"] for v in ("1", None)] == [
        1,
        0,
    ]
    assert "difficult" not in load(write_coco, BOX)[0]


def test_numbers_may_be_text(write_coco):
    written = {
        "bbox": ["1", "2.5", 3, "4"],
        "area": "12",
        "segmentation": [["0", "0", "4", "0", "4", "4"]],
        "keypoints": ["1", "2", "2"],
        "image_id": "0",
        "category_id": 3.0,
    }
    (read,) = load(write_coco, {**BOX, **written})
    assert read["bbox"] == [1, 2.5, 3, 4]
    assert read["area"] == 12
    assert read["segmentation"] == [TRIANGLE]
    assert read["keypoints"] == [1.5, 2.5, 2]
    assert read["category_id"] == 0


@pytest.mark.parametrize("size", [{"height": "24", "width": 32.0}, {"height": None}])
def test_size_of_an_image_may_be_text_or_missing_beside_polygons(write_coco, size):
    outside = [[40, 0, 44, 0, 44, 4]]
    images = [{"id": 0, "file_name": "0.jpg", "height": 24, "width": 32, **size}]
    path, root = write_coco(1, annotations=[{**BOX, "segmentation": outside}], images=images)
    (read,) = load_coco_json(path, root)[0]["annotations"]
    assert read["segmentation"] == ([] if size["height"] else outside)


@pytest.mark.parametrize("area", [None, float("nan"), -5])
def test_area_that_says_nothing_is_measured_instead(write_coco, area):
    (read,) = load(write_coco, {**BOX, "area": area})
    assert "area" not in read


def test_numbers_that_no_float_holds_are_an_error(write_coco):
    with pytest.raises(DataError, match="needs a bbox of four numbers"):
        load(write_coco, {**BOX, "bbox": [1, 2, 10**400, 3]})
    with pytest.raises(DataError, match="needs keypoints that are numbers"):
        load(write_coco, {**BOX, "keypoints": [1, 10**400, 2]})


def test_five_numbers_are_a_rotated_box(write_coco):
    (read,) = load(write_coco, {**BOX, "bbox": [1, 2.5, 3, 4, -30]})
    assert read["bbox"] == [1, 2.5, 3, 4, -30]
    assert read["bbox_mode"] == BoxMode.XYWHA_ABS
    with pytest.raises(DataError, match=r"or of five \[center x, center y, width, height, angle\]"):
        load(write_coco, {**BOX, "bbox": [1, 2, 3, 4, 5, 6]})


def test_booleans_are_no_numbers_and_no_ids(write_coco):
    with pytest.raises(DataError, match="needs a bbox of four numbers"):
        load(write_coco, {**BOX, "bbox": [True, True, True, True]})
    with pytest.raises(
        DataError, match="name an image that the file does not list: image_id False"
    ):
        load(write_coco, {**BOX, "image_id": False})


def test_id_of_nothing_keeps_its_quotes(write_coco):
    with pytest.raises(DataError, match="category_id '3a' in annotations 7"):
        load(write_coco, {**BOX, "category_id": "3a"})


def test_keypoints_of_another_number_than_the_category_names_are_an_error(write_coco):
    with pytest.raises(
        ValueError, match=r"annotation 7 of .*json has 2 keypoints .*lists 3: it needs 9 numbers"
    ):
        load(write_coco, {**BOX, "keypoints": [1, 2, 2, 3, 4, 2]}, categories=NAMED)


def test_keypoints_without_names_need_one_number(write_coco):
    with pytest.raises(
        ValueError, match=r"annotation 8 of .*\(annotation 7\) have 1: it needs 3 numbers"
    ):
        load(
            write_coco,
            {**BOX, "keypoints": [1, 2, 2]},
            {**BOX, "id": 8, "keypoints": [1, 2, 2, 3, 4, 2]},
        )


def test_keypoints_come_in_threes(write_coco):
    with pytest.raises(ValueError, match=r"annotation 7 of .*three numbers each .*has 4 numbers"):
        load(write_coco, {**BOX, "keypoints": [1, 2, 2, 3]})


def test_keypoints_are_numbers(write_coco):
    with pytest.raises(
        ValueError, match=r"annotation 7 of .*keypoints that are numbers, has \['a', 2, None\]"
    ):
        load(write_coco, {**BOX, "keypoints": ["a", 2, None]})


def test_names_pairs_and_lines_of_keypoints_are_noted(write_coco):
    load(write_coco, BOX, categories=NAMED, dataset_name="named")
    metadata = MetadataCatalog.get("named")
    assert metadata.keypoint_names == ["nose", "left_ear", "right_ear"]
    assert metadata.keypoint_flip_map == [("left_ear", "right_ear")]
    assert [rule[:2] for rule in metadata.keypoint_connection_rules] == [
        ("nose", "left_ear"),
        ("nose", "right_ear"),
    ]


def test_object_without_keypoints_has_none(write_coco):
    (read,) = load(write_coco, {**BOX, "keypoints": []}, categories=NAMED)
    assert "keypoints" not in read


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        pytest.param(
            [[1, 2, None, 4, 5, 6]], "has a polygon with None among its numbers", id="polygon"
        ),
        pytest.param({"size": [40, "60"], "counts": "a"}, "size and counts are numbers", id="size"),
        pytest.param(
            {"size": [40, 60], "counts": [100, None]}, "size and counts are numbers", id="counts"
        ),
    ],
)
def test_masks_are_numbers(segmentation, message):
    polygons = segmentation if isinstance(segmentation, list) else []
    problem = (
        polygon_problem(polygons[0], as_numbers(polygons[0]))
        if polygons
        else rle_problem(segmentation, None)
    )
    assert message in (problem or "")
