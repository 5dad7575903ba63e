import copy
import pickle
import time

import fvcore.common.config
import numpy as np
import pytest
import yacs.config
import yaml

from detkit.config import CfgNode, ConfigKeyError, get_cfg
from detkit.config.cfg_node import coerce, strict_values
from detkit.utils.errors import ConfigError


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_file_overrides_default_and_leaves_the_rest(cfg, tmp_path):
    cfg.merge_from_file(write(tmp_path, "a.yaml", "SOLVER:\n  BASE_LR: 0.5\n"))
    assert cfg.SOLVER.BASE_LR == 0.5
    assert cfg.SOLVER.MAX_ITER == 40000


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        pytest.param("SOLVER:\n  BASE_LRR: 1\n", ConfigKeyError, r"a\.yaml:2: unknown config key SOLVER\.BASE_LRR\. Did you mean 'SOLVER\.BASE_LR'", id="misspelt-key"),
        pytest.param("RPN:\n  NMS_THRESH: 0.5\n", ConfigKeyError, r"a\.yaml:2: unknown config key RPN\.NMS_THRESH\. Did you mean 'MODEL\.RPN\.NMS_THRESH'", id="lost-parent"),
        pytest.param("MODELL:\n  DEVICE: cpu\n  WEIGHTS: x\n", ConfigKeyError, r"a\.yaml:1: unknown config key MODELL\. Did you mean 'MODEL'", id="misspelt-group"),
        pytest.param("SOLVER:\n  MAX_ITER: many\n", ValueError, r"a\.yaml:2: SOLVER\.MAX_ITER must be an int, such as 40000; got 'many'", id="wrong-type"),
        pytest.param("SOLVER:\n  MAX_ITER: 0.5\n", ValueError, r"a\.yaml:2: SOLVER\.MAX_ITER must be", id="float-for-int"),
        pytest.param("MODEL:\n  MASK_ON: 1\n", ValueError, r"a\.yaml:2: MODEL\.MASK_ON must be a bool", id="int-for-bool"),
        pytest.param("DATASETS:\n  TRAIN: mine\n", ValueError, r"DATASETS\.TRAIN must be a list.*Write \['mine'\]", id="text-for-list"),
        pytest.param("INPUT:\n  FORMAT: rgb\n", ValueError, r"a\.yaml:2: INPUT\.FORMAT must be one of 'BGR', .*'RAW', got 'rgb'\. Did you mean 'RGB'", id="bad-choice"),
        pytest.param("SOLVER:\n  BASE_LR: -1.0\n", ValueError, r"SOLVER\.BASE_LR must be at least 0, got -1", id="below-minimum"),
        pytest.param("SOLVER:\n  BASE_LR: .inf\n", ValueError, r"a\.yaml:2: SOLVER\.BASE_LR must be a finite number, got inf", id="infinite"),
        pytest.param("INPUT:\n  MIN_SIZE_TRAIN: [.nan]\n", ValueError, r"MIN_SIZE_TRAIN must be a finite number", id="not-a-number-in-a-list"),
        pytest.param("SEED: 9223372036854775808\n", ValueError, r"a\.yaml:1: SEED must be below 2\*\*63", id="integer-of-64-bits"),
        pytest.param("SOLVER.BASE_LR: 1\n", ConfigKeyError, r"a\.yaml:1: SOLVER\.BASE_LR is a key of a group in a YAML file: SOLVER: \{BASE_LR: \.\.\.\}", id="dotted-key"),
        pytest.param("MODEL: {CUSTOM: {a: '{1: 2}'}}\n", ValueError, r"MODEL\.CUSTOM\.a must have texts as keys, got 1", id="key-of-a-literal"),
        pytest.param("SOLVER: 3\n", ValueError, r"a\.yaml:1: SOLVER is a group of keys", id="value-for-group"),
        pytest.param("- 1\n- 2\n", ValueError, r"a\.yaml must hold a mapping", id="list-at-top"),
        pytest.param("_BASE_: 3\n", ValueError, r"a\.yaml:1: _BASE_ must be a path or a list of paths, got 3", id="bad-base"),
    ],
)  # fmt: skip
def test_bad_file_is_refused_with_place_and_reason(cfg, tmp_path, text, error, message):
    path = write(tmp_path, "a.yaml", text)
    with strict_values(), pytest.raises(error, match=message):
        cfg.merge_from_file(path)


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ("INPUT: {FORMAT: rgbd}", "INPUT.FORMAT", "INPUT.FORMAT must be one of 'BGR'"),
        ("SOLVER: {BASE_LR: -1.0}", "SOLVER.BASE_LR", "SOLVER.BASE_LR must be at least 0"),
    ],
    ids=["name", "number"],
)
def test_value_of_a_key_of_detectron2_that_detkit_has_no_use_for_is_merged_with_a_warning(
    cfg, tmp_path, caplog, text, key, message
):
    cfg.merge_from_file(write(tmp_path, "a.yaml", text))
    assert cfg.get_by_full_key(key) in ("rgbd", -1.0)
    assert f"a.yaml:1: {message}" in caplog.text


