import pytest

from detkit.data.datasets.formats.table import read_csv, read_open_images
from detkit.utils.errors import DataError, MissingFileError

HEAD = "image,class,xmin,ymin,xmax,ymax"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        pytest.param(f"{HEAD}\na,cat,1,2,x,4", {}, ":2 has 'x', need a number", id="text"),
        pytest.param(f"{HEAD}\na,cat,5,2,3,4", {}, ":2 has a box whose right", id="order"),
        pytest.param(f"{HEAD}\na,,1,2,3,4", {}, ":2 has a box without a class", id="class"),
        pytest.param(f"{HEAD}\n\na,cat,1,2", {}, ":3 has 4 columns, need 6", id="short"),
        pytest.param("image,class,xmin\na,cat,1", {}, "no column for ymin, width", id="columns"),
        pytest.param(
            f"{HEAD}\na,cat,1,2,3,4", {"columns": {"label": "klass"}}, "no column 'klass'", id="named"
        ),
        pytest.param(
            f"{HEAD}\na,cat,1,2,30,4", {"normalized": True}, ":2 has 30, need shares", id="pixels"
        ),
        pytest.param(HEAD, {}, "names no image", id="empty"),
    ],
)  # fmt: skip
def test_wrong_table_is_named_by_line(text, options, message, toy, tmp_path):
    path = tmp_path / "boxes.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=f"boxes.csv.*{message}"):
        read_csv(str(path), str(tmp_path / "images"), **options).records()


def test_missing_table(tmp_path):
    with pytest.raises(MissingFileError, match=r"gone.csv does not exist"):
        read_csv(str(tmp_path / "gone.csv"), str(tmp_path))


def test_group_is_a_crowd_and_classes_keep_their_codes_without_descriptions(toy, tmp_path):
    path = tmp_path / "boxes.csv"
    path.write_text("ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf\na,/m/01yrx,0,0.5,0,0.5,1\n")
    found = read_open_images(str(path), str(tmp_path / "images"))
    (annotation,) = found.records()[0]["annotations"]
    assert (annotation["iscrowd"], annotation["bbox"]) == (1, [0, 0, 16.5, 12])
