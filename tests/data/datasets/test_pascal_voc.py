"""Reading Pascal VOC trees: boxes, splits, sizes, and what is refused."""

import re

import pytest

from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.data.datasets import load_voc_folders, load_voc_instances, register_pascal_voc
from detkit.data.datasets.faults import collected_faults
from detkit.structures import BoxMode
from detkit.utils.errors import DataError

CLASSES = ("cell", "platelet")


def load(root, split="train", classes=CLASSES):
    return load_voc_instances(str(root), split, classes)


def test_boxes_count_from_zero_and_include_the_last_pixel(write_voc, make_voc_xml):
    root = write_voc({"a": make_voc_xml([("platelet", (1, 3, 10, 24))])})
    record = load(root)[0]
    assert record["annotations"] == [
        {"bbox": [0, 2, 10, 24], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1, "iscrowd": 0}
    ]
    assert record["file_name"] == str(root / "JPEGImages" / "a.jpg")
    assert (record["image_id"], record["height"], record["width"]) == ("a", 24, 32)


def test_order_is_that_of_the_split(write_voc, make_voc_xml):
    root = write_voc({name: make_voc_xml() for name in ("b", "a", "c")})
    assert [r["image_id"] for r in load(root)] == ["b", "a", "c"]
    every = load_voc_folders(str(root / "JPEGImages"), str(root / "Annotations"), CLASSES)
    assert [r["image_id"] for r in every] == ["a", "b", "c"]


def test_xml_without_objects_is_background(write_voc, make_voc_xml):
    assert load(write_voc({"a": make_voc_xml()}))[0]["annotations"] == []


@pytest.mark.parametrize("size", [None, (0, 0), (0, 32), (24, 0)])
def test_size_that_the_xml_lacks_is_that_of_the_image(write_voc, make_voc_xml, size):
    record = load(write_voc({"a": make_voc_xml(size=size)}))[0]
    assert (record["height"], record["width"]) == (24, 32)


def test_difficult_objects_are_marked(write_voc, make_voc_xml):
    text = make_voc_xml([("cell", (1, 1, 5, 5))]).replace(
        "<bndbox>", "<difficult>1</difficult><bndbox>"
    )
    assert load(write_voc({"a": text}))[0]["annotations"][0]["difficult"] == 1


def test_parts_of_objects_are_not_objects(write_voc, make_voc_xml):
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    text = make_voc_xml([("cell", (1, 1, 5, 5))]).replace("</object>", part + "</object>")
    assert len(load(write_voc({"a": text}))[0]["annotations"]) == 1


@pytest.mark.parametrize("suffix", [".png", ".jpeg", ".PNG", ".bmp"])
def test_images_of_other_kinds_are_found(write_voc, make_voc_xml, suffix):
    assert load(write_voc({"a.b": make_voc_xml()}, suffix=suffix))[0]["file_name"].endswith(
        "a.b" + suffix
    )


@pytest.mark.parametrize("named", ["a.png", "C:\\data\\a.png", " a.png "])
def test_of_two_images_of_one_name_the_xml_says_which(write_voc, make_voc_xml, named):
    xml = make_voc_xml().replace("<annotation>", f"<annotation><filename>{named}</filename>")
    root = write_voc({"a": xml}, suffix=".png")
    write_voc({"a": xml}, suffix=".jpg")
    assert load(root)[0]["file_name"].endswith("a.png")


@pytest.mark.parametrize("named", ["", "<filename>a.bmp</filename>"])
def test_two_images_of_one_name_are_refused_if_the_xml_names_neither(
    write_voc, make_voc_xml, named
):
    xml = make_voc_xml().replace("<annotation>", f"<annotation>{named}")
    root = write_voc({"a": xml}, suffix=".png")
    write_voc({"a": xml}, suffix=".jpg")
    with pytest.raises(DataError, match=r"a.xml may be about any of .*a.jpg, .*a.png: name the"):
        load(root)


