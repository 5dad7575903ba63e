"""Polygons cut at the border of an image, against the pixels that they cover."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from detkit.data import transforms as T
from detkit.data.transforms.polygon_clipping import clip_polygons

SIZE = (40, 50)


def drawn(polygons, scale=4, margin=60):
    """Return the pixels of an image of `SIZE` that polygons cover, on a finer grid; the polygons may leave it."""
    height, width = SIZE
    canvas = Image.new("1", (scale * (width + 2 * margin), scale * (height + 2 * margin)))
    for polygon in polygons:
        corners = ((polygon + margin) * scale).ravel().tolist()
        ImageDraw.Draw(canvas).polygon(corners, fill=1)
    inside = slice(scale * margin, -scale * margin)
    return np.asarray(canvas)[inside, inside]


def star(rng, center, radius, corners=24):
    angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
    return (
        center
        + (rng.uniform(0.2, 1, corners) * radius * np.array([np.cos(angle), np.sin(angle)])).T
    )


@pytest.mark.parametrize("seed", range(8))
def test_parts_cover_the_same_pixels_and_stay_inside(seed):
    rng = np.random.default_rng(seed)
    for _ in range(8):
        polygon = star(rng, rng.uniform((-5, -5), (55, 45)), rng.uniform(5, 50))
        parts = clip_polygons([polygon], SIZE)
        # Rounding to the fine grid may differ along outlines.
        assert np.mean(drawn(parts) != drawn([polygon])) < 0.02
        for part in parts:
            assert part.min() >= 0
            assert (part <= (50, 40)).all()


def test_polygon_inside_stays_itself():
    square = np.array([[1.0, 1], [9, 1], [9, 9], [1, 9]])
    assert clip_polygons([square], SIZE)[0] is square


@pytest.mark.parametrize("offset", [(-100, 0), (0, -100), (60, 0), (0, 60)])
def test_nothing_is_left_of_a_polygon_outside(offset):
    square = np.array([[1.0, 1], [9, 1], [9, 9], [1, 9]])
    assert clip_polygons([square + offset], SIZE) == []


def test_polygon_that_touches_the_border_from_outside_has_nothing_inside():
    assert clip_polygons([np.array([[-5.0, 5], [0, 5], [0, 10], [-5, 10]])], SIZE) == []


def test_two_ends_of_one_object_become_two_polygons():
    # A U that dips below the lower border: without a cut between the ends, its box would reach the border.
    u_shape = np.array(
        [[5.0, 10], [10, 10], [10, 45], [30, 45], [30, 20], [35, 20], [35, 50], [5, 50]]
    )
    parts = clip_polygons([u_shape], SIZE)
    boxes = sorted((*part.min(axis=0).tolist(), *part.max(axis=0).tolist()) for part in parts)
    assert boxes == [(5, 10, 10, 40), (30, 20, 35, 40)]


def test_object_around_the_image_covers_all_of_it():
    around = np.array([[-10.0, -10], [60, -10], [60, 50], [-10, 50]])
    (part,) = clip_polygons([around], SIZE)
    assert sorted(part.tolist()) == [[0, 0], [0, 40], [50, 0], [50, 40]]


def test_crop_cuts_polygons():
    square = np.array([[0.0, 0], [10, 0], [10, 10], [0, 10]])
    (part,) = T.CropTransform(4, 6, 20, 20).apply_polygons([square])
    assert sorted(part.tolist()) == [[0, 0], [0, 4], [6, 0], [6, 4]]
