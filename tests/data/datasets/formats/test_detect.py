import json

import pytest

from detkit.data.datasets.formats.detect import detect_dataset
from detkit.utils.errors import ConfigError, DataError, MissingFileError


def test_roboflow_exports_of_coco_have_a_split_per_folder(write_image, tmp_path):
    for split in ("train", "valid"):
        write_image(f"{split}/a.jpg")
        content = {"images": [{"id": 0, "file_name": "a.jpg"}], "categories": [], "annotations": []}
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(content))
    found = detect_dataset(str(tmp_path))
    assert list(found) == ["train", "valid"]
    assert found["valid"]["images"] == str(tmp_path / "valid")


def test_images_are_found_by_the_name_of_the_annotation_file(write_image, tmp_path):
    write_image("val2017/a.jpg")
    (tmp_path / "annotations").mkdir()
    content = {"images": [{"id": 0, "file_name": "a.jpg"}], "categories": []}
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    found = detect_dataset(str(tmp_path))
    assert found["instances_val2017"]["images"] == str(tmp_path / "val2017")
    (tmp_path / "val2017" / "a.jpg").unlink()
    with pytest.raises(MissingFileError, match=r"image a.jpg, which is in none of.*\. Declare"):
        detect_dataset(str(tmp_path))


def test_xml_beside_images_is_voc_with_the_classes_found(write_image, make_voc_xml, tmp_path):
    write_image("a.jpg")
    (tmp_path / "a.xml").write_text(make_voc_xml([("wbc", (1, 1, 9, 9)), ("rbc", (1, 1, 9, 9))]))
    ((split, entry),) = detect_dataset(str(tmp_path)).items()
    assert split == tmp_path.name
    assert (entry["format"], entry["classes"]) == ("voc", ["rbc", "wbc"])


def test_classes_txt_with_folders_is_yolo(write_image, tmp_path):
    write_image("images/a.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (entry,) = detect_dataset(str(tmp_path)).values()
    assert (entry["format"], entry["classes"]) == ("yolo", ["cat", "dog"])


def test_labelme_and_hugging_face(tmp_path):
    (tmp_path / "a.json").write_text('{"imagePath": "a.png", "shapes": []}')
    assert detect_dataset(str(tmp_path))[tmp_path.name]["format"] == "labelme"
    (tmp_path / "a.json").unlink()
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metadata.jsonl").write_text("")
    expected = {"format": "hugging_face", "root": str(tmp_path), "split": "train"}
    assert detect_dataset(str(tmp_path)) == {"train": expected}


def test_yaml_of_something_else_is_passed_over(tmp_path):
    (tmp_path / "a.yaml").write_text("model: !!python/name:os.system")
    (tmp_path / "b.json").write_text('{"imagePath": "a.png", "shapes": []}')
    assert detect_dataset(str(tmp_path))[tmp_path.name]["format"] == "labelme"


def test_auto_says_what_it_found_and_asks_which_split(write_image, tmp_path, declare, caplog):
    caplog.set_level("INFO")
    write_image("images/train/a.jpg")
    write_image("images/val/a.jpg")
    for split in ("train", "val"):
        (tmp_path / "labels" / split).mkdir(parents=True)
        (tmp_path / "labels" / split / "a.txt").touch()
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat]")
    declare({"format": "auto", "root": str(tmp_path), "split": "val"})
    assert "'format': 'yolo'" in caplog.text
    with pytest.raises(ConfigError, match=r"has the splits train, val: name one"):
        declare({"format": "auto", "root": str(tmp_path)})


def test_nothing_known(tmp_path):
    with pytest.raises(DataError, match=r"in no known format; looked for a data.yaml"):
        detect_dataset(str(tmp_path))
    with pytest.raises(MissingFileError, match="does not exist"):
        detect_dataset(str(tmp_path / "gone"))
