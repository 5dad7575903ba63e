"""The page of findings: whole in one file, with pictures of the examples."""

import base64
import io
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detkit.data.doctor import page_of

MAX_PIXELS = 10**6


def pictures_in(page: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in found]


def redness(picture: np.ndarray) -> np.ndarray:
    values = picture.astype(int)
    return values[:, :, 0] - values[:, :, 1:].max(axis=2)


def test_page_needs_nothing_else_and_escapes_what_files_say(toy: Any) -> None:
    toy.files["train"]["categories"][0]["name"] = "<script>alert(1)</script>"
    toy.files["test"]["categories"][0]["name"] = "<script>alert(1)</script>"
    toy.image().unlink()
    page = page_of(toy.check(), "Data of <b>", "BGR", MAX_PIXELS)
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page
    assert "<b>" not in page
    assert not re.search(r"(?:src|href)=[\"']?(?!data:)|url\(|@import|https?://", page)
    assert 'id="missing-image"' in page
    assert str(toy.image()) in page
    assert pictures_in(page) == []


@pytest.mark.parametrize("format", ["BGR", "RAW"])
def test_box_is_drawn_where_it_is(format: str, toy: Any) -> None:
    toy.settings |= {"INPUT.FORMAT": format}
    grey = np.full((48, 64, 3), 90, np.uint8)
    grey[::2] = 110
    Image.fromarray(grey).save(toy.image(), quality=95)
    toy.first(bbox=[10, 8, 30, 20], segmentation=[[50, 40, 60, 40, 60, 44]])
    (picture,) = pictures_in(page_of(toy.check(), "x", format, MAX_PIXELS))
    assert picture.shape == (240, 320, 3)  # five times the image
    rows, columns = np.nonzero(redness(picture) > 100)
    edges = [columns.min(), rows.min(), columns.max(), rows.max()]
    np.testing.assert_allclose(edges, [50, 40, 200, 140], atol=3)
    assert not (redness(picture)[60:120, 70:180] > 60).any()


def test_small_object_is_shown_from_near(toy: Any) -> None:
    toy.write("large.png", np.asarray(Image.fromarray(toy.pixels()).resize((640, 480))))
    toy.first(bbox=[600, 400, 10, 8], segmentation=[[50, 40, 60, 40, 60, 44]])
    toy.files["train"]["annotations"][1].update(bbox=[9, 9, 99, 99])
    toy.settings["INPUT.MIN_SIZE_TEST"] = 480
    toy.settings["INPUT.MAX_SIZE_TEST"] = 640
    report = toy.check()
    finding = next(f for f in report.findings if f.code == "mask-off-box")
    finding.examples = finding.examples[:1]
    page = page_of(report, "x", "BGR", MAX_PIXELS)
    article = page[page.index('id="mask-off-box"') :].partition("</article>")[0]
    (picture,) = pictures_in(article)
    rows, columns = np.nonzero(redness(picture) > 100)
    # A window of 50 pixels around the object, six times as large.
    assert columns.max() - columns.min() == pytest.approx(10 * 320 / 50, abs=8)
    assert rows.max() - rows.min() == pytest.approx(8 * 320 / 50, abs=8)


def test_copies_are_shown_beside_each_other(toy: Any) -> None:
    toy.image("test", 1).write_bytes(toy.image().read_bytes())
    page = page_of(toy.check(), "x", "BGR", MAX_PIXELS)
    one, other = pictures_in(page)
    np.testing.assert_array_equal(one, other)


def test_page_without_findings_says_so(toy: Any) -> None:
    page = page_of(toy.check(), "x", "BGR", MAX_PIXELS)
    assert "Nothing was found." in page
    assert "<td class=number>8</td>" in page  # annotations of the training set
