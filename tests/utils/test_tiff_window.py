import numpy as np
import pytest
from PIL import Image

from detkit.utils.image import read_image
from detkit.utils.image_file import BadImageError
from detkit.utils.tiff_window import open_tiff_windows

tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed")


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 255, (100, 130, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"tile": (32, 48)}, id="tiles"),
        pytest.param(
            {"tile": (32, 48), "compression": "zlib", "predictor": True}, id="compressed tiles"
        ),
        pytest.param({"rowsperstrip": 7}, id="strips"),
        pytest.param({}, id="one strip"),
    ],
)
@pytest.mark.parametrize("format", ["BGR", "RGB"])
def test_windows_are_those_of_the_image(tmp_path, pixels, layout, format):
    path = str(tmp_path / "a.tif")
    tifffile.imwrite(path, pixels, photometric="rgb", **layout)
    windows = open_tiff_windows(path, format)
    whole = read_image(path, format)
    assert windows.shape == (100, 130, 3)
    for rows, columns in [
        ((0, 40), (0, 50)),
        ((0, 40), (80, 130)),
        ((33, 95), (47, 49)),
        ((60, 100), (0, 130)),
    ]:
        window = (slice(*rows), slice(*columns))
        assert np.array_equal(windows[window], whole[window])
    assert np.array_equal(windows[:, :], whole)


def test_only_rows_of_the_last_window_are_kept(tmp_path, pixels):
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", tile=(16, 16))
    windows = open_tiff_windows(str(tmp_path / "a.tif"), "RGB")
    windows[0:32, 0:130]
    assert len(windows._decoded) == 18
    windows[64:70, 0:20]
    assert len(windows._decoded) == 2


def test_other_files_are_decoded_as_a_whole(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[:, :, 0]).save(tmp_path / "grey.tif")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.tif", exif=exif)
    (tmp_path / "bad.tif").write_bytes(b"II*\0 no image")
    for name in ("a.png", "grey.tif", "turned.tif", "bad.tif", "missing.tif"):
        assert open_tiff_windows(str(tmp_path / name), "RGB") is None
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    assert open_tiff_windows(str(tmp_path / "a.tif"), "RAW") is None


def test_damaged_window_is_named(tmp_path, pixels):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(64, 64), compression="zlib")
    windows = open_tiff_windows(str(path), "RGB")
    path.write_bytes(path.read_bytes()[:500] + b"\0" * 5000)
    with pytest.raises(BadImageError, match=r"a\.tif is damaged"):
        windows[:, :]
