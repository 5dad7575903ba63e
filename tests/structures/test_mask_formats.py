import numpy as np
import pytest
from pycocotools import mask as coco_mask

from detkit.structures import (
    bitmask_to_polygons,
    bitmask_to_rle,
    polygon_area,
    polygons_to_bitmask,
    polygons_to_rle,
    rle_to_bitmask,
    union_of_rles,
    window_to_rle,
)
from detkit.structures.mask_formats import (
    as_polygon,
    box_of_bitmask,
    decode_runs,
    polygon_runs,
    rle_counts,
)

SQUARE = [2.0, 1.0, 6.0, 1.0, 6.0, 4.0, 2.0, 4.0]


def random_bitmap(seed, height=13, width=9, share=0.4):
    return np.random.default_rng(seed).random((height, width)) < share


def uncompressed(bitmap):
    """Count runs pixel by pixel, column by column."""
    counts, value = [0], False
    for pixel in bitmap.T.reshape(-1):
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(bitmap.shape), "counts": counts}


@pytest.mark.parametrize("turn", [1, -1], ids=["one way round", "the other"])
def test_area_of_a_polygon_by_hand(turn):
    points = np.array([[0, 0], [4, 0], [4, 3]])[::turn]
    assert polygon_area(points[:, 0], points[:, 1]) == 6


def test_square_covers_its_pixels():
    mask = polygons_to_bitmask([SQUARE], 6, 8)
    assert mask.dtype == bool
    assert mask.sum() == 12
    assert mask[1:4, 2:6].all()


def test_polygons_of_a_mask_are_joined():
    other = [0, 0, 1, 0, 1, 1, 0, 1]
    joined = polygons_to_bitmask([SQUARE, other], 6, 8)
    assert np.array_equal(
        joined, polygons_to_bitmask([SQUARE], 6, 8) | polygons_to_bitmask([other], 6, 8)
    )


def test_no_polygon_covers_nothing():
    assert polygons_to_bitmask([], 3, 4).shape == (3, 4)
    assert not polygons_to_bitmask([], 3, 4).any()
    assert not rle_to_bitmask(polygons_to_rle([], 3, 4)).any()


def test_polygon_to_rle_is_polygon_to_bitmap():
    rng = np.random.default_rng(0)
    polygons = [rng.uniform(0, 20, 10) for _ in range(3)]
    assert np.array_equal(
        rle_to_bitmask(polygons_to_rle(polygons, 20, 25)), polygons_to_bitmask(polygons, 20, 25)
    )


@pytest.mark.parametrize("share", [0, 0.02, 0.4, 1])
@pytest.mark.parametrize("size", [(1, 1), (13, 9), (70, 300)])
def test_bitmap_comes_back_from_every_form_of_rle(share, size):
    bitmap = random_bitmap(1, *size, share=share)
    compressed = bitmask_to_rle(bitmap)
    assert isinstance(compressed["counts"], str)
    assert np.array_equal(rle_to_bitmask(compressed), bitmap)
    assert np.array_equal(
        rle_to_bitmask({**compressed, "counts": compressed["counts"].encode()}), bitmap
    )
    assert np.array_equal(rle_to_bitmask(uncompressed(bitmap), *size), bitmap)
    assert np.array_equal(coco_mask.decode(compressed), bitmap)


@pytest.mark.parametrize("seed", range(5))
def test_counts_of_compressed_runs_are_those_counted_by_hand(seed):
    bitmap = random_bitmap(seed, 50, 60, share=0.05)
    assert rle_counts(bitmask_to_rle(bitmap)).tolist() == uncompressed(bitmap)["counts"]


def test_what_is_not_zero_belongs_to_the_mask():
    assert rle_to_bitmask(bitmask_to_rle(np.array([[0, 7], [-1, 0]]))).tolist() == [
        [False, True],
        [True, False],
    ]