@pytest.mark.parametrize("setting", [("SOLVER.OPTIMIZER", "Lamb"), ("VERSION", 3)])
def test_value_that_no_code_has_a_meaning_for_is_refused(cfg, setting):
    with pytest.raises(ConfigError, match="must be one of"):
        cfg.merge_from_list(setting)


def test_odd_list_is_refused(cfg):
    with pytest.raises(ValueError, match="come in pairs KEY VALUE, got 1 words"):
        cfg.merge_from_list(["SEED"])


def test_unknown_key_on_the_command_line_has_near_misses(cfg):
    with pytest.raises(
        ConfigKeyError,
        match=r"unknown config key MODEL\.BACKBON\.NAME\. Did you mean 'MODEL\.BACKBONE\.NAME'",
    ):
        cfg.merge_from_list(["MODEL.BACKBON.NAME", "x"])


def test_reading_a_misspelt_key_has_near_misses(cfg):
    with pytest.raises(
        AttributeError, match="no config key 'WIEGHTS' here. Did you mean 'WEIGHTS'"
    ):
        _ = cfg.MODEL.WIEGHTS


def test_keys_of_the_user_are_free_below_custom(cfg, tmp_path):
    cfg.merge_from_file(
        write(tmp_path, "a.yaml", "MODEL:\n  CUSTOM:\n    WIDTH: 3\n    DEEP:\n      NAME: x\n")
    )
    cfg.merge_from_list(["MODEL.CUSTOM.DEEP.ALPHA", "0.5"])
    assert (cfg.MODEL.CUSTOM.WIDTH, cfg.MODEL.CUSTOM.DEEP.NAME, cfg.MODEL.CUSTOM.DEEP.ALPHA) == (
        3,
        "x",
        0.5,
    )


def test_dump_and_merge_give_the_same_tree(cfg, tmp_path):
    cfg.merge_from_list(["SOLVER.STEPS", (5, 6), "MODEL.CUSTOM.A", 1])
    again = get_cfg()
    again.merge_from_file(write(tmp_path, "dump.yaml", cfg.dump()))
    assert again == cfg
    assert yaml.safe_load(cfg.dump())["SOLVER"]["STEPS"] == [5, 6]


def test_set_keys_are_told_from_defaults(cfg, tmp_path):
    file = tmp_path / "base.yaml"
    file.write_text("MODEL: {PIXEL_STD: [1.0, 1.0, 1.0], CUSTOM: {WIDTH: 3}}\n")
    cfg.merge_from_file(str(file))
    cfg.merge_from_list(["SEED", "-1"])
    cfg.MODEL.MASK_ON = False
    keys = [
        "MODEL.PIXEL_STD",
        "MODEL.CUSTOM.WIDTH",
        "SEED",
        "MODEL.MASK_ON",
        "MODEL.PIXEL_MEAN",
        "INPUT.FORMAT",
    ]
    for tree in (cfg, copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg))):
        assert [tree.is_set(key) for key in keys] == [True, True, True, True, False, False]
    with pytest.raises(ConfigKeyError, match="Did you mean 'MODEL.PIXEL_STD'"):
        cfg.is_set("MODEL.PIXEL_STDS")