@pytest.mark.parametrize("text", ["Unspecified", "", "maybe"])
def test_difficult_that_says_nothing_is_not_difficult(write_voc, make_voc_xml, text, caplog):
    xml = make_voc_xml([("cell", (1, 1, 5, 5))]).replace(
        "<bndbox>", f"<difficult>{text}</difficult><bndbox>"
    )
    assert load(write_voc({"a": xml}))[0]["annotations"][0]["difficult"] == 0
    assert ("1 objects in" in caplog.text) == bool(text)


@pytest.mark.parametrize("encoding", ["gb2312", "GBK", "Shift_JIS", "big5", "euc-jp"])
def test_east_asian_encodings_are_understood(write_voc, make_voc_xml, encoding):
    root = write_voc({"a": ""})
    text = f'<?xml version="1.0" encoding="{encoding}"?>' + make_voc_xml([("人", (1, 1, 5, 5))])
    (root / "Annotations" / "a.xml").write_bytes(text.encode(encoding))
    assert load(root, classes=["人"])[0]["annotations"][0]["category_id"] == 0


def test_east_asian_bytes_that_are_damaged_are_an_error(write_voc):
    root = write_voc({"a": ""})
    (root / "Annotations" / "a.xml").write_bytes(
        b"<?xml version='1' encoding='gb2312'?><a>\xff</a>"
    )
    with pytest.raises(DataError, match="is not valid XML: 'gb2312' codec"):
        load(root)


def test_encodings_are_understood(write_voc, make_voc_xml):
    root = write_voc({"a": ""})
    text = '<?xml version="1.0" encoding="utf-16"?>' + make_voc_xml([("żółw", (1, 1, 5, 5))])
    (root / "Annotations" / "a.xml").write_bytes(text.encode("utf-16"))
    assert load(root, classes=["żółw"])[0]["annotations"][0]["category_id"] == 0


def test_registered_data_set_loads(write_voc, make_voc_xml):
    root = write_voc({"a": make_voc_xml([("cell", (1, 1, 5, 5))])})
    for _ in range(2):
        register_pascal_voc("mine", str(root), "train", 2012, CLASSES)
    assert len(DatasetCatalog.get("mine")) == 1
    metadata = MetadataCatalog.get("mine")
    assert (metadata.thing_classes, metadata.dirname, metadata.year, metadata.split) == (
        list(CLASSES),
        str(root),
        2012,
        "train",
    )
    with pytest.raises(ValueError, match="already registered"):
        register_pascal_voc("mine", str(root), "val", 2012, CLASSES)


def test_registered_without_classes_has_vocs_own(tmp_path):
    register_pascal_voc("mine", str(tmp_path), "train", 2007)
    assert MetadataCatalog.get("mine").thing_classes[14] == "person"


# --- refused ---


def test_unknown_classes_list_expected_and_found(write_voc, make_voc_xml):
    first = make_voc_xml([("cells", (1, 1, 5, 5)), ("cell", (1, 1, 5, 5))])
    root = write_voc({"a": first, "b": make_voc_xml([("cells", (1, 1, 5, 5))])})
    with pytest.raises(ValueError) as caught:
        load(root)
    message = str(caught.value)
    assert "'cells' (2 objects, first in a.xml)" in message
    assert "Did you mean 'cell'" in message
    assert "Expected classes: cell, platelet. Found: cell, cells." in message


def test_damaged_xml_is_named_with_its_line(write_voc):
    root = write_voc({"a": "<annotation>\n<size></annotation>"})
    with pytest.raises(ValueError, match=r"a\.xml is not valid XML: mismatched tag: line 2"):
        load(root)


