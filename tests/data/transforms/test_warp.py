import numpy as np
import pytest
from PIL import Image

from detkit.data import transforms as T


def picture(height=5, width=8):
    return np.random.default_rng(0).random((height, width))


def corners(height, width):
    x, y = np.meshgrid(np.arange(width + 1.0), np.arange(height + 1.0))
    return np.stack([x, y], axis=-1).reshape(-1, 2)


def test_quarter_turn_is_exact_and_has_the_sides_exchanged():
    image, points = picture(), corners(5, 8)
    turn = T.RotationTransform(5, 8, 90, expand=True)
    np.testing.assert_allclose(turn.apply_image(image), image.T[::-1], atol=1e-12)
    expected = np.stack([points[:, 1], 8 - points[:, 0]], axis=1)
    np.testing.assert_allclose(turn.apply_coords(points), expected, atol=1e-12)


def test_half_turn_mirrors_both_axes():
    image, points = picture(6, 6), corners(6, 6)
    turn = T.RotationTransform(6, 6, 180, expand=False)
    np.testing.assert_allclose(turn.apply_image(image), image[::-1, ::-1], atol=1e-12)
    np.testing.assert_allclose(turn.apply_coords(points), 6 - points, atol=1e-12)


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("angle", [30, -65, 200])
def test_points_and_pixels_turn_together(expand, angle):
    image = np.zeros((60, 90), np.float32)
    image[20:23, 50:53] = 1
    turn = T.RotationTransform(60, 90, angle, expand, center=None if expand else (40, 30))
    rotated = turn.apply_image(image)
    rows, columns = np.mgrid[: rotated.shape[0], : rotated.shape[1]]
    found = [(c * rotated).sum() / rotated.sum() + 0.5 for c in (columns, rows)]
    np.testing.assert_allclose(turn.apply_coords(np.array([[51.5, 21.5]]))[0], found, atol=0.05)


@pytest.mark.parametrize("angle", [90, 65, 10])
def test_rotation_with_expand_is_undone(angle):
    image, points = picture(), corners(5, 8)
    turn = T.RotationTransform(5, 8, angle)
    back = turn.inverse()
    np.testing.assert_allclose(back.apply_coords(turn.apply_coords(points)), points, atol=1e-9)
    if angle == 90:
        np.testing.assert_allclose(back.apply_image(turn.apply_image(image)), image, atol=1e-12)
    with pytest.raises(NotImplementedError, match="loses parts"):
        T.RotationTransform(5, 8, angle, expand=False).inverse()


def test_center_has_no_effect_where_the_output_expands():
    image = picture()
    first = T.RotationTransform(5, 8, 33).apply_image(image)
    second = T.RotationTransform(5, 8, 33, center=(2, 5)).apply_image(image)
    np.testing.assert_array_equal(first, second)


def test_labels_take_no_values_between():
    labels = np.array([[0, 200] * 10] * 20)
    turned = T.RotationTransform(20, 20, 25).apply_segmentation(labels)
    assert set(np.unique(turned)) == {0, 200}


def test_random_rotation_draws_angle_and_center():
    image = np.zeros((50, 100, 3), np.uint8)
    np.random.seed(1)
    drawn = [
        T.RandomRotation([10, 20], expand=False, center=[[0.4, 0.4], [0.6, 0.6]]).get_transform(
            image
        )
        for _ in range(20)
    ]
    assert all(10 <= t.angle <= 20 for t in drawn)
    assert all(40 <= t.center[0] <= 60 and 20 <= t.center[1] <= 30 for t in drawn)
    assert len({t.angle for t in drawn}) == 20
    chosen = {
        getattr(T.RandomRotation([0, 90], sample_style="choice").get_transform(image), "angle", 0)
        for _ in range(30)
    }
    assert chosen == {0, 90}
    with pytest.raises(ValueError, match="between two angles"):
        T.RandomRotation([1, 2, 3])


@pytest.mark.parametrize("rectangle", [(2, 1, 14, 9), (-4.3, -3.2, 19.9, 17.1)])
def test_window_is_that_of_pil(rectangle):
    image = np.random.default_rng(1).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    extent = T.ExtentTransform(rectangle, (8, 12), interp=int(Image.Resampling.NEAREST), fill=7)
    expected = Image.fromarray(image).transform(
        (12, 8), Image.Transform.EXTENT, rectangle, Image.Resampling.NEAREST, fillcolor=(7, 7, 7)
    )
    found = extent.apply_image(image)
    assert (found == np.asarray(expected)).mean() > 0.98  # borders between pixels may round
    np.testing.assert_allclose(
        extent.apply_coords(np.array([rectangle[:2], rectangle[2:]])), [[0, 0], [12, 8]]
    )


def test_random_extent_draws_size_and_place():
    image = np.zeros((40, 60, 3), np.uint8)
    np.random.seed(0)
    for _ in range(20):
        tfm = T.RandomExtent((0.5, 1.5), (0.2, 0.2)).get_transform(image)
        x0, y0, x1, y1 = tfm.src_rect
        assert 0.5 * 60 <= x1 - x0 <= 1.5 * 60
        assert abs((x0 + x1) / 2 - 30) <= 0.1 * 60 + 1e-9
        assert abs((y0 + y1) / 2 - 20) <= 0.1 * 40 + 1e-9
        assert tfm.apply_image(image).shape[:2] == tfm.output_size


def test_grid_takes_pixels_from_where_it_says():
    image = picture(4, 4)
    x, y = np.meshgrid(np.linspace(-0.75, 0.75, 4), np.linspace(-0.75, 0.75, 4))
    tfm = T.GridSampleTransform(np.stack([-x, y], axis=-1)[None], "bilinear")
    np.testing.assert_allclose(tfm.apply_image(image), image[:, ::-1], atol=1e-9)
    with pytest.raises(NotImplementedError, match="sampling grid"):
        tfm.apply_coords(np.zeros((1, 2)))


def test_inverse_of_a_rotation_puts_points_back_at_odd_sides():
    rotation = T.RotationTransform(7, 10, 30)
    points = np.array([[0.0, 0.0], [10.0, 7.0], [3.5, 2.0]])
    back = rotation.inverse().apply_coords(rotation.apply_coords(points))
    np.testing.assert_allclose(back, points, atol=1e-9)
