"""From annotations to ground truth: boxes, masks in every form, keypoints, what is dropped."""

import copy

import numpy as np
import pytest
import torch

from detkit.data import (
    MetadataCatalog,
    annotations_to_instances,
    annotations_to_instances_rotated,
    create_keypoint_hflip_indices,
    filter_empty_instances,
    transform_instance_annotations,
)
from detkit.data import transforms as T
from detkit.data.annotations import (
    as_keypoints,
    boxes_of,
    keypoints_of,
    masks_of,
    transform_keypoints,
    transform_segmentation,
    transformed_masks,
)
from detkit.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks, RotatedBoxes
from detkit.structures.mask_formats import bitmask_to_rle, polygons_to_bitmask, rle_to_bitmask
from detkit.utils.errors import ConfigError


def annotation(box=(1, 2, 10, 8), mode=BoxMode.XYWH_ABS, category_id=0, **more):
    return {"bbox": list(box), "bbox_mode": mode, "category_id": category_id, **more}


def test_boxes_of_several_modes_come_out_as_corners():
    annotations = [
        annotation(),
        annotation((1, 2, 11, 10), BoxMode.XYXY_ABS),
        annotation((6, 6, 10, 8, 0), BoxMode.XYWHA_ABS),
    ]
    assert boxes_of(annotations).tolist() == [[1, 2, 11, 10], [1, 2, 11, 10], [1, 2, 11, 10]]
    assert boxes_of(annotations[:1]).tolist() == [[1, 2, 11, 10]]
    assert boxes_of([]).shape == (0, 4)


def test_boxes_do_not_change_the_annotations():
    record = annotation()
    boxes_of([record])[:] = 0
    assert record["bbox"] == [1, 2, 10, 8]


def test_annotations_become_rotated_boxes():
    annotations = [annotation((6, 6, 10, 8, 200), BoxMode.XYWHA_ABS, 2), annotation()]
    instances = annotations_to_instances_rotated(annotations, (50, 40))
    assert type(instances.gt_boxes) is RotatedBoxes
    assert instances.gt_boxes.tensor.tolist() == [[6, 6, 10, 8, -160], [6, 6, 10, 8, 0]]
    assert instances.gt_classes.tolist() == [2, 0]
    assert len(annotations_to_instances_rotated([], (50, 40))) == 0


def test_relative_boxes_are_refused():
    with pytest.raises(ValueError, match="no conversion from XYWH_REL"):
        boxes_of([annotation((0.1, 0.1, 0.5, 0.5), BoxMode.XYWH_REL)])


def test_box_is_transformed_and_clipped():
    transformed = transform_instance_annotations(annotation(), T.HFlipTransform(8), (9, 8))
    assert transformed["bbox"] == [0, 2, 7, 9]
    assert transformed["bbox_mode"] == BoxMode.XYXY_ABS
    assert (
        transform_instance_annotations(annotation(), [T.HFlipTransform(8)], (9, 8)) == transformed
    )


def test_mask_and_keypoints_move_with_the_image():
    record = annotation(segmentation=[[0, 0, 4, 0, 4, 4]], keypoints=[1, 2, 2, 3, 4, 1], area=7.0)
    before = copy.deepcopy(record)
    moved = transform_instance_annotations(
        record, T.HFlipTransform(32), (24, 32), keypoint_hflip_indices=[1, 0]
    )
    assert [polygon.tolist() for polygon in moved["segmentation"]] == [[32, 0, 28, 0, 28, 4]]
    assert moved["keypoints"].tolist() == [[29, 4, 1], [31, 2, 2]]
    again = transform_instance_annotations(
        moved, T.VFlipTransform(24), (24, 32), keypoint_hflip_indices=[0, 1]
    )
    assert again["keypoints"].tolist() == [[29, 20, 1], [31, 22, 2]]
    assert moved["area"] == 7.0
    assert record == before


def test_run_lengths_become_the_bitmap_of_the_transformed_image():
    mask = np.zeros((24, 32), dtype=bool)
    mask[2:9, 3:20] = True
    record = annotation(segmentation=bitmask_to_rle(mask))
    moved = transform_instance_annotations(record, T.HFlipTransform(32), (24, 32))
    assert np.array_equal(moved["segmentation"], mask[:, ::-1])


def test_transformed_annotations_become_masks_and_keypoints():
    record = annotation(segmentation=[[0, 0, 4, 0, 4, 4]], keypoints=[1, 2, 2, 3, 4, 1])
    flip = T.HFlipTransform(32)
    moved = [
        transform_instance_annotations(record, flip, (24, 32), keypoint_hflip_indices=[1, 0])
    ] * 2
    instances = annotations_to_instances(moved, (24, 32))
    assert isinstance(instances.gt_masks, PolygonMasks)
    assert instances.gt_keypoints.tensor.shape == (2, 2, 3)
    drawn = annotations_to_instances(moved, (24, 32), mask_format="bitmask")
    assert isinstance(drawn.gt_masks, BitMasks)
    assert drawn.gt_masks.tensor.shape == (2, 24, 32)


