"""What is counted in data sets, and what is said of it."""

import pytest

from detkit.data import DatasetCatalog, MetadataCatalog, count_images_per_class
from detkit.data.data_report import DataReport


def rows(report):
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in report.table().splitlines()
    ]
    return {name: int(number) for name, number in cells[2:]}


def test_what_is_used_and_what_is_left_out_add_up():
    report = DataReport(["a", "b"], num_images=10, num_annotations=50, num_crowd=3)
    report.dropped_images.update({"without objects": 2, "few keypoints": 1})
    report.add_boxes("not finite", ["annotation 4 of x.jpg", "annotation 5 of x.jpg"])
    report.add_boxes("without area", [])
    report.add_boxes("not finite", ["annotation 9 of y.jpg"])
    assert rows(report) == {
        "images": 10,
        "- left out: without objects": 2,
        "- left out: few keypoints": 1,
        "images used": 7,
        "annotations": 50,
        "- left out: not finite": 3,
        "- regions of crowds, not trained on": 3,
        "objects": 44,
    }


def test_of_nothing_nothing_is_left_out():
    assert rows(DataReport(["a"])) == {
        "images": 0,
        "images used": 0,
        "annotations": 0,
        "objects": 0,
    }


@pytest.fixture
def datasets():
    """Two data sets; the images of the first hold the classes 0 0 2, 2, none and none annotated."""
    objects = [[0, 0, 2], [2], []]
    records = [
        {"file_name": "x", "annotations": [{"category_id": k} for k in classes]}
        for classes in objects
    ]
    DatasetCatalog.register("counted_a", lambda: [*records, {"file_name": "y"}])
    DatasetCatalog.register("counted_b", lambda: records[:1])
    yield
    for name in ("counted_a", "counted_b"):
        DatasetCatalog.remove(name)
        MetadataCatalog.get(name)
        MetadataCatalog.remove(name)


def test_an_image_counts_once_for_each_class(datasets):
    assert count_images_per_class(["counted_a"], 4) == [1, 0, 2, 0]


def test_data_sets_add_up(datasets):
    assert count_images_per_class(["counted_a", "counted_b"], 3) == [2, 0, 3]


def test_counts_of_the_metadata_win(datasets):
    known = [{"id": 7, "image_count": 30}, {"id": 3, "image_count": 10}]
    MetadataCatalog.get("counted_b").set(class_image_count=known)
    assert count_images_per_class(["counted_b"], 2) == [10, 30]
    for num_classes in (1, 3):
        message = f"class_image_count of data set 'counted_b' has 2 classes, .* is {num_classes}"
        with pytest.raises(ValueError, match=message):
            count_images_per_class(["counted_b"], num_classes)
