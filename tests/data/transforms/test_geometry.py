"""Flips and resizing: inverses, agreement with PIL, and boxes that follow what is drawn."""

import fvcore.transforms as fvcore
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detkit.data import transforms as T

SIZES = [(7, 11), (64, 48), (33, 90), (2, 2)]


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [T.HFlipTransform, T.VFlipTransform])
def test_flip_twice_is_identity(kind, size):
    image = noise(*size)
    tfm = kind(size[1] if kind is T.HFlipTransform else size[0])
    assert not np.array_equal(tfm.apply_image(image), image)
    assert np.array_equal(tfm.apply_image(tfm.apply_image(image)), image)
    boxes = np.array([[0.5, 0, 3, 1]])
    assert np.allclose(tfm.apply_box(tfm.apply_box(boxes)), boxes)
    assert tfm.inverse() is tfm


def test_mirrors_are_counted_also_those_of_fvcore():
    ours, theirs = T.HFlipTransform(9), fvcore.HFlipTransform(9)
    assert isinstance(ours, fvcore.HFlipTransform)
    for single in (ours, theirs):
        assert T.is_mirrored(single)
        assert not T.is_mirrored(T.TransformList([single, T.NoOpTransform(), theirs]))
        assert T.is_mirrored(T.TransformList([T.TransformList([single, ours]), single]))
    assert T.is_mirrored(fvcore.TransformList([theirs]))
    assert not T.is_mirrored(T.VFlipTransform(9))


@pytest.mark.parametrize("new_size", [(80, 107), (40, 31), (48, 64), (1, 1)])
@pytest.mark.parametrize("interp", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_resize_is_pils_to_one_level(new_size, interp):
    smooth = np.asarray(Image.fromarray(noise(6, 8)).resize((64, 48), Image.Resampling.BICUBIC))
    for image in (smooth, noise(48, 64)):
        ours = T.ResizeTransform(48, 64, *new_size, interp).apply_image(image)
        theirs = np.asarray(Image.fromarray(image).resize(new_size[::-1], interp))
        assert np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_resize_treats_each_channel_alike(channels):
    image = noise(20, 30, channels)
    tfm = T.ResizeTransform(20, 30, 33, 41)
    separate = np.stack(
        [tfm.apply_image(np.ascontiguousarray(image[:, :, c])) for c in range(channels)], axis=2
    )
    assert np.array_equal(tfm.apply_image(image), separate)


def test_flip_and_resize_commute():
    rng = np.random.default_rng(0)
    for _ in range(30):
        height, width, new_height, new_width = rng.integers(2, 60, 4)
        image = noise(height, width)
        resize = T.ResizeTransform(height, width, new_height, new_width)
        before = resize.apply_image(T.HFlipTransform(width).apply_image(image))
        after = T.HFlipTransform(new_width).apply_image(
            resize.apply_image(np.ascontiguousarray(image))
        )
        assert np.array_equal(before, after)
        # ... and so do the order of channels and the layout in memory.
        plain = resize.apply_image(np.ascontiguousarray(image[:, :, ::-1]))
        assert np.array_equal(resize.apply_image(image[:, :, ::-1]), plain)
        planar = np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0)
        assert np.array_equal(resize.apply_image(planar), resize.apply_image(image))


def test_resize_does_not_change_its_input():
    image = noise(9, 9)
    kept = image.copy()
    image.flags.writeable = False
    T.ResizeTransform(9, 9, 20, 20).apply_image(image)
    assert np.array_equal(image, kept)


def test_resize_of_floats_is_that_of_bytes_before_rounding():
    image = noise(20, 30)
    tfm = T.ResizeTransform(20, 30, 50, 13)
    as_float = tfm.apply_image(image.astype(np.float32))
    assert as_float.dtype == np.float32
    # Bytes are rounded after each of the two directions.
    assert np.abs(as_float - tfm.apply_image(image)).max() < 1.6


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint16])
def test_labels_are_resized_without_new_ones(dtype):
    limit = min(np.iinfo(dtype).max, 2**40)
    labels = np.random.default_rng(0).choice(np.array([0, 1, limit], dtype=dtype), (10, 10))
    tfm = T.ResizeTransform(10, 10, 23, 17)
    resized = tfm.apply_segmentation(labels)
    assert resized.dtype == dtype
    assert set(np.unique(resized)) <= {0, 1, limit}
    rows, columns = (
        ((np.arange(23) + 0.5) * 10 / 23).astype(int),
        ((np.arange(17) + 0.5) * 10 / 17).astype(int),
    )
    assert np.array_equal(resized, labels[rows][:, columns])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("new_size", [(120, 200), (30, 47)])
def test_boxes_follow_a_drawn_rectangle(new_size, flip):
    box = np.array([[12, 8, 60, 32]])
    image = np.zeros((60, 100, 3), dtype=np.uint8)
    image[8:32, 12:60] = 255
    tfm = T.TransformList([T.ResizeTransform(60, 100, *new_size)])
    if flip:
        tfm = tfm + T.HFlipTransform(new_size[1])
    rows, columns = np.nonzero(tfm.apply_image(image)[:, :, 0] >= 128)
    drawn = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert np.abs(tfm.apply_box(box)[0] - drawn).max() <= 1


