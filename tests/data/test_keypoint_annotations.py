"""Keypoints through flips, crops and resizes, and what a mirror exchanges."""

import numpy as np
import pytest

from detkit.data import MetadataCatalog
from detkit.data import transforms as T
from detkit.data.keypoint_annotations import (
    as_keypoints,
    create_keypoint_hflip_indices,
    keypoints_of,
    transform_keypoints,
)

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


def test_names_without_any_pair_are_worth_a_warning(caplog):
    assert create_keypoint_hflip_indices(noted("a", ["nose", "ear_a", "ear_b"], [])).tolist() == [
        0,
        1,
        2,
    ]
    assert "keypoint_flip_map is empty" in caplog.text
