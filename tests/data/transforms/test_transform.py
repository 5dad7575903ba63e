"""Deterministic transforms: lists, boxes from points, and what a user's own transform needs."""

import fvcore.transforms.transform as fvcore
import numpy as np
import pytest
import torch

from detkit.data import transforms as T
from detkit.structures import RotatedBoxes, rotated_box_corners
from tests.helpers import random_rotated_boxes


class Shear(T.Transform):
    """As a user would write it, in Detectron2's way."""

    def __init__(self, slope):
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img):
        return img

    def apply_coords(self, coords):
        return np.stack([coords[:, 0] + self.slope * coords[:, 1], coords[:, 1]], axis=1)


def test_box_is_the_smallest_around_its_transformed_corners():
    assert Shear(0.5).apply_box([[0, 0, 10, 4]]).tolist() == [[0, 0, 12, 4]]


@pytest.mark.parametrize(
    "tfm", [T.HFlipTransform(20), T.ResizeTransform(10, 20, 30, 40), T.CropTransform(2, 3, 9, 5)]
)
def test_box_of_an_axis_aligned_transform_is_that_of_its_four_corners(tfm):
    boxes = np.random.default_rng(0).uniform(0, 10, (20, 2))
    boxes = np.concatenate([boxes, boxes + 3], axis=1)
    assert np.allclose(tfm.apply_box(boxes), T.Transform.apply_box(tfm, boxes))


@pytest.mark.parametrize(
    "tfm", [Shear(1.0), T.HFlipTransform(8), T.NoOpTransform(), T.TransformList([])]
)
def test_no_boxes_stay_no_boxes(tfm):
    assert tfm.apply_box(np.zeros((0, 4))).shape == (0, 4)


def test_list_applies_in_order():
    tfm = T.TransformList([T.CropTransform(2, 0, 8, 10), T.HFlipTransform(8)])
    assert tfm.apply_coords(np.array([[3.0, 1.0]])).tolist() == [[7, 1]]
    image = np.arange(100).reshape(10, 10)
    assert np.array_equal(tfm.apply_image(image), image[:, 2:][:, ::-1])
    assert np.array_equal(tfm.apply_segmentation(image), image[:, 2:][:, ::-1])
    assert tfm.apply_polygons([np.array([[3.0, 1.0], [4.0, 2.0]])])[0].tolist() == [[7, 1], [6, 2]]


def test_lists_add_up_flat():
    flip, noop = T.HFlipTransform(4), T.NoOpTransform()
    total = noop + T.TransformList([flip])
    assert [type(t) for t in total + flip] == [T.NoOpTransform, T.HFlipTransform, T.HFlipTransform]
    assert len(total) == 2
    assert total[1] is flip


def test_inverse_of_a_list_leads_back():
    tfm = T.TransformList(
        [
            T.HFlipTransform(20),
            T.ResizeTransform(10, 20, 30, 50),
            T.CropTransform(3, 4, 20, 10, 50, 30),
        ]
    )
    points = np.random.default_rng(0).uniform(0, 10, (6, 2))
    assert np.allclose(tfm.inverse().apply_coords(tfm.apply_coords(points)), points)


def test_transform_without_inverse_says_so():
    with pytest.raises(NotImplementedError, match="Shear has no inverse"):
        Shear(1.0).inverse()


def test_list_refuses_what_is_no_transform():
    with pytest.raises(TypeError, match="item 1 is 3"):
        T.TransformList([T.NoOpTransform(), 3])


def test_repr_shows_the_arguments():
    assert repr(T.HFlipTransform(8)) == "HFlipTransform(width=8)"
    assert "array(4, 4)" in repr(T.BlendTransform(np.zeros((4, 4)), 0.5, 0.5))


