import numpy as np
import pytest
from PIL import Image

from detkit.visualization import VisImage


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
