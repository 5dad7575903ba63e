import numpy as np
import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detkit.data import transforms as T


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


def test_label_maps_keep_their_labels():
    labels = np.random.default_rng(0).choice(np.array([3, 200], dtype=np.uint8), (20, 30))
    transform = T.TorchvisionResizeShortestEdge([50] * 2, 100).get_transform(labels)
    resized = transform.apply_segmentation(labels)
    assert resized.shape == (50, 75)
    assert resized.dtype == np.uint8
    assert set(np.unique(resized)) == {3, 200}


def test_grey_images_keep_two_dimensions():
    image = np.ones((20, 30), dtype=np.uint8)
    resized = T.TorchvisionResizeShortestEdge([50] * 2, 100).get_transform(image).apply_image(image)
    np.testing.assert_allclose(resized, np.ones((50, 75)), rtol=1e-6)


def test_length_zero_leaves_the_image_alone():
    image = np.ones((20, 30, 3), dtype=np.uint8)
    transform = T.TorchvisionResizeShortestEdge([0, 0], 100).get_transform(image)
    assert transform.apply_image(image) is image


def test_a_very_thin_image_keeps_its_short_side():
    assert T.TorchvisionResizeShortestEdge.get_output_shape(1, 1000, 4, 100) == (1, 100)
    assert T.TorchvisionResizeShortestEdge.get_output_shape(1000, 1, 4, 100) == (100, 1)


def test_image_of_another_size_is_an_error():
    with pytest.raises(ValueError, match="made for images of 20x30"):
        T.TorchvisionResizeTransform(20, 30, 40, 60).apply_image(
            np.ones((21, 30, 3), dtype=np.uint8)
        )