@pytest.mark.parametrize(
    "declaration",
    [
        '<!DOCTYPE lolz [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>',
        '<!DOCTYPE a [<!ENTITY file SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE a SYSTEM "http://example.com/a.dtd">',
    ],
    ids=["bomb", "file", "address"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_document_types_are_refused(write_voc, declaration, encoding):
    root = write_voc({"a": ""})
    text = f'<?xml version="1.0" encoding="{encoding}"?>{declaration}<annotation>&b;</annotation>'
    (root / "Annotations" / "a.xml").write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=r"a\.xml has a document type declaration .*refused"):
        load(root)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        pytest.param(
            "<xmin>1</xmin>",
            "",
            r"object 1 of .*a\.xml has a <bndbox> without <xmin>",
            id="no-xmin",
        ),
        pytest.param(
            "<xmin>1</xmin>", "<xmin>one</xmin>", "has <xmin>one</xmin>, need a number", id="text"
        ),
        pytest.param(
            "<xmin>1</xmin>", "<xmin>nan</xmin>", "has <xmin>nan</xmin>, need a number", id="nan"
        ),
        pytest.param("bndbox>", "box>", r"object 1 of .*a\.xml has no <bndbox>", id="no-box"),
        pytest.param(
            "<name>cell</name>", "", r"a\.xml has a <object> without <name>", id="no-name"
        ),
        pytest.param(
            "<width>32</width>", "<width>w</width>", r"a\.xml has <width>w</width>", id="bad-size"
        ),
    ],
)
def test_incomplete_objects_are_named(write_voc, make_voc_xml, old, new, message):
    root = write_voc({"a": make_voc_xml([("cell", (1, 1, 5, 5))]).replace(old, new)})
    with pytest.raises(ValueError, match=message):
        load(root)


def test_missing_split_lists_those_there_are(write_voc, make_voc_xml):
    root = write_voc({"a": make_voc_xml()}, split="trainval")
    with pytest.raises(
        FileNotFoundError, match=r"train\.txt does not exist. Splits there: trainval. Did you mean"
    ):
        load(root)
    with pytest.raises(FileNotFoundError, match=r"does not exist, nor does its folder .*ImageSets"):
        load(root / "nowhere")


def test_missing_folders_are_named(tmp_path, write_voc, make_voc_xml):
    root = write_voc({"a": make_voc_xml()})
    with pytest.raises(FileNotFoundError, match=r"folder .*nope of images does not exist"):
        load_voc_folders(str(tmp_path / "nope"), str(root / "Annotations"), CLASSES)
    with pytest.raises(FileNotFoundError, match=r"folder .*nope of annotations does not exist"):
        load_voc_folders(str(root / "JPEGImages"), str(tmp_path / "nope"), CLASSES)
    with pytest.raises(
        FileNotFoundError, match=r"folder .*JPEGImages of annotations holds no \.xml file"
    ):
        load_voc_folders(str(root / "JPEGImages"), str(root / "JPEGImages"), CLASSES)


def test_missing_xml_and_image_are_named(write_voc, make_voc_xml):
    root = write_voc({"a": make_voc_xml(), "b": make_voc_xml()})
    (root / "Annotations" / "a.xml").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"a\.xml does not exist, though .*train\.txt lists it"
    ):
        load(root)
    (root / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 of 2 images annotated in .* are not in .*JPEGImages: 'b'"
    ):
        load(root)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a\na\n", r"lists images more than once: 'a'"),
        ("a -1\nb  1\nc 0\n", r"one image per line; 'a -1' looks like VOC's list for one class"),
        ("../../a\n", r"names inside the image folder, it has '../../a'"),
        ("/a\n", r"names inside the image folder"),
    ],
)
def test_bad_split_files_are_refused(write_voc, make_voc_xml, lines, message):
    root = write_voc({"a": make_voc_xml()})
    (root / "ImageSets" / "Main" / "train.txt").write_text(lines)
    with pytest.raises(ValueError, match=re.compile(message)):
        load(root)


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        ((), ValueError, "at least one"),
        (("a", "a"), ValueError, r"repeated: \['a'\]"),
        ("cell", TypeError, "list of names"),
        ((1, 2), TypeError, "list of names"),
    ],
)
def test_bad_class_names_are_refused(tmp_path, classes, error, message):
    with pytest.raises(error, match=message):
        register_pascal_voc("mine", str(tmp_path), "train", 2012, classes)


def load_all(root):
    return load_voc_folders(str(root / "JPEGImages"), str(root / "Annotations"), CLASSES)


def test_capital_endings_are_read(write_voc, make_voc_xml):
    root = write_voc({"a": make_voc_xml([("cell", (1, 1, 5, 5))])}, suffix=".JPG")
    (root / "Annotations" / "a.xml").rename(root / "Annotations" / "a.XML")
    for records in (load(root), load_all(root)):
        assert [len(r["annotations"]) for r in records] == [1]
        assert records[0]["file_name"].endswith("a.JPG")