def test_resize_scales_points_and_inverts():
    tfm = T.ResizeTransform(10, 20, 30, 50)
    assert np.allclose(tfm.apply_coords(np.array([[4.0, 5.0]])), [[10, 15]])
    assert tfm.inverse().apply_image(noise(30, 50)).shape == (10, 20, 3)


def test_resize_of_another_image_is_refused():
    with pytest.raises(
        ValueError, match=r"made for images of 10x20 .*got one of shape \(20, 10, 3\)"
    ):
        T.ResizeTransform(10, 20, 30, 40).apply_image(noise(20, 10))


def test_resize_to_nothing_is_refused():
    with pytest.raises(ValueError, match="cannot resize 10x20 to 0x5"):
        T.ResizeTransform(10, 20, 0, 5)


def test_unknown_interpolation_is_refused():
    with pytest.raises(ValueError, match="NEAREST, BILINEAR or BICUBIC"):
        T.ResizeTransform(10, 20, 30, 40, Image.Resampling.LANCZOS)


def test_resize_takes_one_side_or_two():
    for shape, expected in ((5, (5, 5)), ((4, 6), (4, 6))):
        assert (
            T.Resize(shape).get_transform(noise(10, 20)).apply_image(noise(10, 20)).shape[:2]
            == expected
        )


# (height, width), shortest edge, longest edge -> (height, width), by hand from Detectron2's rule
@pytest.mark.parametrize(
    ("size", "short", "longest", "expected"),
    [
        pytest.param((480, 640), 800, 1333, (800, 1067), id="wide"),
        pytest.param((640, 480), 800, 1333, (1067, 800), id="high"),
        pytest.param((400, 1000), 800, 1333, (533, 1333), id="longest-wins"),
        pytest.param((600, 600), 800, 1333, (800, 800), id="square"),
        pytest.param((2, 3000), 800, 1333, (1, 1333), id="thin-keeps-one-pixel"),
    ],
)
def test_shortest_edge_sizes(size, short, longest, expected):
    assert T.ResizeShortestEdge.get_output_shape(*size, short, longest) == expected


def test_shortest_edge_draws_one_of_its_choices():
    np.random.seed(0)
    aug = T.ResizeShortestEdge([10, 20, 30], 1000, "choice")
    drawn = [aug.get_transform(noise(40, 50)).new_h for _ in range(300)]
    assert set(drawn) == {10, 20, 30}
    assert min(drawn.count(length) for length in (10, 20, 30)) > 70


def test_shortest_edge_draws_from_the_whole_range():
    np.random.seed(0)
    aug = T.ResizeShortestEdge([10, 14], 1000, "range")
    assert {aug.get_transform(noise(40, 50)).new_h for _ in range(200)} == {10, 11, 12, 13, 14}


def test_shortest_edge_of_zero_leaves_the_image():
    assert isinstance(
        T.ResizeShortestEdge(0, 1333, "choice").get_transform(noise(5, 6)), T.NoOpTransform
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((10, 20, 30), 100, "range"), "draws between two lengths"),
        (((30, 20), 100, "range"), "draws between two lengths"),
        (((), 100, "choice"), "needs lengths"),
        ((-1, 100, "choice"), "needs lengths"),
        ((10, 100, "some"), "must be 'choice' or 'range', got 'some'"),
    ],
)
def test_shortest_edge_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        T.ResizeShortestEdge(*arguments)


def test_random_flip_flips_half_of_the_time():
    np.random.seed(0)
    aug = T.RandomFlip(horizontal=False, vertical=True)
    drawn = [aug.get_transform(noise(4, 5)) for _ in range(1000)]
    share = np.mean([isinstance(t, T.VFlipTransform) for t in drawn])
    assert abs(share - 0.5) < 0.05


@pytest.mark.parametrize("both", [False, True])
def test_random_flip_wants_one_direction(both):
    with pytest.raises(ValueError, match="either horizontal or vertical"):
        T.RandomFlip(horizontal=both, vertical=both)


