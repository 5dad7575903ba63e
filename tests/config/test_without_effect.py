import pytest

from detkit.config import get_cfg, settings_without_effect
from detkit.config.without_effect import _LOOKED_AT_WITH


def test_defaults_are_no_settings():
    assert settings_without_effect(get_cfg()) == {}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param(
            ["SOLVER.OPTIMIZER", "AdamW", "SOLVER.NESTEROV", True, "SOLVER.ADAMW.EPS", 1e-6],
            {"SOLVER.NESTEROV": "SOLVER.OPTIMIZER is 'AdamW'"},
            id="one of several values",
        ),
        pytest.param(["SOLVER.NESTEROV", True], {}, id="looked at"),
        pytest.param(
            ["TEST.COMPUTE_LOSS", True, "TEST.EVAL_PERIOD", "2ep"],
            {"TEST.COMPUTE_LOSS": "DATASETS.TEST is ()", "TEST.EVAL_PERIOD": "DATASETS.TEST is ()"},
            id="nothing there",
        ),
        pytest.param(["TEST.COMPUTE_LOSS", True, "DATASETS.TEST", ["a"]], {}, id="something there"),
        pytest.param(
            ["INPUT.CROP.SIZE", [0.5, 0.5]],
            {"INPUT.CROP.SIZE": "INPUT.CROP.ENABLED is False"},
            id="switched off",
        ),
        pytest.param(
            ["INPUT.CROP.SIZE", [0.5, 0.5], "INPUT.CROP.ENABLED", True], {}, id="switched on"
        ),
    ],
)
def test_what_is_set_to_no_effect_is_named(settings, expected):
    cfg = get_cfg()
    cfg.merge_from_list(settings)
    assert settings_without_effect(cfg) == expected


def test_every_key_is_one_and_has_a_legal_decision():
    cfg = get_cfg()
    keys = [key for group in _LOOKED_AT_WITH for key in group]
    assert len(keys) == len(set(keys)) > 30
    for key in keys:
        cfg.get_by_full_key(key)
    for decider, values in _LOOKED_AT_WITH.values():
        for value in values:
            cfg.merge_from_list([decider, value])


@pytest.mark.parametrize(
    "name",
    [
        "COCO-Detection/fast_rcnn_R_50_FPN_1x",
        "Misc/mask_rcnn_R_50_FPN_3x_syncbn",
        "LVISv1-InstanceSegmentation/mask_rcnn_R_50_FPN_1x",
    ],
)
def test_config_of_the_zoo_sets_nothing_to_no_effect(name):
    cfg = get_cfg()
    cfg.merge_from_file(f"detkit://{name}.yaml")
    assert settings_without_effect(cfg) == {}
