import numpy as np
import pytest

from detkit.visualization import VisImage, readable_scale, side_by_side


def _grey(height: int = 120, width: int = 160) -> np.ndarray:
    return np.full((height, width, 3), 90, np.uint8)


@pytest.mark.parametrize(
    ("size", "scale"),
    [pytest.param((120, 160), 4, id="small"), pytest.param((1080, 1920), 1, id="large")],
)
def test_readable_scale_enlarges_small_pictures_only(size: tuple[int, int], scale: float) -> None:
    assert readable_scale(size) == scale


def test_side_by_side_holds_both_pictures_and_their_titles() -> None:
    truth, prediction = VisImage(_grey()), VisImage(np.full((120, 160, 3), 200, np.uint8))
    image = side_by_side(truth, prediction).get_image()
    assert np.array_equal(image[-120:, :160], truth.get_image())
    assert np.array_equal(image[-120:, -160:], prediction.get_image())
    title = image[:-120]
    assert (title[:, :160] < 128).any()
    assert (title[:, -160:] < 128).any()


def test_side_by_side_needs_one_height() -> None:
    with pytest.raises(ValueError, match="one height, got 120 and 60"):
        side_by_side(VisImage(_grey()), VisImage(_grey(60)))
