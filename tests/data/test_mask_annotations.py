"""Masks of every form through the same augmentations: they come out as the same pixels."""

import numpy as np
import pytest
import torch

from detkit.data import transforms as T
from detkit.data.mask_annotations import masks_of, transform_segmentation
from detkit.structures import BitMasks, PolygonMasks
from detkit.structures.mask_formats import bitmask_to_rle, polygons_to_bitmask, rle_to_bitmask

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