def test_files_left_out_are_counted_and_named(write_voc, make_voc_xml, caplog):
    root = write_voc({"a": make_voc_xml(), "b": make_voc_xml()})
    (root / "Annotations" / "b.xml").unlink()
    for name in ("._a.xml", ".ipynb_checkpoints/a-checkpoint.xml", "classes.txt"):
        (root / "Annotations" / name).parent.mkdir(exist_ok=True)
        (root / "Annotations" / name).write_bytes(b"\0")
    (root / "JPEGImages" / "._a.jpg").touch()
    with caplog.at_level("INFO", logger="detkit"):
        assert [r["image_id"] for r in load_all(root)] == ["a"]
    for text in (
        "Annotations: 2 that are hidden: ._a.xml, .ipynb_checkpoints/",
        "Annotations: 1 that are without .xml: classes.txt",
        "JPEGImages: 1 that are hidden: ._a.jpg",
        "JPEGImages: 1 that are without an .xml file: ",
    ):
        assert text in caplog.text
    assert "b.jpg" in caplog.text


def test_folders_in_the_folders_are_read(write_voc, make_voc_xml):
    root = write_voc({"cam_a/1": make_voc_xml(), "cam_b/1": make_voc_xml(), "2": make_voc_xml()})
    for records in (load(root), load_all(root)):
        assert {r["image_id"]: r["file_name"] for r in records} == {
            name: str(root / "JPEGImages" / f"{name}.jpg") for name in ("cam_a/1", "cam_b/1", "2")
        }
    # A link that leads back ends nowhere.
    (root / "JPEGImages" / "back").symlink_to(root / "JPEGImages")
    assert len(load_all(root)) == 3


def test_missing_image_is_left_out_where_faults_are_collected(write_voc, make_voc_xml):
    root = write_voc({"a": make_voc_xml(), "b": make_voc_xml()})
    (root / "JPEGImages" / "a.jpg").unlink()
    with collected_faults() as faults:
        (record,) = load_all(root)
    assert (record["image_id"], [fault.code for fault in faults]) == ("b", ["missing-image"])


@pytest.mark.parametrize("nested", ["JPEGImages", "Annotations"])
def test_folders_of_one_side_may_be_missing_on_the_other(write_voc, make_voc_xml, nested):
    root = write_voc({"a": make_voc_xml()})
    (file,) = (root / nested).iterdir()
    (root / nested / "part").mkdir()
    file.rename(root / nested / "part" / file.name)
    (record,) = load_all(root)
    assert record["file_name"].endswith("a.jpg")


def test_two_xml_files_about_one_image_are_refused(write_voc, make_voc_xml):
    root = write_voc({"a": make_voc_xml()})
    (root / "Annotations" / "old").mkdir()
    (root / "Annotations" / "old" / "a.xml").write_text(make_voc_xml())
    with pytest.raises(DataError, match=r"a\.xml and .*old/a\.xml are both about .*a\.jpg"):
        load_all(root)


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(b"\xef\xbb\xbfa\r\nb.c\r\n", id="byte order mark"),
        pytest.param("\ufeffa\nb.c\n".encode("utf-16-le"), id="utf-16"),
        pytest.param(b"a.jpg\nb.c.JPG\n", id="images"),
        pytest.param(b"a.xml\nb.c.xml\n", id="xml files"),
        pytest.param(b"./a\nb.c\n", id="from here"),
    ],
)
def test_names_in_a_split_are_understood(write_voc, make_voc_xml, lines):
    root = write_voc({"a": make_voc_xml(), "b.c": make_voc_xml()})
    (root / "ImageSets" / "Main" / "train.txt").write_bytes(lines)
    assert [r["image_id"] for r in load(root)] == ["a", "b.c"]


def test_split_that_is_no_text_is_named(write_voc, make_voc_xml):
    root = write_voc({"a": make_voc_xml()})
    (root / "ImageSets" / "Main" / "train.txt").write_bytes(b"a\n\xff\xfe\xfa")
    with pytest.raises(DataError, match=r"train\.txt must be text in UTF-8"):
        load(root)
