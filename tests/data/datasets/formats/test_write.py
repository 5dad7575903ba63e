"""What each format cannot hold is counted; what it can comes back."""

import pytest

from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.data.datasets.formats.write import write_dataset
from detkit.structures import BoxMode
from detkit.utils.errors import DataError

MASK = [[2, 3, 12, 3, 12, 15]]
RUNS = {"size": [24, 33], "counts": [24, 4, 764]}


def _object(**further):
    box = {"bbox": [2, 3, 12, 15], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 0}
    return {**box, **further}


@pytest.mark.parametrize(
    ("target", "annotation", "lost"),
    [
        pytest.param("coco", _object(segmentation=RUNS, difficult=1), [], id="coco"),
        pytest.param("voc", _object(difficult=1), [], id="voc-difficult"),
        pytest.param("voc", _object(segmentation=MASK), ["masks"], id="voc-mask"),
        pytest.param("voc", _object(keypoints=[1, 2, 2]), ["objects' keypoints"], id="voc-points"),
        pytest.param("yolo", _object(difficult=1), ["difficult flags"], id="yolo-difficult"),
        pytest.param("yolo", _object(segmentation=MASK), [], id="yolo-mask"),
        pytest.param("yolo", _object(segmentation=RUNS), ["masks that are no polygons"], id="runs"),
        pytest.param(
            "yolo",
            _object(segmentation=[[2, 3, 7, 3, 7, 15]]),
            ["boxes, replaced by the hull of their mask"],
            id="yolo-hull",
        ),
    ],
)  # fmt: skip
def test_what_is_lost_is_counted(target, annotation, lost, toy_records, register, tmp_path):
    toy_records[0]["annotations"] = [annotation]
    name = register(toy_records)
    assert write_dataset(name, toy_records, str(tmp_path / "out"), target, "x")[1] == dict.fromkeys(
        lost, 1
    )


def test_groups_are_left_out(toy_records, register, tmp_path, declare):
    toy_records[0]["annotations"] = [_object(iscrowd=1), _object()]
    entry, lost = write_dataset(
        register(toy_records), toy_records, str(tmp_path / "out"), "yolo", "x"
    )
    assert lost == {"groups of objects (iscrowd), left out": 1}
    assert len(DatasetCatalog.get(declare(entry))[0]["annotations"]) == 1


def test_masks_of_several_polygons_keep_their_area(toy_records, register, tmp_path, declare):
    polygons = [[2, 3, 6, 3, 6, 9, 2, 9], [8, 3, 12, 3, 12, 15], [9, 14, 10, 14, 10, 15]]
    toy_records[0]["annotations"] = [_object(segmentation=polygons)]
    entry, lost = write_dataset(
        register(toy_records), toy_records, str(tmp_path / "out"), "yolo", "x"
    )
    assert list(lost.values()) == [1]
    (found,) = DatasetCatalog.get(declare(entry))[0]["annotations"]
    (path,) = found["segmentation"]
    xs, ys = path[::2], path[1::2]
    area = sum(xs[k - 1] * ys[k] - xs[k] * ys[k - 1] for k in range(len(xs))) / 2
    assert area == pytest.approx(24 + 24 + 0.5)


def test_rotated_boxes_come_back(toy_records, register, tmp_path, declare):
    box = [15.0, 12.0, 8.0, 4.0, 30.0]
    rotated = {**_object(), "bbox": box, "bbox_mode": BoxMode.XYWHA_ABS}
    toy_records[0]["annotations"], toy_records[1]["annotations"] = [rotated], []
    name = register(toy_records)
    _, lost = write_dataset(name, toy_records, str(tmp_path / "yolo"), "yolo", "x")
    assert not lost
    entry = {"images": str(tmp_path / "yolo/images"), "annotations": str(tmp_path / "yolo/labels")}
    name = declare({"format": "yolo_obb", "classes": ["cat", "dog"], **entry})
    assert DatasetCatalog.get(name)[0]["annotations"][0]["bbox"] == pytest.approx(box)
    _, lost = write_dataset(name, toy_records, str(tmp_path / "voc"), "voc", "x")
    assert lost == {"angles": 1}


def test_keypoints_come_back(toy_records, register, tmp_path, declare):
    points = [3.5, 4.5, 2, 0, 0, 0, 8.5, 9.5, 1]
    toy_records[0]["annotations"] = [_object(keypoints=points)]
    names = {"keypoint_names": ["nose", "left", "right"], "keypoint_flip_map": [("left", "right")]}
    entry, _ = write_dataset(
        register(toy_records, **names), toy_records, str(tmp_path / "out"), "yolo", "x"
    )
    name = declare(entry)
    found = DatasetCatalog.get(name)[0]["annotations"][0]["keypoints"]
    labelled = [v for k, v in enumerate(found) if k not in (3, 4)]
    assert labelled == pytest.approx([3.5, 4.5, 2, 0, 8.5, 9.5, 1])
    assert MetadataCatalog.get(name).keypoint_names == ["nose", "left", "right"]
    assert "flip_idx:\n- 0\n- 2\n- 1" in (tmp_path / "out" / "data.yaml").read_text()


def test_names_that_differ_in_their_ending_are_refused(toy_records, register, tmp_path):
    images = tmp_path / "images"
    (images / "b.png").rename(images / "a.jpg")
    toy_records[1]["file_name"] = str(images / "a.jpg")
    with pytest.raises(DataError, match=r"a.png and .*a.jpg would both be"):
        write_dataset(register(toy_records), toy_records, str(tmp_path / "out"), "voc", "x")
    assert not (tmp_path / "out").exists()
