import logging
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageFont

from detkit.visualization import Canvas
from detkit.visualization import canvas as canvas_module
from detkit.visualization.canvas import mask_bounds, readable_on

WHITE, BLACK, RED = (255, 255, 255), (0, 0, 0), (255, 0, 0)


def _canvas(height: int = 40, width: int = 60) -> Canvas:
    return Canvas(np.zeros((height, width, 3), np.uint8))


def _coverage(canvas: Canvas) -> float:
    """Area painted white on black, in pixels."""
    return float(canvas.to_array()[..., 0].sum() / 255)


def test_drawing_does_not_change_the_given_picture() -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    Canvas(image).draw_box((2, 2, 18, 18), RED)
    assert image.max() == 0


def test_scale_resizes_the_picture() -> None:
    canvas = Canvas(np.zeros((30, 20, 3), np.uint8), scale=2.5)
    assert (canvas.height, canvas.width) == (75, 50)


def test_lines_and_letters_grow_with_the_picture() -> None:
    small, large = _canvas(200, 300), _canvas(2000, 3000)
    assert large.line_width > small.line_width
    assert large.font_size > small.font_size


def test_border_of_a_box_lies_within_it() -> None:
    canvas = _canvas()
    canvas.draw_box((10, 5, 30, 25), WHITE, line_width=2)
    painted = canvas.to_array()[..., 0] > 0
    assert painted.sum() == 20 * 20 - 16 * 16
    assert painted[5, 10]
    assert painted[24, 29]
    assert not painted[25].any()
    assert not painted[:, 30].any()


@pytest.mark.parametrize(
    "box",
    [
        pytest.param((-20, -20, -5, -5), id="outside"),
        pytest.param((-10, -10, 500, 500), id="larger than the picture"),
        pytest.param((10, 10, 10, 10), id="without area"),
        pytest.param((59.7, 39.7, 60, 40), id="in the last corner"),
    ],
)
def test_any_box_can_be_drawn(box: tuple[float, float, float, float]) -> None:
    canvas = _canvas()
    canvas.draw_box(box, WHITE)
    assert canvas.to_array().shape == (40, 60, 3)


def test_transparent_box_is_blended() -> None:
    canvas = _canvas()
    canvas.draw_box((0, 0, 10, 10), WHITE, alpha=0.5, line_width=1)
    assert canvas.to_array()[0, 0].tolist() == [128, 128, 128]


def test_polygon_covers_its_area_to_a_fraction_of_a_pixel() -> None:
    canvas = _canvas()
    triangle = [(5.25, 4.5), (50.5, 12), (20, 35.75)]
    canvas.draw_polygon(triangle, WHITE, alpha=1, line_width=1e-3)
    (x1, y1), (x2, y2), (x3, y3) = triangle
    area = abs((x2 - x1) * (y3 - y1) - (x3 - x1) * (y2 - y1)) / 2
    assert _coverage(canvas) == pytest.approx(area, rel=0.05)


def test_slanted_edges_are_smooth() -> None:
    canvas = _canvas()
    canvas.draw_polygon([(3, 3), (55, 20), (10, 37)], WHITE, alpha=1)
    assert len(np.unique(canvas.to_array()[..., 0])) > 8


def test_polygon_without_area_draws_nothing() -> None:
    canvas = _canvas()
    canvas.draw_polygon([(3, 3), (20, 20)], WHITE)
    assert _coverage(canvas) == 0


def test_circle_covers_its_area() -> None:
    canvas = _canvas()
    canvas.draw_circle((30, 20), WHITE, radius=12)
    assert _coverage(canvas) == pytest.approx(np.pi * 12**2, rel=0.03)


def test_circle_lies_where_it_was_asked_for() -> None:
    canvas = _canvas(40, 40)
    canvas.draw_circle((20, 20), WHITE, radius=12.3)
    image = canvas.to_array()
    assert np.array_equal(image, image[::-1])
    assert np.array_equal(image, image[:, ::-1])


def test_line_covers_length_times_width_and_its_round_ends() -> None:
    canvas = _canvas()
    canvas.draw_line([(10, 20), (50, 20)], WHITE, line_width=4)
    assert _coverage(canvas) == pytest.approx(40 * 4 + np.pi * 2**2, rel=0.05)


