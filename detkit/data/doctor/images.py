"""Faults of image files, and copies among them; every file is read and decoded, in processes.

Legend: N images.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from detkit.structures import ImageRecord
from detkit.utils.errors import MissingFileError, UserError
from detkit.utils.image import (
    orientation_of,
    read_image,
    read_image_size,
    read_label_map,
    upright_pixels,
)
from detkit.utils.image_file import BadImageError, opened_image, read_image_bytes

_SIDE = 16  # of the small grey picture by which images are compared
# Endings, where they differ from the format's name.
_ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".mpo"),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp", ".dib"),
    "DIB": (".bmp", ".dib"),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
_SLOW = ("JPEG2000", "AVIF", "GIF")
_SLOW_PNG = 1_500_000  # pixels, from which a PNG takes three times as long as a JPEG
_CHUNK, _AHEAD = 8, 4

# Two pictures look the same: bits that differ in the order of neighbours, mean difference of the
# small pictures in grey levels. Frames of a resting camera and files saved again are below both.
_MAX_BITS = 6
_MAX_DIFFERENCE = 3.0
_NEIGHBOURS = 32
_MIN_CONTRAST = 2.0


@dataclass(slots=True)
class ImageFacts:
    """What one image file is like."""

    code: str = ""
    """A key of `KINDS`: why it cannot be used; empty if it can."""
    problem: str = ""
    size: tuple[int, int] | None = None
    """(height, width), upright."""
    orientation: int = 1
    is_turned_by_xmp: bool = False
    format: str = ""
    is_slow: bool = False
    has_wrong_ending: bool = False
    is_deep: bool = False
    num_channels: int = 0
    digest: bytes = b""
    small: bytes = b""
    """Grey picture of `_SIDE` x `_SIDE`; empty if it shows nothing."""
    labels: tuple[int, ...] = ()
    """Values in its label map."""
    label_problem: str = ""
    """Why the label map cannot be used; empty if it can, or there is none."""


def facts_of(file_name: str, image_format: str, max_pixels: int) -> ImageFacts:
    """Read and decode an image file.

    Args:
        file_name: Path or address.
        image_format: INPUT.FORMAT.
        max_pixels: INPUT.MAX_IMAGE_PIXELS.
    """
    facts = ImageFacts()
    try:
        data = read_image_bytes(file_name)
    except MissingFileError as error:
        return ImageFacts("missing-image", str(error))
    except (BadImageError, OSError) as error:
        return ImageFacts("not-an-image", str(error))
    if not data:
        return ImageFacts("empty-file", f"{file_name} has 0 bytes")
    facts.digest = hashlib.blake2b(data, digest_size=16).digest()
    code = "not-an-image"
    try:
        if image_format == "RAW":
            facts.size = read_image_size(file_name)
            code = "damaged-image"
            pixels = read_image(file_name, "RAW", max_pixels=max_pixels)
            facts.num_channels = pixels.shape[2]
            values = np.nan_to_num(pixels[:, :, 0].astype(np.float32))
            low, high = float(values.min()), float(values.max())
            grey = ((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)
        else:
            with opened_image(data, file_name, max_pixels) as image:
                code = "damaged-image"
                _note_header(facts, image, file_name)
                facts.size = _upright_size(facts, image, file_name)
                # A JPEG is unpacked at an eighth of its size where that is enough; all of its
                # bytes are read even so.
                image.draft("L", (4 * _SIDE, 4 * _SIDE))
                grey = upright_pixels(image, "L")
    except (BadImageError, OSError) as error:
        too_many = "INPUT.MAX_IMAGE_PIXELS" in str(error)
        return ImageFacts("too-many-pixels" if too_many else code, str(error), facts.size)
    small = Image.fromarray(grey).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    if grey.min() == grey.max():
        facts.code, facts.problem = "blank-image", f"all pixels are {grey.flat[0]}"
    elif np.asarray(small).std() >= _MIN_CONTRAST:
        facts.small = small.tobytes()
    return facts


def _note_header(facts: ImageFacts, image: Image.Image, file_name: str) -> None:
    name = image.format or ""
    facts.format = name
    suffix = PurePath(file_name).suffix.lower()
    facts.has_wrong_ending = suffix not in _ENDINGS.get(name, (f".{name.lower()}",))
    facts.is_deep = image.mode.startswith(("I", "F"))
    facts.orientation = orientation_of(image)
    exif = Image.Exif()
    exif.load(image.info.get("exif") or b"")
    facts.is_turned_by_xmp = facts.orientation != 1 and 0x0112 not in exif and name != "TIFF"
    facts.is_slow = (
        name in _SLOW
        or bool(image.info.get("progressive") or image.info.get("interlace"))
        or (name == "PNG" and image.width * image.height > _SLOW_PNG)
    )


def _upright_size(facts: ImageFacts, image: Image.Image, file_name: str) -> tuple[int, int]:
    if facts.format == "TIFF":
        return read_image_size(file_name)
    width, height = image.size
    return (width, height) if facts.orientation >= 5 else (height, width)


def _note_labels(facts: ImageFacts, label_file: str, max_pixels: int) -> None:
    try:
        labels = read_label_map(label_file, max_pixels=max_pixels)
    except (UserError, OSError) as error:
        facts.label_problem = str(error)
        return
    facts.labels = tuple(np.unique(labels).tolist())
    if facts.size is not None and labels.shape != facts.size:
        facts.label_problem = f"{label_file} is {labels.shape}, its image {facts.size} (H, W)"


class _Files(Dataset):
    def __init__(self, records: Sequence[ImageRecord], image_format: str, max_pixels: int) -> None:
        # Arrays of text: workers share them without copies.
        self.files = np.array([str(record["file_name"]) for record in records])
        self.label_files = np.array([record.get("sem_seg_file_name", "") for record in records])
        self.image_format, self.max_pixels = image_format, max_pixels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> ImageFacts:
        facts = facts_of(str(self.files[index]), self.image_format, self.max_pixels)
        if self.label_files[index]:
            _note_labels(facts, str(self.label_files[index]), self.max_pixels)
        return facts


def facts_of_all(
    records: Sequence[ImageRecord], image_format: str, max_pixels: int, num_workers: int
) -> Iterator[ImageFacts]:
    """Yield the facts of images in their order, as worker processes find them.

    Args:
        records: The images, and their label maps if they have any.
        image_format: As in `facts_of`.
        max_pixels: Likewise.
        num_workers: Processes; 0 looks in this one.
    """
    loader = DataLoader(
        _Files(records, image_format, max_pixels),
        batch_size=_CHUNK,
        num_workers=num_workers,
        collate_fn=list,
        prefetch_factor=_AHEAD if num_workers else None,
    )
    for chunk in loader:
        yield from chunk


def copies(facts: Sequence[ImageFacts]) -> list[list[int]]:
    """Return groups of files with the same content, by their numbers."""
    groups: dict[bytes, list[int]] = {}
    for k, image in enumerate(facts):
        if image.digest:
            groups.setdefault(image.digest, []).append(k)
    return [group for group in groups.values() if len(group) > 1]


def look_alikes(facts: Sequence[ImageFacts]) -> list[tuple[int, int]]:
    """Return pairs of files with different content that look the same, by their numbers.

    Each image is compared with those whose hash is near in one of four orders, so that time and
    memory grow with N alone; of very many that look alike, some pairs are passed over.
    """
    first_of: dict[bytes, int] = {}
    for k, image in enumerate(facts):
        if image.small:
            first_of.setdefault(image.digest, k)
    numbers = np.fromiter(first_of.values(), dtype=np.int64)
    if len(numbers) < 2:
        return []
    small = np.frombuffer(b"".join(facts[k].small for k in numbers), dtype=np.uint8)
    small = small.reshape(-1, _SIDE, _SIDE)
    # Which of two neighbours is brighter, over blocks of 2 x 2: 8 rows of 8 pairs around.
    blocks = small.reshape(-1, 8, 2, 8, 2).mean(axis=(2, 4))
    bits = (blocks > np.roll(blocks, 1, axis=2)).reshape(-1, 64)
    packed = np.packbits(bits, axis=1)
    found: set[tuple[int, int]] = set()
    for turn in range(4):
        # Images with few differing bits are neighbours in most of these orders: those whose
        # leading bits are equal.
        order = np.lexsort(np.roll(packed, 2 * turn, axis=1).T[::-1])
        for step in range(1, min(_NEIGHBOURS, len(order))):
            a, b = order[:-step], order[step:]
            near = np.flatnonzero((bits[a] != bits[b]).sum(axis=1) <= _MAX_BITS)
            a, b = a[near], b[near]
            difference = np.abs(small[a].astype(np.int16) - small[b]).mean(axis=(1, 2))
            same = difference <= _MAX_DIFFERENCE
            pairs = np.sort(np.stack([numbers[a[same]], numbers[b[same]]], axis=1), axis=1)
            found.update(map(tuple, pairs.tolist()))
    return sorted(found)