@pytest.mark.parametrize(
    "tfm",
    [
        T.HFlipTransform(90),
        T.VFlipTransform(90),
        T.CropTransform(10, 20, 50, 50),
        T.ResizeTransform(50, 60, 100, 120),
        T.TransformList([T.HFlipTransform(60), T.ResizeTransform(50, 60, 25, 30)]),
        T.NoOpTransform(),
    ],
)
def test_rotated_boxes_lie_on_the_transformed_corners(tfm):
    boxes = random_rotated_boxes(30).double()
    corners = tfm.apply_coords(rotated_box_corners(boxes).reshape(-1, 2).numpy())
    found = rotated_box_corners(torch.from_numpy(tfm.apply_rotated_box(boxes.numpy())))
    for expected_i, found_i in zip(corners.reshape(-1, 4, 2), found.numpy(), strict=True):
        # In any order: a mirror goes round the other way.
        distances = np.linalg.norm(expected_i[:, None] - found_i, axis=2)
        assert np.allclose(distances.min(axis=0), 0, atol=1e-4)
        assert np.allclose(distances.min(axis=1), 0, atol=1e-4)


@pytest.mark.parametrize(
    ("tfm", "box", "expected"),
    [
        pytest.param(T.HFlipTransform(100), [20, 30, 8, 4, 25], [80, 30, 8, 4, -25], id="mirror"),
        pytest.param(
            T.ResizeTransform(400, 200, 800, 800),
            [150, 100, 40, 20, 90],
            [600, 200, 80, 80, 90],
            id="unequal factors on its side",
        ),
        # Sides along (1, -1) and (1, 1) become (4, -2) and (4, 2).
        pytest.param(
            T.ResizeTransform(10, 10, 20, 40),
            [1, 1, 2**0.5, 2**0.5, 45],
            [4, 2, 20**0.5, 20**0.5, np.rad2deg(np.arctan2(4, 2))],
            id="unequal factors",
        ),
    ],
)
def test_rotated_boxes_by_hand(tfm, box, expected):
    assert np.allclose(tfm.apply_rotated_box([box]), [expected])
    assert tfm.apply_rotated_box(np.zeros((0, 5))).shape == (0, 5)


def test_resized_rotated_boxes_are_those_that_are_scaled():
    tensor = random_rotated_boxes(20)
    boxes = RotatedBoxes(tensor.clone())
    boxes.scale(3.0, 0.5)
    resized = T.ResizeTransform(100, 100, 50, 300).apply_rotated_box(tensor.numpy())
    assert np.allclose(resized, boxes.tensor.numpy(), rtol=1e-4, atol=1e-2)


def test_other_kinds_of_data_are_registered_by_class():
    class First(T.NoOpTransform):
        pass

    class Second(T.NoOpTransform):
        pass

    First.register_type("text", lambda transform, text: text + "1")

    @Second.register_type("text")
    def add(transform, text):
        return text + "2"

    assert T.TransformList([First(), Second()]).apply_text("a") == "a12"
    # Nothing is done to data of any kind.
    assert T.TransformList([First(), T.NoOpTransform()]).apply_text("a") == "a1"
    with pytest.raises(AttributeError, match="apply_text"):
        T.TransformList([First(), T.HFlipTransform(4)]).apply_text("a")
    assert not hasattr(T.NoOpTransform(), "other")
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = T.TransformList([]).other


@pytest.mark.parametrize("name", fvcore.__all__)
def test_transforms_are_of_the_kinds_of_fvcore(name):
    own = T.ResizeTransform if name == "ScaleTransform" else getattr(T, name)
    kind = getattr(fvcore, name)
    others = {k for k in fvcore.__all__ if issubclass(own, getattr(fvcore, k))} - {name}
    assert issubclass(own, kind)
    assert others <= {"Transform"}


def test_list_of_fvcore_takes_our_transforms():
    both = fvcore.TransformList([T.HFlipTransform(4), T.CropTransform(1, 0, 2, 2)])
    assert both.apply_box(np.array([[0.0, 0, 1, 1]])).tolist() == [[2, 0, 3, 1]]
