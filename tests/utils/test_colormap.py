import numpy as np
import pytest

from detkit.utils.colormap import (
    class_colors,
    colormap,
    id2rgb,
    random_color,
    random_colors,
    rgb2id,
    skeleton_colors,
    to_color,
)


def test_colours_are_different_from_each_other() -> None:
    palette = colormap(rgb=True)
    distance = np.abs(palette[:, None] - palette[None]).max(axis=2) + 255 * np.eye(len(palette))
    assert distance.min() >= 17


def test_first_colours_are_farther_apart_than_all() -> None:
    def closest(colors: np.ndarray) -> float:
        return float(
            (
                np.linalg.norm(colors[:, None] - colors[None], axis=2) + 1e3 * np.eye(len(colors))
            ).min()
        )

    palette = colormap(rgb=True)
    assert closest(palette[:8]) > 2 * closest(palette)


def test_default_order_is_blue_first() -> None:
    assert np.array_equal(colormap(), colormap(rgb=True)[:, ::-1])


def test_maximum_scales_the_values() -> None:
    assert np.allclose(colormap(maximum=1) * 255, colormap())
    assert colormap().min() >= 0
    assert colormap().max() <= 255


def test_changing_a_palette_does_not_change_the_next_one() -> None:
    colormap(rgb=True)[:] = 0
    assert colormap(rgb=True).max() > 0


def test_random_colours_are_of_the_palette_and_differ() -> None:
    palette = {tuple(c) for c in colormap().tolist()}
    assert tuple(random_color().tolist()) in palette
    chosen = {tuple(c.tolist()) for c in random_colors(20)}
    assert len(chosen) == 20
    assert chosen <= palette


def test_more_colours_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="80 colours, 81 were asked for"):
        random_colors(81)


@pytest.mark.parametrize("count", [0, 1, 80, 1203])
def test_classes_have_different_colours_that_start_the_palette(count: int) -> None:
    colors = class_colors(count)
    assert len(colors) == len(set(colors)) == count
    assert all(0 <= value <= 255 for color in colors for value in color)
    assert colors[:80] == [
        tuple(color) for color in np.round(colormap(rgb=True))[:count].astype(int).tolist()
    ]


def test_more_classes_than_colours_start_again() -> None:
    colors = class_colors(6000)
    assert len(colors) == 6000
    num_different = len(set(colors))
    assert colors[num_different : num_different + 3] == colors[:3]


# --- segment ids ---


def test_red_counts_least():
    assert rgb2id(np.array([1, 2, 3], dtype=np.uint8)) == 1 + 2 * 256 + 3 * 65536
    assert id2rgb(np.array(256)).tolist() == [0, 1, 0]


@pytest.mark.parametrize("shape", [(0,), (3, 5), (2, 3, 4)])
def test_colours_and_ids_are_inverse(shape):
    ids = np.random.default_rng(0).integers(0, 2**24, shape)
    np.testing.assert_array_equal(rgb2id(id2rgb(ids)), ids)


@pytest.mark.parametrize("ids", [[-1], [2**24]])
def test_id_that_no_colour_holds_is_an_error(ids):
    with pytest.raises(ValueError, match=rf"\[0, 16777216\), got {ids[0]} to {ids[0]}"):
        id2rgb(np.array(ids))


def test_colours_of_skeletons_are_those_of_no_class():
    lines = skeleton_colors(40)
    assert len(set(lines)) == 40
    assert not set(lines) & set(class_colors(3000))
    assert all(160 <= level <= 255 for color in lines for level in color)


@pytest.mark.parametrize(
    ("color", "expected"),
    [
        pytest.param("palegreen", (152, 251, 152), id="css"),
        pytest.param("g", (0, 128, 0), id="letter"),
        pytest.param("tab:blue", (31, 119, 180), id="tab"),
        pytest.param("C1", (255, 127, 14), id="cycle"),
        pytest.param("#ff8800", (255, 136, 0), id="hex"),
        pytest.param((0.9, 0.35, 0.27), (230, 89, 69), id="shares"),
        pytest.param(np.array([0.0, 0.0, 1.0, 0.5]), (0, 0, 255), id="shares_with_opacity"),
        pytest.param([12, 200, 31], (12, 200, 31), id="levels"),
    ],
)
def test_colours_of_every_form(color, expected):
    assert to_color(color) == expected


def test_what_is_no_colour_is_refused():
    with pytest.raises(ValueError, match="unknown color"):
        to_color("no such colour")
    with pytest.raises(ValueError, match="three numbers or a name"):
        to_color([1, 2])
