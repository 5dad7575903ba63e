"""Tests of detkit.data.class_counts."""

import pytest

from detkit.data import DatasetCatalog, MetadataCatalog, count_images_per_class


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
