from pathlib import Path

import pytest

from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.engine.derived_config import in_folder, with_class_counts, without_augmentation

COUNTS = [{"id": 1, "image_count": 3}, {"id": 2, "image_count": 1}]


@pytest.fixture
def rare_things():
    """A data set of two classes, of which the second stands in one of three pictures."""
    DatasetCatalog.register("rare_things", list)
    MetadataCatalog.get("rare_things").set(thing_classes=["dog", "okapi"], class_image_count=COUNTS)
    yield "rare_things"
    DatasetCatalog.remove("rare_things")
    MetadataCatalog.remove("rare_things")


def test_class_counts_come_from_the_training_data(tiny_cfg, rare_things):
    tiny_cfg.DATASETS.TRAIN = (rare_things,)
    tiny_cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS = True
    assert list(with_class_counts(tiny_cfg).MODEL.ROI_BOX_HEAD.FED_LOSS_CLASS_COUNTS) == [3, 1]
    assert list(tiny_cfg.MODEL.ROI_BOX_HEAD.FED_LOSS_CLASS_COUNTS) == []


@pytest.mark.parametrize(("is_on", "given"), [(False, []), (True, [1, 9])])
def test_class_counts_that_nobody_asks_for_are_not_looked_up(tiny_cfg, is_on, given):
    tiny_cfg.DATASETS.TRAIN = ("not there",)
    tiny_cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS = is_on
    tiny_cfg.MODEL.ROI_BOX_HEAD.FED_LOSS_CLASS_COUNTS = given
    assert with_class_counts(tiny_cfg) is tiny_cfg


def test_evaluation_on_the_way_goes_without_augmentation(tiny_cfg):
    assert without_augmentation(tiny_cfg) is tiny_cfg
    tiny_cfg.TEST.AUG.ENABLED = True
    tiny_cfg.freeze()
    assert not without_augmentation(tiny_cfg).TEST.AUG.ENABLED
    assert tiny_cfg.TEST.AUG.ENABLED


def test_folder_lies_within_the_output_directory(tiny_cfg):
    tiny_cfg.freeze()
    assert Path(in_folder(tiny_cfg, "TTA").OUTPUT_DIR) == Path(tiny_cfg.OUTPUT_DIR) / "TTA"