@pytest.mark.parametrize("size", [(48, 64), (7, 11), (24, 32), (1, 1), (80, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, bool])
def test_label_map_is_resized_as_pillow_does(size, dtype):
    labels = (
        np.random.default_rng(0).integers(0, 2 if dtype is bool else 200, (24, 32)).astype(dtype)
    )
    resized = T.ResizeTransform(24, 32, *size).apply_segmentation(labels[:, ::-1])
    expected = Image.fromarray(labels[:, ::-1].astype(np.uint8)).resize(
        size[::-1], Image.Resampling.NEAREST
    )
    assert resized.dtype == dtype
    assert np.array_equal(resized, np.asarray(expected))


def test_half_a_pixel_is_rounded_up():
    assert T.ResizeShortestEdge.get_output_shape(2, 5, 1, 100) == (1, 3)
    assert T.ResizeShortestEdge.get_output_shape(5, 2, 1, 100) == (3, 1)


@pytest.mark.parametrize(("prob", "drawn", "is_flipped"), [(0.0, 0.0, False), (1.0, 0.999, True)])
def test_probabilities_of_0_and_1_are_certain(prob, drawn, is_flipped, monkeypatch):
    monkeypatch.setattr(np.random, "uniform", lambda: drawn)
    flip = T.RandomFlip(prob).get_transform(noise(7, 11))
    assert isinstance(flip, T.HFlipTransform) == is_flipped


# --- torchvision's resize ---


@pytest.mark.parametrize(
    ("size", "short", "long"),
    [
        pytest.param((48, 64), 80, 133, id="larger"),
        pytest.param((97, 131), 40, 70, id="smaller"),
        pytest.param((30, 200), 40, 100, id="longer-side-decides"),
        pytest.param((40, 64), 40, 100, id="fits-already"),
        pytest.param((49, 53), 49, 60, id="size-of-the-side"),
    ],
)
def test_pixels_are_torchvisions(size, short, long):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    theirs = GeneralizedRCNNTransform(short, long, [0.0] * 3, [1.0] * 3, size_divisible=1).eval()
    wanted = theirs([torch.from_numpy(image).permute(2, 0, 1) / 255])[0].tensors[0] * 255
    got = T.TorchvisionResizeShortestEdge([short] * 2, long).get_transform(image).apply_image(image)
    assert got.shape[:2] == tuple(wanted.shape[1:])
    np.testing.assert_allclose(got, wanted.permute(1, 2, 0).numpy(), atol=1e-3)


def test_torchvisions_label_maps_keep_their_labels():
    labels = np.random.default_rng(0).choice(np.array([3, 200], dtype=np.uint8), (20, 30))
    transform = T.TorchvisionResizeShortestEdge([50] * 2, 100).get_transform(labels)
    resized = transform.apply_segmentation(labels)
    assert resized.shape == (50, 75)
    assert resized.dtype == np.uint8
    assert set(np.unique(resized)) == {3, 200}


def test_torchvisions_grey_images_keep_two_dimensions():
    image = np.ones((20, 30), dtype=np.uint8)
    resized = T.TorchvisionResizeShortestEdge([50] * 2, 100).get_transform(image).apply_image(image)
    np.testing.assert_allclose(resized, np.ones((50, 75)), rtol=1e-6)


def test_torchvisions_length_zero_leaves_the_image_alone():
    image = np.ones((20, 30, 3), dtype=np.uint8)
    transform = T.TorchvisionResizeShortestEdge([0, 0], 100).get_transform(image)
    assert transform.apply_image(image) is image


def test_torchvisions_very_thin_image_keeps_its_short_side():
    assert T.TorchvisionResizeShortestEdge.get_output_shape(1, 1000, 4, 100) == (1, 100)
    assert T.TorchvisionResizeShortestEdge.get_output_shape(1000, 1, 4, 100) == (100, 1)


def test_torchvisions_image_of_another_size_is_an_error():
    with pytest.raises(ValueError, match="made for images of 20x30"):
        T.TorchvisionResizeTransform(20, 30, 40, 60).apply_image(
            np.ones((21, 30, 3), dtype=np.uint8)
        )


def test_scaled_image_fits_into_the_target_times_the_factor():
    np.random.seed(3)
    augmentation = T.ResizeScale(0.1, 2.0, 100, 200)
    factor = np.random.RandomState(3).uniform(0.1, 2.0)
    transform = augmentation.get_transform(np.zeros((50, 40, 3), dtype=np.uint8))
    assert transform.new_h == round(100 * factor)
    assert transform.new_w == round(80 * factor)


def test_very_thin_image_keeps_a_pixel_at_any_scale():
    transform = T.ResizeScale(0.1, 0.1, 10, 10).get_transform(np.zeros((1, 1000, 3), np.uint8))
    assert (transform.new_h, transform.new_w) == (1, 1)


@pytest.mark.parametrize("arguments", [(0, 1, 5, 5), (2, 1, 5, 5), (1, 1, 0, 5)])
def test_wrong_scale_is_an_error(arguments):
    with pytest.raises(ValueError, match="min_scale|target"):
        T.ResizeScale(*arguments)


def test_one_of_the_listed_sizes_is_drawn():
    image = np.zeros((10, 20, 3), np.uint8)
    resize = T.RandomResize([(5, 6), (7, 8)])
    sizes = {resize.get_transform(image).apply_image(image).shape[:2] for _ in range(30)}
    assert sizes == {(5, 6), (7, 8)}
    with pytest.raises(ValueError, match="at least one"):
        T.RandomResize([])


def test_filter_is_named_as_in_fvcore():
    named = T.ResizeTransform(4, 4, 8, 8, "bicubic")
    assert named.interp == T.ResizeTransform(4, 4, 8, 8, Image.Resampling.BICUBIC).interp
    with pytest.raises(ValueError, match="got 'cubic'"):
        T.ResizeTransform(4, 4, 8, 8, "cubic")
