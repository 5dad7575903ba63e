"""What a checkpoint records of classes and settings."""

from contextlib import nullcontext

import pytest

from detkit.config import get_cfg
from detkit.data import MetadataCatalog
from detkit.engine.checkpoint_records import (
    ConfigRecord,
    changed_settings,
    class_metadata,
    expect_classes_of_checkpoint,
    require_classes_of_checkpoint,
)
from detkit.utils.errors import ConfigError


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


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        pytest.param({"dataset": "train", "thing_classes": ["a", "b"]}, ["a", "b"], id="own"),
        pytest.param({"thing_classes": ["a", "b"]}, None, id="published"),
        pytest.param({"dataset": "train"}, None, id="no-names"),
        pytest.param(None, None, id="none"),
    ],
)
def test_test_sets_match_the_classes_of_an_own_checkpoint(streets, metadata, expected):
    cfg = get_cfg()
    cfg.DATASETS.TEST = (streets,)
    expect_classes_of_checkpoint(cfg, metadata)
    assert MetadataCatalog.get(streets).get("model_classes") == expected


def test_test_sets_get_the_stuff_classes_and_keypoints_of_an_own_checkpoint(streets):
    cfg = get_cfg()
    cfg.DATASETS.TEST = (streets,)
    record = {"dataset": "train", "stuff_classes": ["sky", "road"], "keypoint_names": ("nose",)}
    expect_classes_of_checkpoint(cfg, record)
    metadata = MetadataCatalog.get(streets)
    assert metadata.model_stuff_classes == ["sky", "road"]
    assert metadata.model_keypoints == ["nose"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        pytest.param({"stuff_classes": ["sky"]}, r"other stuff classes.*'sky'.*'road'", id="stuff"),
        pytest.param(
            {"thing_classes": ["b", "a"]}, "other thing classes, or in another", id="order"
        ),
        pytest.param({"stuff_classes": ("road",), "thing_classes": ("a", "b")}, None, id="same"),
        pytest.param({"keypoint_names": ["nose"]}, None, id="not-known-now"),
    ],
)
def test_run_goes_on_with_its_classes_only(streets, record, message):
    MetadataCatalog.get(streets).thing_classes = ["a", "b"]
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (streets,)
    expected = nullcontext() if message is None else pytest.raises(ConfigError, match=message)
    with expected:
        require_classes_of_checkpoint(cfg, {"dataset": "x", **record})


def test_without_data_sets_nothing_is_known():
    assert class_metadata([]) == {}


def test_same_settings_say_nothing(caplog):
    ConfigRecord(get_cfg()).load_state_dict(ConfigRecord(get_cfg()).state_dict())
    assert caplog.text == ""


def test_each_change_is_named_with_both_values(caplog):
    cfg = get_cfg()
    before = ConfigRecord(cfg).state_dict()
    cfg.SOLVER.BASE_LR = 0.5
    cfg.SOLVER.STEPS = (7, 9)
    cfg.MODEL.CUSTOM.WIDTH = 3
    ConfigRecord(cfg).load_state_dict(before)
    lines = caplog.messages[0].splitlines()
    assert "settings changed since the checkpoint was written" in lines[0]
    assert lines[1:] == [
        "MODEL.CUSTOM: {} -> (not there)",
        "MODEL.CUSTOM.WIDTH: (not there) -> 3",
        "SOLVER.BASE_LR: 0.001 -> 0.5",
        "SOLVER.STEPS: [30000] -> [7, 9]",
    ]


def test_key_that_is_gone_is_named():
    assert changed_settings("A: {B: 1, C: 2}", "A: {B: 1}") == ["A.C: 2 -> (not there)"]


@pytest.mark.parametrize("record", ["A: [", "A: &a [*a]", 7])
def test_record_that_is_no_config_is_refused(record):
    with pytest.raises(ConfigError, match="the config in the checkpoint"):
        ConfigRecord(get_cfg()).load_state_dict(record)
