import pytest

from detkit.data import MetadataCatalog
from detkit.engine.class_metadata import class_metadata


@pytest.fixture
def streets():
    MetadataCatalog.get("streets").set(
        stuff_classes=["road"], ignore_label=255, sem_seg_root="labels"
    )
    yield "streets"
    MetadataCatalog.remove("streets")


def test_first_data_set_says_what_is_known_of_the_classes_alone(streets):
    assert class_metadata([streets, "other"]) == {
        "dataset": "streets",
        "stuff_classes": ["road"],
        "ignore_label": 255,
    }


def test_without_data_sets_nothing_is_known():
    assert class_metadata([]) == {}