def test_frozen_tree_cannot_be_changed(cfg):
    cfg.freeze()
    with pytest.raises(AttributeError, match="frozen"):
        cfg.merge_from_list(["SEED", 1])
    with pytest.raises(AttributeError, match="immutable"):
        cfg.SEED = 1
    cfg.defrost()
    cfg.SEED = 1
    assert cfg.SEED == 1


@pytest.mark.parametrize(
    "copied",
    [CfgNode.clone, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))],
    ids=["clone", "deepcopy", "pickle"],
)
def test_copy_is_independent_and_still_checks_values(cfg, copied):
    other = copied(cfg)
    other.MODEL.RESNETS.OUT_FEATURES.append("res5")
    assert cfg.MODEL.RESNETS.OUT_FEATURES == ["res4"]
    with strict_values(), pytest.raises(ValueError, match="INPUT.FORMAT must be one of"):
        other.merge_from_list(["INPUT.FORMAT", "X"])


def test_merging_another_tree_checks_it_too(cfg):
    with pytest.raises(ConfigKeyError, match="unknown config key NOPE"):
        cfg.merge_from_other_cfg(CfgNode({"NOPE": 1}))


# --- types of values ---


def test_list_reads_python_literals(cfg):
    cfg.merge_from_list(
        [
            "SOLVER.STEPS",
            "(1, 2)",
            "MODEL.MASK_ON",
            "True",
            "SOLVER.BASE_LR",
            "1e-3",
            "OUTPUT_DIR",
            "out",
        ]
    )
    assert (cfg.SOLVER.STEPS, cfg.MODEL.MASK_ON, cfg.SOLVER.BASE_LR, cfg.OUTPUT_DIR) == (
        (1, 2),
        True,
        1e-3,
        "out",
    )


def test_whole_number_serves_as_float(cfg):
    cfg.merge_from_list(["SOLVER.BASE_LR", "1"])
    assert isinstance(cfg.SOLVER.BASE_LR, float)


def test_literal_dict_below_custom_is_a_group(cfg):
    cfg.merge_from_list(["MODEL.CUSTOM.head", "{'dim': 64, 'names': ['a']}"])
    assert cfg.MODEL.CUSTOM.head.dim == 64


@pytest.mark.parametrize("text", ["1e999", "[[8, 1e999]]"])
def test_infinite_number_on_the_command_line_is_refused(cfg, text):
    key = "SOLVER.BASE_LR" if text[0] == "1" else "MODEL.ANCHOR_GENERATOR.SIZES"
    with pytest.raises(ConfigError, match="must be a finite number, got .*inf"):
        cfg.merge_from_list([key, text])


def test_megabytes_of_text_are_not_parsed_as_a_literal(cfg):
    text = "1" + "+1" * 2**20
    start = time.perf_counter()
    cfg.merge_from_list(["OUTPUT_DIR", text])
    assert text == cfg.OUTPUT_DIR
    assert time.perf_counter() - start < 1


def test_text_stays_text_where_text_is_expected(cfg):
    cfg.merge_from_list(["MODEL.WEIGHTS", "123", "OUTPUT_DIR", "(1)"])
    assert (cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR) == ("123", "(1)")


def test_list_keeps_the_type_of_the_default(cfg):
    cfg.merge_from_list(["DATASETS.TRAIN", ["a"], "MODEL.PIXEL_STD", (1.0, 2.0, 3.0)])
    assert cfg.DATASETS.TRAIN == ("a",)
    assert cfg.MODEL.PIXEL_STD == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("value", "present", "expected"),
    [
        pytest.param(3, None, 3, id="number for none"),
        pytest.param("x", None, "x", id="text for none"),
        pytest.param(None, 3, None, id="none for a number"),
        pytest.param([1, 2], (), (1, 2), id="list for a tuple"),
        pytest.param([[1]], [(0,)], [(1,)], id="nested"),
    ],
)
def test_value_comes_in_the_type_of_the_setting(value, present, expected):
    coerced = coerce(value, present, "K")
    assert (coerced, type(coerced)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("value", "present", "message"),
    [
        pytest.param(
            True,
            1,
            "f:1: K must be an int, such as 1; got True, of type bool",
            id="truth value for a number",
        ),
        pytest.param(1, True, "K must be a bool", id="number for a truth value"),
        pytest.param(True, 1.0, "K must be a float", id="truth value for a float"),
        pytest.param(1, "text", "K must be a string", id="number for text"),
        pytest.param(
            3,
            (1, 2),
            r"K must be a list, such as \(1, 2\); got 3, .* Write \[3\]",
            id="number for a list",
        ),
        pytest.param(
            [print],
            [1],
            r"K must be a plain value, got <built-in function print>",
            id="function",
        ),
    ],
)
def test_value_of_another_type_is_an_error(value, present, message):
    with pytest.raises(ValueError, match=message):
        coerce(value, present, "f:1: K")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("SOLVER.BASE_LR", "1" + "0" * 400, r"SOLVER\.BASE_LR must be a number below 1e308"),
        ("SOLVER.MAX_ITER", "0x" + "f" * 5000, r"SOLVER\.MAX_ITER must be .*int"),
        ("SOLVER.STEPS", "[0x" + "f" * 5000 + "]", r"SOLVER\.STEPS must be a list"),
    ],
)
def test_integer_of_hundreds_of_digits_is_refused(cfg, key, value, message):
    with pytest.raises(ConfigError, match=message):
        cfg.merge_from_list([key, value])


