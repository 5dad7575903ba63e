"""Reading image files: orientation, channel order, unusual files, and messages that name the file."""

import io
import os
import re
import struct
import zlib
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from detkit.utils.image import (
    convert_image_to_rgb,
    read_image,
    read_image_size,
    read_label_map,
    read_reduced_image,
)
from detkit.utils.image_file import MAX_SCANS, BadImageError, jpeg_size

EXIF_ORIENTATION = 0x0112


def picture(height=24, width=32, seed=0):
    """Smooth colours, so that JPEG keeps them nearly."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def write(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return str(path)


def write_oriented(path, orientation, pixels, **options):
    return write(path, pixels, exif=exif_block(orientation), **options)


# How a camera stores an upright picture under each orientation: what the EXIF standard says about row 0 and column 0.
STORED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: np.rot90(p, -1),
}


def xmp_block(orientation):
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF'
        ' xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description'
        ' xmlns:tiff="http://ns.adobe.com/tiff/1.0/"'
        f' tiff:Orientation="{orientation}"/></rdf:RDF></x:xmpmeta>'
    )


def exif_block(orientation):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return exif


def png_text(xmp):
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp)
    return info


# Format -> options for nearly lossless pixels, and the option that stores XMP.
FORMATS = {
    "JPEG": ({"quality": 100, "subsampling": 0}, lambda xmp: {"xmp": xmp.encode()}),
    "PNG": ({}, lambda xmp: {"pnginfo": png_text(xmp)}),
    "WEBP": ({"lossless": True}, lambda xmp: {"xmp": xmp.encode()}),
    "TIFF": ({}, lambda xmp: {"tiffinfo": {700: xmp.encode()}}),
    "AVIF": ({"quality": 100, "subsampling": "4:4:4"}, lambda xmp: {"xmp": xmp.encode()}),
}


@pytest.mark.parametrize("source", ["exif", "xmp"])
@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_comes_out_upright(tmp_path, orientation, file_format, source):
    if file_format in ("WEBP", "AVIF") and not features.check(file_format.lower()):
        pytest.skip(f"this Pillow writes no {file_format}")
    upright = picture()
    stored = np.ascontiguousarray(STORED[orientation](upright))
    options, xmp_option = FORMATS[file_format]
    if source == "exif":
        mark = {"exif": exif_block(orientation)}
    else:
        mark = xmp_option(xmp_block(orientation))
    path = write(tmp_path / "a.img", stored, format=file_format, **options, **mark)
    found = read_image(path, "RGB")
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).max() <= 8
    assert read_image_size(path) == upright.shape[:2]


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiff_and_png_of_one_orientation_are_equal(tmp_path, orientation, compression):
    stored = picture()
    png = write_oriented(tmp_path / "a.png", orientation, stored)
    tiff = write_oriented(tmp_path / "a.tif", orientation, stored, compression=compression)
    for mode in ("BGR", "L"):
        assert np.array_equal(read_image(tiff, mode), read_image(png, mode))
    assert read_image_size(tiff) == read_image_size(png)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_label_map_comes_out_upright(tmp_path, orientation, suffix):
    upright = np.arange(12, dtype=np.uint8).reshape(3, 4)
    stored = np.ascontiguousarray(STORED[orientation](upright))
    path = write_oriented(tmp_path / f"a.{suffix}", orientation, stored)
    assert np.array_equal(read_label_map(path), upright)


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize(
    ("needed", "shape"),
    [
        ((120, 88), (120, 88)),
        ((61, 20), (120, 88)),
        ((20, 45), (120, 88)),
        ((60, 44), (60, 44)),
        ((16, 11), (30, 22)),
        ((15, 11), (15, 11)),
        ((1, 1), (15, 11)),
    ],
)
def test_jpeg_is_reduced_as_far_as_the_size_needed_allows(tmp_path, orientation, needed, shape):
    upright = picture(120, 88)
    stored = np.ascontiguousarray(STORED[orientation](upright))
    path = write_oriented(tmp_path / "a.jpg", orientation, stored, quality=95)

    def size_needed(height, width):
        assert (height, width) == (120, 88)
        return needed

    pixels, size = read_reduced_image(path, "BGR", size_needed)
    assert size == (120, 88)
    assert pixels.shape == (*shape, 3)
    expected = Image.fromarray(upright).resize(shape[::-1], Image.Resampling.BOX)
    differences = np.abs(pixels[:, :, ::-1].astype(int) - np.asarray(expected))
    assert differences.mean() < 2
    with pytest.raises(BadImageError, match=f"more than the {120 * 88 - 1} pixels"):
        read_reduced_image(path, "BGR", size_needed, max_pixels=120 * 88 - 1)


@pytest.mark.parametrize("shape", [(121, 88), (120, 83)])
def test_jpeg_whose_sides_are_no_multiples_is_read_whole(tmp_path, shape):
    path = write(tmp_path / "a.jpg", picture(*shape))
    pixels, size = read_reduced_image(path, "RGB", lambda height, width: (1, 1))
    assert size == shape
    assert np.array_equal(pixels, read_image(path, "RGB"))


def test_other_images_are_read_whole(tmp_path):
    path = write(tmp_path / "a.png", picture(121, 83))
    pixels, size = read_reduced_image(path, "RGB", lambda height, width: (1, 1))
    assert size == (121, 83)
    assert np.array_equal(pixels, picture(121, 83))


def test_exif_behind_the_pixels_of_a_png_counts_without_decoding_them(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_oriented(path, 6, picture())
    data = path.read_bytes()
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    # The chunk that ends the file takes 12 bytes.
    path.write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    assert read_image(str(path)).shape == (32, 24, 3)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    assert read_image_size(str(path)) == (32, 24)


@pytest.mark.parametrize("value", [0, 9, 700])
def test_orientation_outside_of_1_to_8_is_ignored(tmp_path, value):
    assert read_image(write_oriented(tmp_path / "a.png", value, picture()), "RGB").shape == (
        24,
        32,
        3,
    )


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_block_is_ignored(tmp_path):
    path = write(tmp_path / "a.jpg", picture(), exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert read_image(path).shape == (24, 32, 3)


@pytest.mark.parametrize(
    "options", [{"quality": 75}, {"quality": 95, "progressive": True}, {"subsampling": 0}]
)
@pytest.mark.parametrize("size", [(24, 32), (37, 41), (1, 1)])
def test_fast_jpeg_path_gives_the_pixels_of_pil(tmp_path, size, options):
    path = write(tmp_path / "a.jpg", picture(*size), **options)
    assert np.array_equal(read_image(path, "RGB"), np.asarray(Image.open(path).convert("RGB")))


def test_pil_reads_jpeg_where_torchvision_cannot(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jpg", picture())
    expected = read_image(path)

    def refuse(*_):
        raise RuntimeError("not compiled with libjpeg support")

    for absent in (refuse, None):
        monkeypatch.setattr("detkit.utils.image._operator", lambda _, found=absent: found)
        assert np.array_equal(read_image(path), expected)


def test_bgr_is_rgb_reversed(tmp_path):
    for name in ("a.jpg", "a.png"):
        path = write(tmp_path / name, picture())
        assert np.array_equal(read_image(path, "BGR"), read_image(path, "RGB")[:, :, ::-1])


@pytest.mark.parametrize("format", ["BGR", "RGB", "L", "HSV", "YCbCr"])
def test_conversion_to_rgb_undoes_the_format(tmp_path, format):
    path = write(tmp_path / "a.png", picture())
    rgb = convert_image_to_rgb(read_image(path, format), format)
    expected = np.asarray(
        Image.open(path).convert(format if format != "BGR" else "RGB").convert("RGB")
    )
    assert np.array_equal(rgb, expected)


def test_l_has_one_channel(tmp_path):
    found = read_image(write(tmp_path / "a.jpg", picture()), "L")
    assert found.shape == (24, 32, 1)
    assert found.dtype == np.uint8


def test_grey_file_becomes_three_equal_channels(tmp_path):
    for name in ("a.jpg", "a.png"):
        found = read_image(write(tmp_path / name, picture()[:, :, 0]))
        assert np.array_equal(found[:, :, 0], found[:, :, 2])


def test_16_bit_grey_keeps_its_upper_byte(tmp_path):
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(
        read_image(str(tmp_path / "a.png"), "RGB")[:, :, 1], (values >> 8).astype(np.uint8)
    )


def test_palette_is_looked_up(tmp_path):
    image = Image.new("P", (4, 3), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "a.png", transparency=0)
    assert np.array_equal(
        read_image(str(tmp_path / "a.png"), "RGB"), np.full((3, 4, 3), (10, 20, 30))
    )


def test_transparency_is_dropped(tmp_path):
    rgba = np.dstack([picture(), np.zeros((24, 32), dtype=np.uint8)])
    assert np.array_equal(read_image(write(tmp_path / "a.png", rgba), "RGB"), picture())


def test_cmyk_is_converted(tmp_path):
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    found = read_image(str(tmp_path / "a.jpg"), "RGB")
    assert np.abs(found.astype(int) - picture()).mean() < 3


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.fromarray(picture(seed=s)).quantize(16) for s in (0, 1)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.array_equal(
        read_image(str(tmp_path / "a.gif"), "RGB"), np.asarray(frames[0].convert("RGB"))
    )


# --- what cannot be read ---


def test_missing_file_is_named(tmp_path):
    path = str(tmp_path / "nowhere.jpg")
    for read in (read_image, read_image_size):
        with pytest.raises(FileNotFoundError, match=f"image file {re.escape(path)} does not exist"):
            read(path)


def test_empty_file_is_named(tmp_path):
    path = tmp_path / "empty.jpg"
    path.write_bytes(b"")
    for read in (read_image, read_image_size):
        with pytest.raises(BadImageError, match=r"empty\.jpg is empty \(0 bytes\)"):
            read(str(path))


def test_file_that_is_no_image_is_named(tmp_path):
    path = tmp_path / "page.jpg"
    path.write_bytes(b"<html>not found</html>")
    for read in (read_image, read_image_size):
        with pytest.raises(
            BadImageError,
            match=r"page\.jpg is not an image that can be read: its 22 bytes start b'<html>",
        ):
            read(str(path))


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "gif"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_file_is_named(tmp_path, suffix, share):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, {"jpg": "JPEG"}.get(suffix, suffix.upper()))
    data = buffer.getvalue()
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(BadImageError, match=rf"cut\.{suffix}"):
        read_image(str(path))


def test_header_alone_is_no_image(tmp_path):
    path = tmp_path / "head.jpg"
    path.write_bytes(b"\xff\xd8\xff")
    with pytest.raises(BadImageError, match=r"head\.jpg"):
        read_image(str(path))


def test_floating_point_image_is_refused_with_advice(tmp_path):
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(BadImageError, match=r"a\.tiff.*convert it to 8 or 16 bits"):
        read_image(str(tmp_path / "a.tiff"))


def test_unknown_format_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT.*BGR, RGB, L.*got 'RGBX'.*Did you mean"):
        read_image(str(tmp_path / "a.png"), "RGBX")


# --- images that claim more pixels than they should ---


def png_of_size(height, width):
    """A header and a little data, of a picture that would take gigabytes."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data = b"IDAT" + zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + struct.pack(">I", len(data) - 4)
        + data
        + struct.pack(">I", zlib.crc32(data))
    )


