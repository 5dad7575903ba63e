import numpy as np
import pytest
import torch

from detkit.data.transforms import ResizeShortestEdge
from detkit.data.transforms.geometry import TorchvisionResizeShortestEdge
from detkit.export.runtime.resize import output_size, resize_antialiased, resize_bilinear

_RULES = {"detectron2": ResizeShortestEdge, "torchvision": TorchvisionResizeShortestEdge}
_SIZES = [
    pytest.param((48, 64), 80, 133, id="larger"),
    pytest.param((97, 64), 40, 133, id="smaller"),
    pytest.param((30, 200), 60, 90, id="limited by the longer side"),
    pytest.param((1, 300), 100, 150, id="one row"),
    pytest.param((50, 50), 50, 60, id="unchanged"),
]


@pytest.mark.parametrize("rule", _RULES)
@pytest.mark.parametrize(("size", "min_size", "max_size"), _SIZES)
def test_pixels_are_those_of_the_predictor(size, min_size, max_size, rule):
    rng = np.random.default_rng(0)
    for channels in (3, 1, 4):
        image = rng.integers(0, 256, (*size, channels), dtype=np.uint8)
        resize = _RULES[rule](min_size, max_size, "choice")
        expected = resize.get_transform(image).apply_image(image)
        new_size = output_size(*size, rule, min_size, max_size)
        assert new_size == expected.shape[:2]
        if rule == "torchvision":
            assert np.abs(resize_bilinear(image, new_size) - expected).max() < 1e-2
        else:
            resized = resize_antialiased(image, new_size)
            assert resized.dtype == np.uint8
            assert np.array_equal(resized, expected)


def test_resize_is_exact_at_many_sizes():
    rng = np.random.default_rng(1)
    differing = 0
    for _ in range(60):
        height, width, new_height, new_width = (int(side) for side in rng.integers(2, 90, 4))
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        resize = ResizeShortestEdge(1)._resize(height, width, new_height, new_width)
        difference = resize.apply_image(image).astype(int) - resize_antialiased(
            image, (new_height, new_width)
        )
        assert np.abs(difference).max() <= 1
        differing += int(np.count_nonzero(difference))
    # One level where a weight lies between two steps of the fixed point: a few in a million.
    assert differing <= 10


def test_fractions_are_resized_as_by_torch():
    image = np.random.default_rng(0).random((37, 53, 2), dtype=np.float32)
    resize = ResizeShortestEdge(1)._resize(37, 53, 20, 70)
    assert np.abs(resize_antialiased(image, (20, 70)) - resize.apply_image(image)).max() < 1e-4
    scores = torch.from_numpy(image).permute(2, 0, 1)[None]
    larger = torch.nn.functional.interpolate(scores, size=(90, 40), mode="bilinear")
    expected = larger[0].permute(1, 2, 0).numpy()
    assert np.abs(resize_bilinear(image, (90, 40)) - expected).max() < 1e-5


def test_zero_leaves_the_size():
    for rule in _RULES:
        assert output_size(17, 29, rule, 0, 20) == (17, 29)