@pytest.mark.parametrize("text", ["[console,wandb]", "[console, wandb]", "(console,wandb,)"])
def test_list_whose_quotes_the_shell_has_taken_is_read(cfg, text):
    cfg.merge_from_list(["WRITERS", text])
    assert list(cfg.WRITERS) == ["console", "wandb"]


def test_advice_for_a_list_without_brackets_is_a_list(cfg):
    with pytest.raises(ConfigError, match=r"Write \['console', 'wandb'\]"):
        cfg.merge_from_list(["WRITERS", "console,wandb"])


def test_config_that_code_has_extended_may_name_what_detkit_does_not_know(tmp_path, caplog):
    file = tmp_path / "a.yaml"
    file.write_text(
        "SOLVER: {LR_SCHEDULER_NAME: OwnSchedule}\nMODEL: {RPN: {IN_FEATURES: !!python/tuple [p2]}}"
    )
    cfg = get_cfg()
    cfg.MODEL.CUSTOM.SIZE = 3  # a group that is open to all says nothing
    for tree in (get_cfg(), cfg):
        with strict_values(), pytest.raises(ConfigError, match="SCHEDULER_NAME must be one of"):
            tree.merge_from_file(str(file))
    cfg.SOLVER.POWER = 0.9
    with strict_values():
        cfg.merge_from_file(str(file))
    assert cfg.SOLVER.LR_SCHEDULER_NAME == "OwnSchedule"
    assert list(cfg.MODEL.RPN.IN_FEATURES) == ["p2"]
    assert "it is left to code of yours" in caplog.text


def test_keys_that_a_project_has_given_up_are_skipped_or_named_anew(cfg, tmp_path, caplog):
    cfg.register_deprecated_key("MODEL.OLD")
    cfg.register_renamed_key("MODEL.FORMER", "MODEL.WEIGHTS")
    cfg.merge_from_file(write(tmp_path, "a.yaml", "MODEL: {OLD: {A: 1}, WEIGHTS: w}\n"))
    cfg.merge_from_list(["MODEL.OLD", 2])
    assert (cfg.MODEL.WEIGHTS, "OLD" in cfg.MODEL) == ("w", False)
    assert "Deprecated config key (ignoring): MODEL.OLD" in caplog.text
    with pytest.raises(KeyError, match="Key MODEL.FORMER was renamed to MODEL.WEIGHTS"):
        cfg.clone().merge_from_list(["MODEL.FORMER", "w"])


def test_values_of_detkits_own_keys_are_left_to_code_that_adds_keys(cfg):
    with pytest.raises(ConfigError, match="SOLVER.OPTIMIZER must be one of"):
        cfg.merge_from_list(["SOLVER.OPTIMIZER", "ADAM"])
    cfg.SOLVER.POWER = 0.9
    cfg.merge_from_list(["SOLVER.OPTIMIZER", "ADAM"])
    assert cfg.SOLVER.OPTIMIZER == "ADAM"