def test_bad_mask_is_named():
    with pytest.raises(
        ValueError, match=r"annotation 5 of a.jpg: a polygon needs at least 3 points: got 2"
    ):
        transformed_masks(
            [annotation(id=5, segmentation=[[1, 1, 4, 4]])], T.NoOpTransform(), "a.jpg"
        )
    with pytest.raises(
        ValueError, match=r"the object at \[1, 2, 10, 8\] of a.jpg: it has no segmentation"
    ):
        transformed_masks([annotation()], T.NoOpTransform(), "a.jpg")


def test_annotations_become_instances():
    instances = annotations_to_instances([annotation(), annotation(category_id=5)], (24, 32))
    assert instances.image_size == (24, 32)
    assert instances.gt_boxes.tensor.tolist() == [[1, 2, 11, 10]] * 2
    assert instances.gt_classes.tolist() == [0, 5]
    assert instances.gt_classes.dtype == torch.int64


def test_no_annotations_become_no_instances():
    instances = annotations_to_instances([], (24, 32))
    assert len(instances) == 0
    assert instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_classes.shape == (0,)


def test_empty_boxes_are_dropped():
    boxes = torch.tensor([[0, 0, 5, 5], [3, 3, 3, 9], [0, 0, 5, 1e-6], [0, 0, float("nan"), 5]])
    instances = Instances((10, 10), gt_boxes=Boxes(boxes), gt_classes=torch.arange(4))
    assert filter_empty_instances(instances).gt_classes.tolist() == [0]
    kept, mask = filter_empty_instances(instances, box_threshold=4.0, return_mask=True)
    assert mask.tolist() == [True, False, False, False]
    assert len(kept) == 1
    assert len(instances) == 4


def test_filter_needs_a_criterion():
    with pytest.raises(ValueError, match="choose what to filter by"):
        filter_empty_instances(annotations_to_instances([], (4, 4)), by_box=False, by_mask=False)


# --- masks: every form comes out as the same pixels ---

SIZE = (24, 32)
POLYGONS = [[3.0, 2.0, 19.0, 2.0, 19.0, 15.0, 3.0, 15.0], [22.0, 18.0, 30.0, 18.0, 30.0, 22.0]]
BITMAP = polygons_to_bitmask(POLYGONS, *SIZE)


def uncompressed(bitmap):
    flat = bitmap.ravel(order="F").astype(int)
    changes = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
    return {"size": list(bitmap.shape), "counts": np.diff([0, *changes, flat.size]).tolist()}


FORMS = {
    "bitmap": BITMAP,
    "compressed": bitmask_to_rle(BITMAP),
    "uncompressed": uncompressed(BITMAP),
}


def test_forms_are_of_one_mask():
    assert np.array_equal(rle_to_bitmask(FORMS["uncompressed"]), BITMAP)


@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(T.HFlipTransform(32), id="hflip"),
        pytest.param(T.VFlipTransform(24), id="vflip"),
        pytest.param(T.CropTransform(5, 4, 20, 16), id="crop"),
        pytest.param(T.ResizeTransform(24, 32, 48, 64), id="resize"),
        pytest.param(T.PadTransform(3, 2, 1, 5), id="pad"),
        pytest.param(
            T.TransformList([T.CropTransform(2, 0, 28, 24), T.ResizeTransform(24, 28, 96, 112)]),
            id="list",
        ),
    ],
)
def test_every_form_gives_the_same_pixels(transform):
    moved = {name: transform_segmentation(mask, transform, SIZE) for name, mask in FORMS.items()}
    assert all(np.array_equal(mask, moved["bitmap"]) for mask in moved.values())
    drawn = polygons_to_bitmask(transform_segmentation(POLYGONS, transform), *moved["bitmap"].shape)
    assert (
        np.mean(drawn != moved["bitmap"]) < 0.01
    )  # the slanted side is drawn finer after a resize


def test_nothing_left_of_a_mask_is_no_polygon():
    assert transform_segmentation(POLYGONS[:1], T.CropTransform(20, 16, 12, 8)) == []


def test_polygons_stay_polygons_and_anything_else_draws_all():
    polygons = [np.array(polygon) for polygon in POLYGONS]
    assert isinstance(masks_of([polygons, polygons], SIZE), PolygonMasks)
    mixed = masks_of([polygons, BITMAP.astype(np.uint8)], SIZE)
    assert isinstance(mixed, BitMasks)
    assert torch.equal(mixed.tensor[0], mixed.tensor[1])
    assert isinstance(masks_of([polygons], SIZE, "bitmask"), BitMasks)


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_no_objects_give_no_masks(mask_format):
    assert len(masks_of([], SIZE, mask_format)) == 0