def jpeg_of_size(height, width):
    buffer = io.BytesIO()
    Image.fromarray(picture()).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("decoder", ["torchvision", "pil"])
@pytest.mark.parametrize("make", [png_of_size, jpeg_of_size])
def test_image_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch, make, decoder):
    def decode(*_):
        raise AssertionError("decoded")

    if decoder == "pil":
        monkeypatch.setattr("detkit.utils.image._operator", lambda _: None)
    else:
        monkeypatch.setattr("detkit.utils.image._operator", lambda _: decode)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    path = tmp_path / "bomb.img"
    path.write_bytes(make(60000, 50000))
    for read in (read_image, read_label_map):
        with pytest.raises(
            BadImageError,
            match=r"bomb\.img claims to be 50000x60000 .* 178956970 pixels .*INPUT\.MAX_IMAGE_PIXELS",
        ):
            read(str(path))
    assert read_image_size(str(path)) == (60000, 50000)  # which decodes nothing


@pytest.mark.parametrize("decoder", ["torchvision", "pil"])
def test_scans_of_a_jpeg_count_like_pixels(tmp_path, monkeypatch, decoder):
    if decoder == "pil":
        monkeypatch.setattr("detkit.utils.image._operator", lambda _: None)
    path = tmp_path / "a.jpg"
    write(path, picture(), progressive=True)
    data = path.read_bytes()
    scans = data[data.index(b"\xff\xda") : -2]
    num_scans = scans.count(b"\xff\xda")
    expected = read_image(str(path))
    repeats = MAX_SCANS // num_scans
    path.write_bytes(data[:-2] + scans * (repeats - 1) + data[-2:])
    assert read_image(str(path), max_pixels=24 * 32).shape == expected.shape
    path.write_bytes(data[:-2] + scans * repeats + data[-2:])
    count = num_scans * (repeats + 1)
    with pytest.raises(BadImageError, match=rf"a\.jpg has {count} scans of 32x24 .*baseline JPEG"):
        read_image(str(path), max_pixels=24 * 32)
    assert read_image(str(path)).shape == expected.shape  # harmless at this size


