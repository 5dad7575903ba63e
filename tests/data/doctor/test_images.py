"""Images that look the same are found without comparing all with all."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detkit.data.doctor.images import ImageFacts, copies, facts_of, look_alikes

MAX_PIXELS = 10**7


def facts(path: Path) -> ImageFacts:
    return facts_of(str(path), "BGR", MAX_PIXELS)


def picture(seed: int, size: tuple[int, int] = (240, 180)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda image: image.resize((160, 120)), id="smaller"),
        pytest.param(lambda image: image.point(lambda v: min(v + 2, 255)), id="brighter"),
        pytest.param(lambda image: image.convert("L"), id="grey"),
    ],
)
def test_changed_copy_looks_the_same(change, tmp_path) -> None:
    picture(0).save(tmp_path / "a.jpg", quality=95)
    change(picture(0)).save(tmp_path / "b.jpg", quality=70)
    picture(1).save(tmp_path / "c.jpg")
    found = [facts(tmp_path / f"{name}.jpg") for name in "abc"]
    assert look_alikes(found) == [(0, 1)]
    assert copies(found) == []


def test_look_alikes_are_those_of_comparing_all_with_all() -> None:
    random = np.random.default_rng(0)
    grounds = random.integers(0, 256, (60, 16, 16))
    small = [ground + random.integers(-3, 4, (16, 16)) for ground in grounds for _ in range(4)]
    small = [np.clip(s, 0, 255).astype(np.uint8) for s in small]
    found = [ImageFacts(digest=bytes([k]), small=s.tobytes()) for k, s in enumerate(small)]
    pairs = {
        (a, b)
        for a, b in itertools.combinations(range(len(small)), 2)
        if np.abs(small[a].astype(int) - small[b]).mean() <= 3
    }
    assert len(pairs) >= 360
    assert set(look_alikes(found)) == pairs


def test_blank_pictures_are_no_look_alikes(tmp_path) -> None:
    for k in range(3):
        Image.new("RGB", (40, 30), (k, k, k)).save(tmp_path / f"{k}.png")
    found = [facts(tmp_path / f"{k}.png") for k in range(3)]
    assert {image.code for image in found} == {"blank-image"}
    assert look_alikes(found) == []
    assert look_alikes([]) == copies([]) == []


def test_copies_come_in_groups_of_equal_bytes(tmp_path) -> None:
    for k in range(5):
        picture(k % 2).save(tmp_path / f"{k}.jpg")
    found = [facts(tmp_path / f"{k}.jpg") for k in range(5)]
    assert copies(found) == [[0, 2, 4], [1, 3]]
    assert look_alikes(found) == []
