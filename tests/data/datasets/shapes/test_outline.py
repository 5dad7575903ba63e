import numpy as np
import pytest
from PIL import Image, ImageDraw

from detkit.data.datasets.shapes.outline import (
    region_polygons,
    signed_area,
    simplify_loop,
    trace_loops,
)


def _grid(text: str) -> np.ndarray:
    return np.array([[cell == "#" for cell in line] for line in text.split()])


REGIONS = [
    pytest.param("#", 1, id="one cell"),
    pytest.param("## ##", 1, id="square"),
    pytest.param("#.. .#. ..#", 3, id="cells that touch at a corner are apart"),
    pytest.param("### #.# ###", 2, id="a hole"),
    pytest.param("##... #.#.. ####. ..###", 1, id="a hole that is open at a corner is none"),
    pytest.param("##### #...# #.#.# #...# #####", 3, id="an island in a hole"),
    pytest.param(
        "##.## #.#.# ##.## .....", 3, id="two parts, each touching a third cell at corners only"
    ),
]


@pytest.mark.parametrize(("text", "num_loops"), REGIONS)
def test_signed_areas_of_all_loops_sum_to_the_number_of_cells(text: str, num_loops: int) -> None:
    region = _grid(text)
    assert sum(signed_area(loop) for loop in trace_loops(region)) == region.sum()


@pytest.mark.parametrize(("text", "num_loops"), REGIONS)
def test_every_part_and_every_hole_is_one_loop(text: str, num_loops: int) -> None:
    assert len(trace_loops(_grid(text))) == num_loops


def test_outlines_run_clockwise_on_screen_and_holes_the_other_way() -> None:
    areas = sorted(signed_area(loop) for loop in trace_loops(_grid("### #.# ###")))
    assert areas == [-1, 9]


def test_empty_region_has_no_polygons() -> None:
    assert region_polygons(np.zeros((4, 5), bool), tolerance=1, min_area=1) == []


def test_polygons_of_a_random_region_fill_exactly_its_cells() -> None:
    # Without simplification, the middle of a cell lies within an odd number of borders exactly when the cell is inside:
    # that holds for parts, holes, islands in holes and corners that touch.
    region = np.random.default_rng(3).random((12, 15)) < 0.55
    polygons = region_polygons(region, tolerance=0, min_area=1)
    assert np.array_equal(_cells_within(polygons, region.shape), region)


def _cells_within(polygons: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    covered = np.zeros(shape, bool)
    for polygon in polygons:
        odd = np.zeros(shape, bool)
        for (x1, y1), (x2, y2) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
            crosses = (y1 > y) != (y2 > y)
            at = x1 + (y - y1) / np.where(y2 == y1, 1, y2 - y1) * (x2 - x1)
            odd ^= crosses & (x < at)
        covered |= odd
    return covered


def test_hole_is_cut_into_the_outline_around_it() -> None:
    ring = np.zeros((40, 40), bool)
    ring[4:36, 4:36] = True
    ring[12:28, 12:28] = False
    (polygon,) = region_polygons(ring, tolerance=1, min_area=1)
    assert abs(signed_area(polygon)) == ring.sum()


def test_hole_belongs_to_the_innermost_part_around_it() -> None:
    frames = np.zeros((30, 50), bool)
    for left, side in ((1, 28), (6, 18), (32, 12)):  # a frame within a frame, and one beside them
        top = left if left < 30 else 4
        frames[top : top + side, left : left + side] = True
        frames[top + 2 : top + side - 2, left + 2 : left + side - 2] = False
    polygons = region_polygons(frames, tolerance=0, min_area=1)
    assert [abs(signed_area(p)) for p in polygons] == [28**2 - 24**2, 18**2 - 14**2, 12**2 - 8**2]
    assert np.array_equal(_cells_within(polygons, frames.shape), frames)


def test_parts_come_largest_first_and_small_ones_are_left_out() -> None:
    region = _grid("#...... ..##... ....... ....###")
    polygons = region_polygons(region, tolerance=0, min_area=2)
    assert [signed_area(p) for p in polygons] == [3, 2]


def test_simplified_disc_has_few_corners_and_keeps_box_and_area() -> None:
    image = Image.new("L", (120, 120))
    ImageDraw.Draw(image).ellipse((10, 15, 110, 105), fill=1)
    disc = np.asarray(image).astype(bool)
    (loop,) = trace_loops(disc)
    simple = simplify_loop(loop, tolerance=1.4)
    assert len(simple) < 30 < len(loop)
    assert signed_area(simple) == pytest.approx(disc.sum(), rel=0.02)
    assert np.array_equal(simple.min(axis=0), loop.min(axis=0))
    assert np.array_equal(simple.max(axis=0), loop.max(axis=0))


def test_no_corner_of_the_outline_lies_farther_than_the_tolerance_from_the_simplified_one() -> None:
    image = Image.new("L", (80, 80))
    ImageDraw.Draw(image).polygon([(5, 9), (70, 20), (60, 74), (33, 40), (12, 66)], fill=1)
    (loop,) = trace_loops(np.asarray(image).astype(bool))
    simple = simplify_loop(loop, tolerance=1.5)
    ends = np.roll(simple, -1, axis=0)
    for point in loop:
        along = ends - simple
        share = ((point - simple) * along).sum(1) / (along**2).sum(1)
        nearest = simple + share.clip(0, 1)[:, None] * along
        assert np.linalg.norm(point - nearest, axis=1).min() <= 1.5