def test_reading_copies_an_image_no_more_than_needed(tmp_path):
    path = write(tmp_path / "a.png", np.zeros((1000, 1000, 3), np.uint8))
    with patch.object(Image.Image, "convert", side_effect=AssertionError("copied")):
        assert read_image(path).shape == (1000, 1000, 3)


@pytest.mark.parametrize("read", [read_image, read_image_size, read_label_map])
def test_pipes_and_devices_are_no_images(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.jpg", "."):
        with pytest.raises(BadImageError, match="is not a regular file"):
            read(str(tmp_path / name))


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "gif", "webp", "tiff"])
def test_limit_is_that_of_the_caller(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", picture(24, 32))
    assert read_image(path, max_pixels=24 * 32).shape == (24, 32, 3)
    with pytest.raises(BadImageError, match=r"more than the 767 pixels"):
        read_image(path, max_pixels=24 * 32 - 1)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_limit_of_pillow_neither_applies_nor_changes(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    path = write(tmp_path / f"a.{suffix}", picture())
    assert read_image(path).shape == (24, 32, 3)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_jpeg_whose_segments_lie_about_their_length_goes_to_pil():
    data = jpeg_of_size(24, 32)
    assert jpeg_size(data) == (32, 24)
    for broken in (
        data[:2] + b"junk" + data[2:],
        data[:2] + b"\xff\xe0\xff\xff" + data[2:],
        data[:15],
        data[:3],
    ):
        assert jpeg_size(broken) is None


def test_formats_that_start_programs_are_not_opened(tmp_path, monkeypatch):
    # Pillow hands an EPS file to Ghostscript.
    monkeypatch.setattr("subprocess.Popen", None)
    path = tmp_path / "a.jpg"
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(BadImageError, match=r"a\.jpg is not an image that can be read"):
        read_image(str(path))


# --- label maps ---


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_label_map_is_read_as_stored(tmp_path, mode):
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    image = Image.fromarray(labels)
    if mode == "P":
        image.putpalette(
            [255 - i for i in range(256) for _ in range(3)]
        )  # whose colours are not the labels
    elif mode != "L":
        image = Image.fromarray(labels.astype(np.uint16))
    image.save(tmp_path / "a.png")
    assert np.array_equal(read_label_map(str(tmp_path / "a.png")), labels)


def test_label_map_in_color_is_refused(tmp_path):
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
    with pytest.raises(BadImageError, match=r"a.png must hold one integer per pixel; .* mode RGB"):
        read_label_map(str(tmp_path / "a.png"))


def test_absent_label_map_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a.png does not exist"):
        read_label_map(str(tmp_path / "a.png"))


# --- values as stored ---


def test_stored_values_of_16_bits_and_floats(tmp_path):
    grey = (np.arange(12).reshape(3, 4) * 5000).astype(np.uint16)
    write(tmp_path / "a.png", grey)
    write(tmp_path / "f.tif", grey.astype(np.float32) - 0.5)
    np.save(tmp_path / "c.npy", np.stack([grey] * 5, axis=2))
    found = read_image(str(tmp_path / "a.png"), "RAW")
    assert (found.dtype, found.shape) == (np.float32, (3, 4, 1))
    assert np.array_equal(found[:, :, 0], grey)
    assert np.array_equal(read_image(str(tmp_path / "f.tif"), "RAW")[:, :, 0], grey - 0.5)
    assert np.array_equal(read_image(str(tmp_path / "c.npy"), "RAW")[:, :, 4], grey)
    assert read_image_size(str(tmp_path / "c.npy")) == (3, 4)


def test_stored_colour_of_16_bits_is_not_cut_to_8(tmp_path):
    values = (np.arange(36).reshape(3, 4, 3) * 1800 + 7).astype(np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = (
        struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks
    )
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert np.array_equal(read_image(str(tmp_path / "a.png"), "RAW"), values)


def test_stored_bytes_stay_bytes(tmp_path):
    path = write(tmp_path / "a.png", picture())
    assert np.array_equal(read_image(path, "RAW"), picture())
    assert read_image(path, "RAW").dtype == np.uint8


def test_tiff_of_many_channels_needs_tifffile(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    values = (np.arange(3 * 4 * 6).reshape(3, 4, 6) * 500).astype(np.uint16)
    for name, options in (("a", {}), ("b", {"planarconfig": "separate"})):
        stored = np.moveaxis(values, 2, 0) if options else values
        tifffile.imwrite(tmp_path / f"{name}.tif", stored, photometric="minisblack", **options)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack", planarconfig="contig")
    for name in "ab":
        assert np.array_equal(read_image(str(tmp_path / f"{name}.tif"), "RAW"), values)
        assert read_image_size(str(tmp_path / f"{name}.tif")) == (3, 4)
    form = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(tmp_path / "c.tif", values, **form, extratags=[(274, "H", 1, 6, True)])
    assert read_image(str(tmp_path / "c.tif"), "RAW").shape == (4, 3, 6)
    assert read_image_size(str(tmp_path / "c.tif")) == (4, 3)
    (tmp_path / "a.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:60])
    with pytest.raises(BadImageError, match=r"a.tif"):
        read_image(str(tmp_path / "a.tif"), "RAW")
    with pytest.raises(BadImageError, match=r"a.tif"):
        read_image_size(str(tmp_path / "a.tif"))


def test_tiff_that_pil_does_not_know_names_the_package(tmp_path):
    # Of five bits per channel.
    Image.new("L", (4, 3)).save(tmp_path / "a.tif")
    data = (tmp_path / "a.tif").read_bytes()
    bits = struct.pack("<HHIHH", 258, 3, 1, 8, 0)
    assert bits in data
    (tmp_path / "a.tif").write_bytes(data.replace(bits, struct.pack("<HHIHH", 258, 3, 1, 5, 0)))
    with pytest.raises(BadImageError, match=r"INPUT.FORMAT RAW, .*detkit-vision\[tiff\]"):
        read_image(str(tmp_path / "a.tif"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param(np.zeros(3), r"must hold numbers \(H, W\)", id="shape"),
        pytest.param(np.array([["a"]]), ".*has <U1", id="text"),
        pytest.param(np.array([[None]]), "cannot be read: Object arrays", id="pickle"),
    ],
)
def test_wrong_array_is_named(values, message, tmp_path):
    np.save(tmp_path / "a.npy", values, allow_pickle=True)
    with pytest.raises(BadImageError, match=f"a.npy {message}"):
        read_image(str(tmp_path / "a.npy"), "RAW")


def test_array_needs_the_format_raw(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 4)))
    with pytest.raises(BadImageError, match=r"a.npy is an array: set INPUT.FORMAT RAW"):
        read_image(str(tmp_path / "a.npy"))


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_stored_values_are_shown_from_the_lowest_to_the_highest(channels):
    values = np.linspace(-3, 7, 12 * channels, dtype=np.float32).reshape(3, 4, channels)
    shown = convert_image_to_rgb(values, "RAW")
    assert (shown.shape, shown.dtype, shown.min()) == ((3, 4, 3), np.uint8, 0)
