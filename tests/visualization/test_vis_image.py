import numpy as np
import pytest
from PIL import Image

from detkit.visualization import VisImage, readable_scale, side_by_side


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_saved_picture_is_read_back(suffix: str, tmp_path) -> None:
    image = np.full((12, 16, 3), (200, 30, 90), np.uint8)
    path = tmp_path / "new folder" / "and one in it" / f"picture{suffix}"
    VisImage(image).save(path)
    assert np.abs(np.asarray(Image.open(path)).astype(int) - image).max() <= 3


def test_picture_has_the_size_of_its_array() -> None:
    picture = VisImage(np.zeros((12, 16, 3), np.uint8))
    assert (picture.height, picture.width) == (12, 16)


def test_unknown_format_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"suffix '.xyz'"):
        VisImage(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "picture.xyz")


@pytest.mark.parametrize("name", ["fig", "ax", "canvas"])
def test_picture_has_no_figure_of_matplotlib(name: str) -> None:
    with pytest.raises(AttributeError, match="drawn without matplotlib"):
        getattr(VisImage(_grey()), name)


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