@pytest.mark.parametrize(
    ("polygon", "message"),
    [
        pytest.param([1, 2, 3, 4], "at least 3 points: got 2", id="two points"),
        pytest.param([], "at least 3 points: got 0", id="nothing"),
        pytest.param([1, 2, 3, 4, 5, 6, 7], "a y for every x: got 7 numbers", id="odd"),
        pytest.param([1, 2, 3, 4, 5, float("nan")], "finite coordinates", id="nan"),
        pytest.param([[1, 2], [3, 4], [5, 6]], r"flat list .* got shape \(3, 2\)", id="nested"),
    ],
)
def test_bad_polygon_is_an_error(polygon, message):
    with pytest.raises(ValueError, match=message):
        as_polygon(polygon)
    with pytest.raises(ValueError, match=message):
        polygons_to_bitmask([SQUARE, polygon], 5, 5)


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        pytest.param(
            {"size": [4, 5], "counts": [3, 4]},
            "must add up to 20: got 2 runs that add up to 7",
            id="short",
        ),
        pytest.param(
            {"size": [4, 5], "counts": [3, 40]}, "must add up to 20: got 2 runs", id="long"
        ),
        pytest.param({"size": [4, 5], "counts": [30, -10]}, "some negative", id="negative"),
        pytest.param(
            {"size": [4, 5], "counts": "34"}, "must add up to 20", id="text of other runs"
        ),
        pytest.param(
            {"size": [4, 5], "counts": "a b"}, "no text of COCO's form", id="text of something else"
        ),
        pytest.param(
            {"size": [4, 5], "counts": "P" * 20 + "0"},
            "no text of COCO's form",
            id="endless number",
        ),
        pytest.param(
            {"size": [4, 5], "counts": "P"}, "no text of COCO's form", id="number without an end"
        ),
        pytest.param({"size": [4, 5]}, "list of lengths or a text: got NoneType", id="no counts"),
        pytest.param({"counts": [20]}, r"has a size \[height, width\]: got None", id="no size"),
    ],
)
def test_bad_run_lengths_are_an_error(rle, message):
    with pytest.raises(ValueError, match=message):
        rle_to_bitmask(rle)


def test_run_lengths_of_another_image_size_are_an_error():
    rle = bitmask_to_rle(np.zeros((4, 5)))
    with pytest.raises(ValueError, match=r"got 4 x 5 \(height x width\) for an image of 5 x 4"):
        rle_to_bitmask(rle, 5, 4)


def test_bitmap_of_other_dimensions_is_an_error():
    with pytest.raises(ValueError, match=r"a bitmap is \(H, W\): got shape \(1, 2, 3\)"):
        bitmask_to_rle(np.zeros((1, 2, 3)))