@pytest.mark.parametrize("kind", [yacs.config.CfgNode, fvcore.common.config.CfgNode])
def test_nodes_of_other_packages_are_merged_into(kind):
    cfg = get_cfg()
    cfg.MODEL.MINE = kind({"SUB": kind({"A": 1})})
    cfg.MODEL.MINE.B = 2
    cfg.merge_from_list(["MODEL.MINE.SUB.A", "3", "MODEL.MINE.B", 4])
    assert (cfg.MODEL.MINE.SUB.A, cfg.MODEL.MINE.B) == (3, 4)
    with pytest.raises(ConfigKeyError, match="MODEL.MINE.C"):
        cfg.merge_from_list(["MODEL.MINE.C", 1])


@pytest.mark.parametrize("kind", [CfgNode, yacs.config.CfgNode])
def test_group_that_a_script_replaces_keeps_the_keys_that_only_detkit_has(cfg, kind):
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 0.5
    cfg.INPUT.CROP = kind({"ENABLED": True, "TYPE": "relative"})
    cfg.SOLVER.AMP = kind()
    cfg.SOLVER.AMP = kind({"ENABLED": True, "DTYPE": "fp16"})
    assert cfg.INPUT.CROP == {
        "ENABLED": True,
        "TYPE": "relative",
        "SINGLE_CATEGORY_MAX_AREA": 1.0,
    }
    assert cfg.SOLVER.AMP == {"ENABLED": True, "DTYPE": "fp16"}
    assert get_cfg().INPUT.CROP.SIZE == [0.9, 0.9]
    cfg.TEST = kind({"DETECTIONS_PER_IMAGE": 7})
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 7
    assert cfg.TEST.AMP == get_cfg().TEST.AMP  # a group that is detkit's in whole
    assert "AUG" not in cfg.TEST
    # Of a name that only detkit has, the whole group is the project's.
    cfg.MODEL.FCOS = kind({"NMS_TH": 0.6})
    assert cfg.MODEL.FCOS == {"NMS_TH": 0.6}


def test_replaced_group_shares_nothing_with_the_defaults(cfg):
    cfg.MODEL.RESNETS = CfgNode()
    cfg.MODEL.RESNETS.STRIDE_PER_STAGE.append(9)
    assert 9 not in get_cfg().MODEL.RESNETS.STRIDE_PER_STAGE
    cfg.MODEL.RESNETS = CfgNode()
    assert 9 not in cfg.MODEL.RESNETS.STRIDE_PER_STAGE
    for _ in range(2):
        cfg.TEST.AMP.DTYPE = "fp16"
        cfg.TEST = CfgNode()
        assert cfg.TEST.AMP.DTYPE == get_cfg().TEST.AMP.DTYPE == "bf16"


def test_numbers_of_numpy_become_those_of_python(cfg, tmp_path):
    # As scripts compute them; Detectron2 takes them as long as nothing writes the config.
    cfg.SOLVER.BASE_LR = np.float64(0.5)
    cfg.SOLVER.STEPS = (np.int64(7), 8)
    cfg.MODEL.PIXEL_MEAN = np.array([1.0, 2.0, 3.0])
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[np.float32(2)], list(np.arange(2))]
    cfg.MODEL.MASK_ON = np.bool_(True)
    again = get_cfg()
    again.merge_from_text(cfg.dump(), "dump")
    assert again == cfg
    assert (cfg.SOLVER.STEPS, cfg.MODEL.PIXEL_MEAN) == ((7, 8), [1, 2, 3])
    assert (cfg.MODEL.ANCHOR_GENERATOR.SIZES, cfg.MODEL.MASK_ON) == ([[2], [0, 1]], True)
    names = cfg.DATASETS.TRAIN = ["a"]
    names.append("b")
    assert cfg.DATASETS.TRAIN == ["a", "b"]


def test_file_and_its_bases_as_nested_dicts(tmp_path):
    (tmp_path / "base.yaml").write_text("A: {B: 1, C: [1, 2]}\nD: 3\n")
    (tmp_path / "own.yaml").write_text("_BASE_: base.yaml\nA: {C: text}\nE: {F: 1}\n")
    loaded = CfgNode.load_yaml_with_base(str(tmp_path / "own.yaml"), allow_unsafe=True)
    assert loaded == {"A": {"B": 1, "C": "text"}, "D": 3, "E": {"F": 1}}
