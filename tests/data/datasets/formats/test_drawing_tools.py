"""Shapes of labelme and CVAT besides plain boxes, and what is refused."""

import json

import numpy as np
import pytest

from detkit.data.datasets.formats.drawing_tools import read_cvat, read_labelme
from detkit.structures.mask_formats import rle_to_bitmask
from detkit.utils.errors import DataError


def _labelme(root, shapes, **content):
    content = {"imagePath": "a.png", "imageHeight": 24, "imageWidth": 33, **content}
    (root / "a.json").write_text(json.dumps({**content, "shapes": shapes}))
    return read_labelme(str(root))


def _shape(kind, points, **further):
    return {"label": "cat", "shape_type": kind, "points": points, **further}


TRIANGLE = [[1, 1], [5, 1], [5, 7]]


def test_labelme_shapes(tmp_path, caplog):
    shapes = [
        _shape("polygon", TRIANGLE, group_id=4),
        _shape("circle", [[10, 10], [13, 14]]),
        _shape("polygon", [[8, 8], [9, 8], [9, 9]], group_id=4),
        _shape("polygon", TRIANGLE, group_id=None),
        _shape("line", [[1, 1], [2, 2]]),
    ]
    (record,) = _labelme(tmp_path, shapes).records()
    boxes = [a["bbox"] for a in record["annotations"]]
    assert boxes == [[5, 5, 10, 10], [1, 1, 8, 8], [1, 1, 4, 6]]
    assert len(record["annotations"][1]["segmentation"]) == 2
    assert "line: 1" in caplog.text


@pytest.mark.parametrize(
    ("shape", "content", "message"),
    [
        pytest.param(_shape("polygon", [[1, 1], [2, 2]]), {}, "shape 1 of .*polygon of 4", id="2"),
        pytest.param(_shape("polygon", [[1, "x"]]), {}, "shape 1 of .*'x', need a number", id="x"),
        pytest.param({"points": []}, {}, "shape 1 of .*no label", id="label"),
        pytest.param(_shape("polygon", TRIANGLE), {"imagePath": ""}, "no imagePath", id="image"),
        pytest.param(_shape("polygon", TRIANGLE), {"imageWidth": None}, "imageWidth", id="width"),
        pytest.param(_shape("polygon", TRIANGLE), {"imagePath": "../../x.png"}, "outside", id="up"),
    ],
)
def test_wrong_labelme_file_is_named(shape, content, message, tmp_path):
    with pytest.raises(DataError, match=message):
        _labelme(tmp_path, [shape], **content).records()


def _cvat(root, shapes, size='width="33" height="24"', labels="<label><name>cat</name></label>"):
    meta = f"<meta><job><labels>{labels}</labels></job></meta>"
    path = root / "annotations.xml"
    image = f'<image id="0" name="a.png" {size}>{shapes}</image>'
    path.write_text(f"<annotations>{meta}{image}</annotations>")
    return read_cvat(str(path), str(root))


def test_cvat_shapes(tmp_path, caplog):
    shapes = (
        '<polygon label="cat" points="1,1;5,1;5,7"/>'
        '<box label="cat" xtl="10" ytl="4" xbr="20" ybr="8" rotation="90"/>'
        '<mask label="cat" rle="1, 4, 1" left="2" top="3" width="3" height="2"/>'
        '<polyline label="cat" points="1,1;2,2"/>'
    )
    (record,) = _cvat(tmp_path, shapes).records()
    polygon, turned, mask = record["annotations"]
    assert polygon["segmentation"] == [[1, 1, 5, 1, 5, 7]]
    assert turned["bbox"] == pytest.approx([13, 1, 4, 10])
    expected = np.zeros((24, 33), bool)
    expected[3:5, 2:5] = [[0, 1, 1], [1, 1, 0]]
    assert (rle_to_bitmask(mask["segmentation"], 24, 33) == expected).all()
    assert "polyline: 1" in caplog.text


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        pytest.param('<box label="dog" xtl="1" ytl="1" xbr="2" ybr="2"/>', {}, "'dog'", id="label"),
        pytest.param('<box label="cat" xtl="1"/>', {}, "xtl or ytl", id="box"),
        pytest.param('<polygon label="cat" points="1,1;2"/>', {}, "polygon of 3", id="points"),
        pytest.param(
            '<mask label="cat" rle="1,1" left="0" top="0" width="3" height="1"/>',
            {},
            "2 pixels in its rle, need 3x1",
            id="mask",
        ),
        pytest.param("", {"size": ""}, "height or width of image 0", id="size"),
    ],
)
def test_wrong_cvat_shape_is_named_by_image(shapes, options, message, tmp_path):
    with pytest.raises(DataError, match=message) as caught:
        _cvat(tmp_path, shapes, **options)
    assert "image 0 (a.png)" in str(caught.value)


def test_cvat_video_is_refused(tmp_path):
    (tmp_path / "a.xml").write_text("<annotations><track/></annotations>")
    with pytest.raises(DataError, match="tracks of a video"):
        read_cvat(str(tmp_path / "a.xml"), str(tmp_path))