def test_mask_is_tinted_and_stretched_over_the_picture() -> None:
    canvas = Canvas(np.zeros((10, 10, 3), np.uint8), scale=2)
    mask = np.zeros((10, 10), bool)
    mask[:5] = True
    canvas.draw_mask(mask, WHITE, alpha=0.5)
    image = canvas.to_array()[..., 0]
    assert (image[:9] == 128).all()
    assert (image[11:] == 0).all()


def test_edge_of_a_mask_lies_inside_it() -> None:
    canvas = Canvas(np.zeros((40, 60, 3), np.uint8))
    mask = np.zeros((40, 60), bool)
    mask[10:30, 10:40] = True
    canvas.draw_mask(mask, (100, 0, 0), alpha=1.0, edge_color=(0, 0, 200))
    image = canvas.to_array()
    assert image[20, 10].tolist() == [0, 0, 200]
    assert image[20, 25].tolist() == [100, 0, 0]
    assert np.array_equal(image.any(axis=2), mask)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_edge_of_a_mask_is_that_of_a_square_filter(scale: float) -> None:
    rng = np.random.default_rng(0)
    blobs = Image.fromarray(rng.integers(0, 256, (6, 9), dtype=np.uint8)).resize((60, 40))
    mask = np.asarray(blobs) > 128
    canvas = Canvas(np.zeros((40, 60, 3), np.uint8), scale)
    canvas.draw_mask(mask, (0, 0, 0), alpha=1.0, edge_color=(255, 255, 255))
    levels = Image.fromarray(mask.astype(np.uint8) * 255)
    if scale != 1:
        levels = levels.resize((120, 80), Image.Resampling.BILINEAR)
    inside = levels.filter(ImageFilter.MinFilter(1 + 2 * (canvas.line_width // 2)))
    edge = np.asarray(levels).astype(int) - np.asarray(inside)
    assert np.abs(canvas.to_array()[..., 0] - edge).max() <= 1


def test_bounds_are_those_of_the_pixels_that_are_set() -> None:
    mask = np.zeros((9, 12), bool)
    assert mask_bounds(mask) is None
    mask[3, 4] = mask[7, 11] = True
    assert mask_bounds(mask) == (4, 3, 12, 8)


def test_empty_mask_draws_nothing() -> None:
    canvas = Canvas(np.zeros((40, 60, 3), np.uint8))
    canvas.draw_mask(np.zeros((40, 60), bool), (100, 0, 0), edge_color=(0, 0, 200))
    assert not canvas.to_array().any()


def test_tint_blends_in_a_picture_where_it_is_asked_for() -> None:
    canvas = Canvas(np.full((40, 60, 3), 100, np.uint8))
    where = np.zeros((20, 30), bool)
    where[:, :15] = True
    canvas.tint(np.full((20, 30, 3), 200, np.uint8), where, alpha=0.5)
    image = canvas.to_array()
    assert np.abs(image[:, :30].astype(int) - 150).max() <= 1
    assert (image[:, 30:] == 100).all()


def test_grey_out_keeps_the_colour_of_what_is_kept() -> None:
    canvas = Canvas(np.full((4, 6, 3), RED, np.uint8))
    keep = np.zeros((4, 6), bool)
    keep[:, :3] = True
    canvas.grey_out(keep)
    image = canvas.to_array()
    assert image[0, 0].tolist() == [255, 0, 0]
    assert len(set(image[0, 5].tolist())) == 1


def test_text_stays_inside_the_picture() -> None:
    canvas = _canvas(60, 120)
    canvas.draw_text("ring 98%", (1000, -50), background=RED, alpha=1)
    painted = (canvas.to_array() == RED).all(axis=2)
    width, height = canvas.text_size("ring 98%")
    assert painted[0, 120 - width]
    assert painted[height - 1, 119]
    assert not painted[height:].any()


def test_text_with_a_line_break_is_one_line() -> None:
    canvas = Canvas(np.zeros((60, 200, 3), np.uint8))
    assert canvas.text_size("a\nb\x1b") == canvas.text_size(r"a\nb\x1b")
    canvas.draw_text("a\nb", (0, 0))


@pytest.fixture
def fonts(monkeypatch: pytest.MonkeyPatch):
    """Sets the fonts that the system has."""
    monkeypatch.setattr("detkit.utils.logger._seen", Counter())
    caches = (canvas_module._written, canvas_module._wide_fonts)

    def use(*names: str) -> None:
        monkeypatch.setattr(canvas_module, "_WIDE_FONTS", names)
        for cache in caches:
            cache.cache_clear()

    yield use
    for cache in caches:
        cache.cache_clear()


def test_letters_that_no_font_has_are_written_as_numbers(fonts, caplog) -> None:
    fonts("no such font.ttf")
    canvas = Canvas(np.zeros((60, 200, 3), np.uint8))
    logging.getLogger("detkit").propagate = True
    assert canvas.text_size("猫 98%") == canvas.text_size(r"\u732b 98%")
    assert canvas.text_size("कु a") == canvas.text_size(r"\u0915\u0941 a")  # a letter with a mark
    canvas.draw_text("猫 98%", (0, 0))
    assert "no font here has all letters of '猫 98%'" in caplog.text


def test_font_is_the_one_that_has_the_letters(fonts) -> None:
    try:
        wide = ImageFont.truetype("DejaVuSans.ttf", 20)
    except OSError:
        pytest.skip("this system lacks the font DejaVuSans")
    fonts("DejaVuSans.ttf")
    text, font = canvas_module._written("größe Жук ∑", 20)
    assert (text, font.path) == ("größe Жук ∑", wide.path)
    text, _ = canvas_module._written("Жук 猫", 20)
    assert text == r"Жук \u732b"


def test_endless_text_is_cut() -> None:
    canvas = Canvas(np.zeros((60, 200, 3), np.uint8))
    assert canvas.text_size("a" * 3_000_000) == canvas.text_size("a" * 200)


def test_text_wider_than_the_picture_starts_at_its_left() -> None:
    canvas = _canvas(30, 30)
    canvas.draw_text("a very long name of a class", (5, 5), background=RED, alpha=1)
    assert canvas.to_array()[5, 0].tolist() == [255, 0, 0]


def test_text_of_any_alphabet_can_be_written() -> None:
    canvas = _canvas(30, 100)
    canvas.draw_text("Straße 猫", (0, 0))
    assert canvas.to_array().max() > 0


@pytest.mark.parametrize(
    ("background", "letters"),
    [pytest.param(BLACK, WHITE, id="on black"), pytest.param((255, 240, 0), BLACK, id="on yellow")],
)
def test_letters_stand_out_from_their_background(
    background: tuple[int, int, int], letters: tuple[int, int, int]
) -> None:
    assert readable_on(background) == letters


@pytest.mark.parametrize(
    ("image", "message"),
    [
        pytest.param(
            np.zeros((4, 4), np.uint8),
            r"need a picture \(H, W, 3\) of uint8, got \(4, 4\)",
            id="grey",
        ),
        pytest.param(np.zeros((4, 4, 3), np.float32), "of float32", id="floats"),
    ],
)
def test_picture_of_another_form_is_refused(image: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Canvas(image)


def test_scale_must_be_positive() -> None:
    with pytest.raises(ValueError, match="scale must be positive, got 0"):
        Canvas(np.zeros((4, 4, 3), np.uint8), scale=0)


@pytest.mark.parametrize(("size", "grown"), [(0, 4), (1, 3.5), (4, 2), (7, 2), (8, 0)])
def test_border_of_a_small_object_lies_around_it(size: int, grown: float) -> None:
    canvas = _canvas()
    canvas.draw_box((30, 20, 30 + size, 20 + size), (250, 1, 2), line_width=2)
    painted = (canvas.to_array() == [250, 1, 2]).all(axis=2)
    rows = np.flatnonzero(painted.any(axis=1))
    assert np.ptp(rows) + 1 == size + 2 * grown
    assert abs((rows[0] + rows[-1] + 1) / 2 - (20 + size / 2)) <= 0.5
    # What it is about stays to be seen.
    shown = slice(20 + size // 2 - 1, 20 + size // 2 + 1), slice(29 + size // 2, 31 + size // 2)
    assert not painted[shown].any()


def test_narrow_object_gets_room_in_one_direction_only() -> None:
    assert _canvas().frame((30, 5, 33, 35), line_width=2) == (28, 5, 36, 35)


def test_letters_are_white_up_to_a_luma_of_140() -> None:
    assert readable_on((140, 140, 140)) == (255, 255, 255)
    assert readable_on((141, 141, 141)) == (0, 0, 0)
