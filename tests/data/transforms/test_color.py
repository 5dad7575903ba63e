"""Changes of colour: neutral at strength 1, as by hand elsewhere, and geometry untouched."""

import numpy as np
import pytest
from PIL import ImageOps

from detkit.data import transforms as T


def noise(height=12, width=16):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", [T.RandomBrightness, T.RandomContrast, T.RandomSaturation])
def test_strength_one_changes_nothing(kind):
    image = noise()
    assert np.array_equal(kind(1.0, 1.0).get_transform(image).apply_image(image), image)


def test_brightness_scales():
    image = noise()
    bright = T.RandomBrightness(1.5, 1.5).get_transform(image).apply_image(image)
    assert np.array_equal(bright, (image * np.float32(1.5)).clip(0, 255).astype(np.uint8))


def test_contrast_zero_is_the_mean():
    image = noise()
    flat = T.RandomContrast(0.0, 0.0).get_transform(image).apply_image(image)
    assert np.unique(flat).tolist() == [int(image.mean())]


def test_saturation_zero_is_grey():
    image = noise()
    grey = T.RandomSaturation(0.0, 0.0).get_transform(image).apply_image(image)
    assert np.array_equal(grey[:, :, 0], grey[:, :, 2])
    assert np.array_equal(
        grey[:, :, 0], image.dot([0.299, 0.587, 0.114]).astype(np.float32).astype(np.uint8)
    )


@pytest.mark.parametrize("weights", [(0.3, 0.7), (-0.5, 1.5), (0.25, 1.0)])
def test_table_of_levels_gives_what_the_formula_gives(weights):
    image = noise()
    by_table = T.BlendTransform(100.0, *weights).apply_image(image)
    by_formula = T.BlendTransform(np.full((1, 1, 3), 100.0), *weights).apply_image(image)
    assert np.array_equal(by_table, by_formula)


def test_blend_of_floats_is_not_cut():
    image = noise().astype(np.float32)
    assert np.allclose(T.BlendTransform(0.0, 0.0, 2.0).apply_image(image), image * 2)


def test_lighting_shifts_each_channel_by_one_value():
    np.random.seed(0)
    image = np.full((4, 4, 3), 100, dtype=np.uint8)
    lit = T.RandomLighting(200.0).get_transform(image).apply_image(image)
    assert len(np.unique(lit.reshape(-1, 3), axis=0)) == 1
    assert not np.array_equal(lit, image)


def test_geometry_stays():
    tfm = T.BlendTransform(0.0, 0.5, 0.5)
    assert tfm.apply_box([[1, 2, 3, 4]]).tolist() == [[1, 2, 3, 4]]
    labels = np.arange(4).reshape(2, 2)
    assert tfm.apply_segmentation(labels) is labels


def test_drawn_strengths_fill_the_range():
    np.random.seed(0)
    drawn = [T.RandomBrightness(0.5, 1.5).get_transform(noise()).dst_weight for _ in range(200)]
    assert 0.5 <= min(drawn) < 0.55
    assert 1.45 < max(drawn) <= 1.5


@pytest.mark.parametrize("aug", [T.RandomSaturation(0.5, 1.5), T.RandomLighting(1.0)])
def test_augmentation_of_colours_needs_colours(aug):
    with pytest.raises(ValueError, match=r"needs an RGB image \(H, W, 3\), got shape \(4, 4, 1\)"):
        aug.get_transform(np.zeros((4, 4, 1), dtype=np.uint8))


def test_bounds_the_wrong_way_round_are_refused():
    with pytest.raises(ValueError, match="must not exceed"):
        T.RandomBrightness(1.5, 0.5)


def test_functions_of_arrays_and_of_pil_images_change_pixels_only():
    image = np.random.default_rng(0).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    np.testing.assert_array_equal(
        T.ColorTransform(lambda x: 255 - x).apply_image(image), 255 - image
    )
    solarized = T.PILColorTransform(lambda x: ImageOps.solarize(x, 99))
    expected = np.where(image < 99, image, 255 - image)
    np.testing.assert_array_equal(solarized.apply_image(image), expected)
    np.testing.assert_array_equal(solarized.apply_box([[1, 2, 3, 4]]), [[1, 2, 3, 4]])
    np.testing.assert_array_equal(solarized.apply_segmentation(image[:, :, 0]), image[:, :, 0])
    with pytest.raises(ValueError, match="must be a function"):
        T.ColorTransform(3)


@pytest.mark.parametrize(("order", "gray"), [("BGR", 29), ("RGB", 76)])
def test_gray_weighs_the_channels_by_their_order(order, gray):
    image = np.zeros((2, 2, 3), np.uint8)
    image[..., 0] = 255
    changed = T.RandomGrayscale().get_transform(image, order).apply_image(image)
    assert np.abs(changed.astype(int) - gray).max() <= 1