def test_drawn_masks_of_no_objects_know_the_image():
    masks = masks_of([], SIZE, "bitmask")
    assert masks.tensor.shape == (0, 24, 32)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        pytest.param([[1, 1, 4, 4]], "at least 3 points: got 2", id="two points"),
        pytest.param(
            {"size": [10, 20], "counts": [200]}, "got 10 x 20 .* image of 24 x 32", id="run lengths"
        ),
        pytest.param(np.zeros((3, 4)), r"got \(3, 4\) for an image of \(24, 32\)", id="bitmap"),
        pytest.param("mask", "a list of polygons, run lengths .* got str", id="text"),
        pytest.param(np.zeros(4), r"got ndarray \(4,\)", id="dimensions"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        transform_segmentation(mask, T.NoOpTransform(), SIZE)


def test_unknown_format_is_refused():
    with pytest.raises(
        ValueError, match="INPUT.MASK_FORMAT must be one of polygon, bitmask, got 'rle'"
    ):
        masks_of([], SIZE, "rle")


# --- keypoints ---

NAMES = ["nose", "left_eye", "right_eye"]
PAIRS = [("left_eye", "right_eye")]
POINTS = np.array([[[10.0, 5, 2], [4, 8, 1], [20, 9, 2]], [[0, 0, 0], [0, 0, 0], [31, 23, 2]]])


def noted(name, names=NAMES, pairs=PAIRS):
    MetadataCatalog.get(name).set(keypoint_names=names, keypoint_flip_map=pairs)
    return name


def test_mirror_exchanges_pairs_and_is_its_own_inverse():
    indices = create_keypoint_hflip_indices(noted("a"))
    assert indices.tolist() == [0, 2, 1]
    flip = T.HFlipTransform(32)
    once = transform_keypoints(POINTS, flip, (24, 32), indices)
    assert once[0].tolist() == [[22, 5, 2], [12, 9, 2], [28, 8, 1]]
    assert np.array_equal(transform_keypoints(once, flip, (24, 32), indices), POINTS)


def test_two_flips_exchange_nothing():
    both = T.TransformList([T.HFlipTransform(32), T.TransformList([T.HFlipTransform(32)])])
    assert np.array_equal(transform_keypoints(POINTS, both, (24, 32)), POINTS)


def test_vertical_flip_exchanges_nothing():
    moved = transform_keypoints(POINTS, T.VFlipTransform(24), (24, 32))
    assert moved[0].tolist() == [[10, 19, 2], [4, 16, 1], [20, 15, 2]]


def test_points_outside_of_the_image_are_not_labelled():
    moved = transform_keypoints(POINTS, T.CropTransform(4, 6, 16, 10), (10, 16))
    # Exactly on the border counts as inside, as in Detectron2.
    assert moved[0].tolist() == [[0, 0, 0], [0, 2, 1], [16, 3, 2]]
    assert not moved[1].any()


def test_objects_without_keypoints_have_none_labelled():
    keypoints = keypoints_of([{"keypoints": [1, 2, 2]}, {}], 1)
    assert keypoints.tolist() == [[[1, 2, 2]], [[0, 0, 0]]]
    assert keypoints_of([], 4).shape == (0, 4, 3)
    assert as_keypoints(keypoints_of([], 4)).tensor.shape == (0, 4, 3)


def test_wrong_number_names_annotation_and_file():
    with pytest.raises(
        ValueError, match=r"annotation 9 of a.jpg has 6 keypoint numbers, but 3 keypoints .* need 9"
    ):
        keypoints_of([{"id": 9, "keypoints": [1, 2, 2, 3, 4, 2]}], 3, "a.jpg")


def test_mirror_without_pairs_is_refused():
    with pytest.raises(
        ValueError, match="give keypoint_hflip_indices, or set INPUT.RANDOM_FLIP none"
    ):
        transform_keypoints(POINTS, T.HFlipTransform(32), (24, 32))


def test_metadata_must_name_keypoints_alike():
    noted("a")
    noted("b", [*NAMES, "mouth"])
    with pytest.raises(ValueError, match="same keypoint_names: 'a' has .* 'b' has .*mouth"):
        create_keypoint_hflip_indices(["a", "b"])
    with pytest.raises(ValueError, match="data set 'c' has no keypoint_names"):
        create_keypoint_hflip_indices(["c"])
    noted("d", pairs=[("left_ear", "right_ear")])
    with pytest.raises(ValueError, match="names left_ear, right_ear, which is not among"):
        create_keypoint_hflip_indices("d")
    with pytest.raises(ValueError, match="no data set is named"):
        create_keypoint_hflip_indices([])


def test_two_keypoints_of_one_name_are_refused():
    noted("a", ["foot", "body", "foot"], [])
    with pytest.raises(
        ConfigError, match="'a' has several keypoints called foot, .*RANDOM_FLIP none"
    ):
        create_keypoint_hflip_indices("a")


def test_names_without_any_pair_are_worth_a_warning(caplog):
    assert create_keypoint_hflip_indices(noted("a", ["nose", "ear_a", "ear_b"], [])).tolist() == [
        0,
        1,
        2,
    ]
    assert "keypoint_flip_map is empty" in caplog.text
