import hashlib
import json
import threading
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from detkit.data.datasets.coco import load_coco_json
from detkit.data.datasets.pascal_voc import load_voc_instances
from detkit.data.datasets.shapes import SHAPES_CLASSES, ensure_shapes, files, generate_shapes
from detkit.data.datasets.shapes.scene import draw_scene
from detkit.structures import BoxMode, ImageRecord


def _hashes(folder: Path) -> dict[str, str]:
    files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
    return {
        f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_shapes(
        tmp_path_factory.mktemp("data") / "shapes", num_train=6, num_val=3, seed=1
    )


def test_equal_seeds_give_equal_files(small: Path, tmp_path: Path) -> None:
    again = generate_shapes(tmp_path / "again", num_train=6, num_val=3, seed=1)
    assert _hashes(again) == _hashes(small)


def test_other_seeds_give_other_pictures(small: Path, tmp_path: Path) -> None:
    other = generate_shapes(tmp_path / "other", num_train=1, num_val=1, seed=2)
    name = "JPEGImages/train_000000.jpg"
    assert _hashes(other)[name] != _hashes(small)[name]


def test_smaller_set_is_the_beginning_of_a_larger_one(small: Path, tmp_path: Path) -> None:
    fewer = generate_shapes(tmp_path / "fewer", num_train=2, num_val=1, seed=1)
    pictures = {name: h for name, h in _hashes(fewer).items() if name.endswith(".jpg")}
    assert len(pictures) == 3
    assert pictures.items() <= _hashes(small).items()


def test_train_and_val_hold_different_pictures(small: Path) -> None:
    hashes = _hashes(small)
    assert hashes["JPEGImages/train_000000.jpg"] != hashes["JPEGImages/val_000000.jpg"]


def test_coco_and_voc_hold_the_same_boxes_and_classes(small: Path) -> None:
    coco = load_coco_json(
        str(small / "instances_train.json"), str(small / "JPEGImages"), "test_shapes_small"
    )
    voc = load_voc_instances(str(small), "train", SHAPES_CLASSES)
    assert [r["file_name"] for r in coco] == [r["file_name"] for r in voc]
    assert [(r["height"], r["width"]) for r in coco] == [(r["height"], r["width"]) for r in voc]
    assert [_classes_and_boxes(r) for r in coco] == [_classes_and_boxes(r) for r in voc]


def _classes_and_boxes(record: ImageRecord) -> list[tuple[float, ...]]:
    return [
        (a["category_id"], *BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS))
        for a in record.get("annotations", [])
    ]


def test_json_lists_the_classes_and_numbers_annotations_once(small: Path) -> None:
    content = json.loads((small / "instances_val.json").read_text())
    assert [c["name"] for c in content["categories"]] == list(SHAPES_CLASSES)
    ids = [a["id"] for a in content["annotations"]]
    assert ids == list(range(1, len(ids) + 1))


def test_keypoints_of_the_scenes_come_back_from_the_json(small: Path) -> None:
    records = load_coco_json(str(small / "instances_train.json"), str(small / "JPEGImages"))
    for index, record in enumerate(records):
        scene = draw_scene(np.random.default_rng([1, 0, index]))
        for annotation, obj in zip(record.get("annotations", []), scene.objects, strict=True):
            points = np.reshape(annotation.get("keypoints", []), (-1, 3))
            is_labelled = obj.keypoints[:, 2] > 0
            assert np.array_equal(points[:, 2], obj.keypoints[:, 2])
            assert np.abs(points - obj.keypoints)[is_labelled].max() <= 0.00501


def test_xml_counts_pixels_from_one(small: Path) -> None:
    first = json.loads((small / "instances_train.json").read_text())["annotations"][0]
    box = ET.parse(small / "Annotations" / "train_000000.xml").find("object/bndbox")
    assert box is not None
    x, y, width, height = first["bbox"]
    corners = [float(box.findtext(tag, "")) for tag in ("xmin", "ymin", "xmax", "ymax")]
    assert corners == [x + 1, y + 1, x + width, y + height]


def test_trainval_lists_both_splits(small: Path) -> None:
    lists = {
        s: (small / "ImageSets/Main" / f"{s}.txt").read_text() for s in ("train", "val", "trainval")
    }
    assert lists["trainval"] == lists["train"] + lists["val"]


def test_nothing_is_left_beside_the_folder(small: Path) -> None:
    assert [p.name for p in small.parent.iterdir()] == ["shapes"]


def test_same_set_is_not_written_again(small: Path) -> None:
    before = (small / "shapes.json").stat().st_mtime_ns
    generate_shapes(small, num_train=6, num_val=3, seed=1)
    assert (small / "shapes.json").stat().st_mtime_ns == before


def test_set_with_other_numbers_replaces_the_old_one(tmp_path: Path) -> None:
    folder = generate_shapes(tmp_path / "shapes", num_train=2, num_val=1)
    generate_shapes(folder, num_train=1, num_val=1)
    assert len(list((folder / "JPEGImages").iterdir())) == 2


def test_ensure_keeps_a_set_generated_by_hand(small: Path) -> None:
    before = _hashes(small)
    assert ensure_shapes(small) == small
    assert _hashes(small) == before


def test_ensure_makes_a_set_of_another_version_anew_with_its_numbers(tmp_path: Path) -> None:
    folder = generate_shapes(tmp_path / "shapes", num_train=2, num_val=1, seed=4)
    wanted = _hashes(folder)
    stamp = json.loads((folder / "shapes.json").read_text())
    (folder / "shapes.json").write_text(json.dumps({**stamp, "version": -1}))
    (folder / "JPEGImages" / "train_000000.jpg").unlink()
    ensure_shapes(folder)
    assert _hashes(folder) == wanted


def test_ensure_generates_an_absent_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(files, "generate_shapes", lambda folder, **kwargs: asked.append(folder))
    ensure_shapes(tmp_path / "shapes")
    assert asked == [tmp_path / "shapes"]


def test_two_that_ask_at_once_leave_one_whole_set(tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    threads = [
        threading.Thread(
            target=generate_shapes, args=(folder,), kwargs={"num_train": 2, "num_val": 1}
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [p.name for p in tmp_path.iterdir()] == ["shapes"]
    assert len(list((folder / "JPEGImages").iterdir())) == 3


def test_folder_with_other_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds other files \(shapes.json is missing"):
        ensure_shapes(tmp_path / "shapes")
    assert (tmp_path / "shapes" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param({"num_train": 0}, id="no pictures to train on"),
        pytest.param({"num_val": -1}, id="negative number of pictures"),
        pytest.param({"seed": -1}, id="negative seed"),
    ],
)
def test_number_out_of_range_is_named(numbers: dict[str, int], tmp_path: Path) -> None:
    ((name, value),) = numbers.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        generate_shapes(tmp_path / "shapes", **numbers)


def test_rotated_set_has_boxes_of_five_numbers_and_is_no_other(tmp_path: Path) -> None:
    folder = generate_shapes(tmp_path / "shapes_rotated", num_train=2, num_val=1, rotated=True)
    coco = json.loads((folder / "instances_train.json").read_text())
    assert {len(annotation["bbox"]) for annotation in coco["annotations"]} == {5}
    assert ensure_shapes(folder, rotated=True) == folder
    assert json.loads((folder / "shapes.json").read_text())["num_train"] == 2
    ensure_shapes(folder)
    coco = json.loads((folder / "instances_train.json").read_text())
    assert {len(annotation["bbox"]) for annotation in coco["annotations"]} == {4}