def blobs(seed, height=40, width=50, share=0.5):
    """Noise whose pixels come in blocks, so that there are holes, islands and corners that touch."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((height // 5, width // 5)) < share
    return np.kron(coarse, np.ones((5, 5), dtype=bool)) ^ (rng.random((height, width)) < 0.02)


def area_of(polygons):
    return sum(polygon_area(p[0::2], p[1::2]) for p in polygons)


def test_square_has_four_corners():
    mask = np.zeros((6, 8), dtype=bool)
    mask[1:4, 2:7] = True
    (polygon,) = bitmask_to_polygons(mask)
    assert {tuple(point) for point in polygon.reshape(-1, 2).tolist()} == {
        (2, 1),
        (7, 1),
        (7, 4),
        (2, 4),
    }
    assert len(polygon) == 8


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("seed", range(8))
def test_polygons_give_the_bitmap_back_and_do_not_overlap(seed, share):
    mask = blobs(seed, share=share)
    polygons = bitmask_to_polygons(mask)
    assert np.array_equal(polygons_to_bitmask(polygons, *mask.shape), mask)
    assert area_of(polygons) == mask.sum()


def test_mask_with_a_hole_is_cut_there():
    mask = np.ones((5, 7), dtype=bool)
    mask[2, 3:5] = False
    polygons = bitmask_to_polygons(mask)
    assert len(polygons) == 2
    assert np.array_equal(polygons_to_bitmask(polygons, 5, 7), mask)


def test_pixels_that_touch_at_a_corner_are_apart():
    assert len(bitmask_to_polygons(np.eye(3))) == 3


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (3, 4)], ids=str)
def test_nothing_has_no_polygons(shape):
    assert bitmask_to_polygons(np.zeros(shape)) == []


def test_turned_mask_has_turned_polygons():
    mask = blobs(3)
    turned = bitmask_to_polygons(mask.T)
    swapped = [p.reshape(-1, 2)[:, ::-1].reshape(-1) for p in turned]
    assert np.array_equal(polygons_to_bitmask(swapped, *mask.shape), mask)


def test_bitmap_of_other_dimensions_has_no_polygons():
    with pytest.raises(ValueError, match=r"a bitmap is \(H, W\): got shape \(2, 3, 4\)"):
        bitmask_to_polygons(np.zeros((2, 3, 4)))


@pytest.mark.parametrize(
    ("top", "left", "height", "width"),
    [
        pytest.param(0, 0, 9, 7, id="the whole image"),
        pytest.param(2, 3, 4, 2, id="inside"),
        pytest.param(0, 2, 9, 3, id="whole columns, whose runs join"),
        pytest.param(5, 4, 4, 3, id="lower right corner"),
    ],
)
def test_window_has_the_run_lengths_of_the_whole(
    top: int, left: int, height: int, width: int
) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        window = rng.random((height, width)) < rng.choice([0, 0.3, 0.7, 1])
        whole = np.zeros((9, 7), dtype=bool)
        whole[top : top + height, left : left + width] = window
        assert window_to_rle(window, top, left, (9, 7)) == bitmask_to_rle(whole)


def test_union_of_rles_is_that_of_their_masks() -> None:
    masks = np.random.default_rng(0).random((3, 9, 7)) < 0.3
    assert union_of_rles([bitmask_to_rle(m) for m in masks]) == bitmask_to_rle(masks.any(axis=0))


def test_bitmaps_of_polygons_anywhere_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = rng.integers(1, 60, 2).tolist()
        spread = rng.choice([0.3, 3, 20, 200])
        points = rng.uniform(-20, 80, 2) + rng.normal(0, spread, (int(rng.integers(1, 3)), 5, 2))
        polygons = list(points.round(int(rng.integers(0, 3))).reshape(len(points), -1))
        (expected,) = np.moveaxis(decode_runs([polygon_runs(polygons, height, width)]), 2, 0)
        assert np.array_equal(polygons_to_bitmask(polygons, height, width), expected)


@pytest.mark.parametrize(
    ("counts", "columns"),
    [
        pytest.param([6], [[0, 0], [0, 0], [0, 0]], id="nothing"),
        pytest.param([0, 6], [[1, 1], [1, 1], [1, 1]], id="all"),
        pytest.param([6, 0], [[0, 0], [0, 0], [0, 0]], id="ends-with-no-pixel"),
        pytest.param([3, 1, 2], [[0, 0], [0, 1], [0, 0]], id="one"),
        pytest.param([1, 4, 1], [[0, 1], [1, 1], [1, 0]], id="over-columns"),
        pytest.param([1, 0, 2, 1, 0, 1, 1], [[0, 0], [0, 1], [1, 0]], id="runs-of-nothing"),
        pytest.param([4, 2], [[0, 0], [0, 0], [1, 1]], id="to-the-end"),
    ],
)
def test_run_lengths_go_down_the_columns(counts, columns):
    bitmap = rle_to_bitmask({"size": [2, 3], "counts": counts})
    assert bitmap.T.astype(int).tolist() == columns
    assert bitmap.flags.c_contiguous


@pytest.mark.parametrize("box", [(2, 1, 5, 3), (0, 0, 6, 4), (5, 3, 6, 4)])
def test_box_of_a_bitmap_ends_behind_its_last_pixels(box):
    mask = np.zeros((4, 6), dtype=bool)
    x0, y0, x1, y1 = box
    mask[y0, x0] = mask[y1 - 1, x1 - 1] = True
    assert box_of_bitmask(mask) == box
