import pytest

from detkit.data import MetadataCatalog
from detkit.data.datasets import load_coco_json


def test_classes_are_noted(write_coco):
    load_coco_json(*write_coco(), dataset_name="mine")
    metadata = MetadataCatalog.get("mine")
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1}
    assert len(metadata.thing_colors) == 2


def test_other_classes_than_noted_list_expected_and_found(write_coco):
    MetadataCatalog.get("mine").set(thing_classes=["dog", "cat"])
    with pytest.raises(ValueError, match=r"not those noted for data set 'mine'. Expected: dog, cat. Found: cat, dog"):
        load_coco_json(*write_coco(), dataset_name="mine")
