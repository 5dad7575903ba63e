from detkit.config import get_cfg
from detkit.engine.config_record import ConfigRecord, changed_settings


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
