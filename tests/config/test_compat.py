import pytest

from detkit.config import downgrade_config, get_cfg, upgrade_config
from detkit.utils.errors import ConfigError


def _merged(tmp_path, **files):
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "own.yaml"))
    return cfg


def test_old_weight_tells_version_1_of_the_file_and_its_base(tmp_path, caplog):
    cfg = _merged(
        tmp_path,
        base="MODEL: {RPN: {ANCHOR_SIZES: [[8], [16]], NMS_THRESH: 0.6}}\nTEST: {AUG_FLIP: False}",
        own="_BASE_: base.yaml\nMODEL:\n  WEIGHT: w.pkl\n  ROI_HEADS: {SCORE_THRESH: 0.3}\n",
    )
    assert cfg.MODEL.WEIGHTS == "w.pkl"
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[8], [16]]
    assert cfg.MODEL.RPN.NMS_THRESH == 0.6
    assert cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST == 0.3
    assert (cfg.TEST.AUG.FLIP, cfg.VERSION) == (False, 2)
    assert "own.yaml:3: MODEL.WEIGHT is MODEL.WEIGHTS since version 2" in caplog.text


@pytest.mark.parametrize(
    ("architecture", "sizes"), [("RetinaNet", [[1]]), ("GeneralizedRCNN", [[2]])]
)
def test_anchors_are_those_of_the_model(tmp_path, architecture, sizes):
    cfg = _merged(
        tmp_path,
        own=f"MODEL: {{META_ARCHITECTURE: {architecture}, RETINANET: {{ANCHOR_SIZES: [[1]],"
        " ANCHOR_STRIDES: [8]}, RPN: {ANCHOR_SIZES: [[2]]}}\nVERSION: 1",
    )
    assert sizes == cfg.MODEL.ANCHOR_GENERATOR.SIZES


def test_architecture_of_the_base_decides(tmp_path):
    cfg = _merged(
        tmp_path,
        base="MODEL: {META_ARCHITECTURE: RetinaNet}",
        own="_BASE_: base.yaml\nMODEL: {WEIGHT: w, RETINANET: {ANCHOR_SIZES: [[1]]}}",
    )
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[1]]


def test_version_0_is_read(tmp_path):
    cfg = _merged(tmp_path, own="MODEL: {RPN_HEAD: {NAME: Mine}, WEIGHT: w}\nVERSION: 0")
    assert (cfg.MODEL.RPN.HEAD_NAME, cfg.MODEL.WEIGHTS) == ("Mine", "w")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL: {RPN: {ANCHOR_SIZES: [[8]]}}", "own.yaml:1: unknown config key MODEL.RPN.ANCHOR"),
        ("VERSION: 2\nMODEL: {WEIGHT: w}", "own.yaml:2: unknown config key MODEL.WEIGHT"),
        ("VERSION: 1\nMODEL:\n  WEIGHT: 3", "own.yaml:3: MODEL.WEIGHTS must be a string"),
        ("VERSION: 3", "own.yaml:1: VERSION must be one of 2, got 3"),
    ],
    ids=["no-sign-of-version-1", "version-2", "type", "later-version"],
)
def test_other_files_are_refused_with_their_place(tmp_path, text, message):
    with pytest.raises(Exception, match=message):
        _merged(tmp_path, own=text)


@pytest.mark.parametrize("architecture", ["RetinaNet", "PanopticFPN"])
@pytest.mark.parametrize("version", [0, 1, 2])
def test_config_that_goes_back_and_comes_again_is_the_same(version, architecture):
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.WEIGHTS, cfg.OWN = architecture, "w", 3
    old = downgrade_config(cfg, version)
    assert (old.VERSION, "WEIGHT" in old.MODEL, "OFFSET" in old.MODEL.ANCHOR_GENERATOR) == (
        version,
        version < 2,
        True,
    )
    assert upgrade_config(old) == cfg
    assert cfg.VERSION == 2


def test_steps_of_versions_are_those_between_the_two():
    old = downgrade_config(get_cfg(), 0)
    middle = upgrade_config(old, 1)
    assert middle == downgrade_config(get_cfg(), 1)
    assert "HEAD_NAME" in middle.MODEL.RPN
    assert "RPN_HEAD" in old.MODEL


@pytest.mark.parametrize(
    ("change", "to_version", "message"),
    [
        (upgrade_config, 3, "to_version must be 2 to 2, got 3"),
        (upgrade_config, 1, "to_version must be 2 to 2, got 1"),
        (downgrade_config, -1, "to_version must be 0 to 2, got -1"),
    ],
)
def test_impossible_version_is_an_error(change, to_version, message):
    with pytest.raises(ConfigError, match=message):
        change(get_cfg(), to_version)
