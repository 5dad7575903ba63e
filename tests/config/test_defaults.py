"""The table of keys against Detectron2's, and against the keys that the code reads."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest

from detkit.config import (
    ConfigKeyError,
    default_trainer_settings,
    defaults,
    explain,
    get_cfg,
    settings_without_effect,
    unread_settings,
)
from detkit.config.defaults import _TABLE, BUILDERS

ROOT = Path(__file__).resolve().parents[2]
# Recorded from Detectron2 0.6's get_cfg().
DETECTRON2 = json.loads((ROOT / "tests" / "golden" / "defaults.json").read_text())
DELIBERATELY_DIFFERENT = {"MODEL.DEVICE": "auto"}


def leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@pytest.mark.parametrize(("key", "value"), list(leaves(DETECTRON2)))
def test_default_is_detectron2s(key, value, monkeypatch):
    # Another test may have imported the alias, which has its own default of MODEL.DEVICE.
    monkeypatch.delitem(sys.modules, "detkit.as_detectron2", raising=False)
    ours = json.loads(json.dumps(get_cfg().get_by_full_key(key)))
    assert ours == DELIBERATELY_DIFFERENT.get(key, value)


def test_exactly_detkits_own_keys_are_marked_as_such():
    # The config reference of the documentation takes the mark from here.
    detectron2 = {key for key, _ in leaves(DETECTRON2)}
    marked = {key for key, spec in _TABLE.items() if spec.meaning.startswith("detkit:")}
    assert marked == set(_TABLE) - detectron2


def test_defaults_are_legal_values():
    assert {
        key: spec.problem(spec.default)
        for key, spec in _TABLE.items()
        if spec.problem(spec.default)
    } == {}


def test_two_trees_share_nothing():
    a, b = get_cfg(), get_cfg()
    a.MODEL.ANCHOR_GENERATOR.SIZES[0].append(1)
    a.MODEL.CUSTOM.X = 1
    assert b == get_cfg()


def test_explain_gives_meaning_default_and_legal_values():
    text = explain("INPUT.FORMAT")
    assert "INPUT.FORMAT = 'BGR'" in text
    assert "One of: 'BGR', 'RGB', 'L'" in text
    assert "Channel order" in text


def test_explain_of_a_group_lists_its_keys():
    assert "SOLVER.AMP.ENABLED" in explain("SOLVER.AMP")


def test_explain_of_an_unknown_key_has_near_misses():
    with pytest.raises(ConfigKeyError, match="Did you mean 'SOLVER.MAX_ITER'"):
        explain("SOLVER.MAXITER")


def test_settings_that_nothing_reads_are_reported():
    cfg = get_cfg()
    assert unread_settings(cfg) == {}
    cfg.merge_from_list(["GLOBAL.HACK", 2.0])
    assert list(unread_settings(cfg)) == ["GLOBAL.HACK"]


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
        pytest.param(
            ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.RESNETS.NORM", "BN"],
            {},
            id="res5 of the heads beside another backbone",
        ),
        pytest.param(
            [
                "MODEL.BACKBONE.NAME",
                "build_timm_backbone",
                "MODEL.RESNETS.NORM",
                "BN",
                "MODEL.META_ARCHITECTURE",
                "RetinaNet",
            ],
            {"MODEL.RESNETS.NORM": "MODEL.BACKBONE.NAME is 'build_timm_backbone'"},
            id="another backbone without such heads",
        ),
    ],
)
def test_what_is_set_to_no_effect_is_named(settings, expected):
    cfg = get_cfg()
    cfg.merge_from_list(settings)
    assert settings_without_effect(cfg) == expected


def test_builders_that_read_keys_are_those_of_detkit():
    named = {builder for builders in BUILDERS.values() for builder in builders}
    source = "".join(p.read_text() for p in (ROOT / "detkit/modeling/backbone").rglob("*.py"))
    assert named == set(re.findall(r"register\(\)\n(?:@.*\n)*def (\w+)", source))


def test_what_a_key_needs_is_a_key_with_legal_values():
    cfg = get_cfg()
    needs = [spec.needs for spec in _TABLE.values() if spec.needs]
    assert len(needs) > 30
    for decider, *values in needs:
        cfg.get_by_full_key(decider)
        for value in values:
            cfg.merge_from_list([decider, value])


def test_explain_says_what_a_key_needs():
    assert "Needs: SOLVER.OPTIMIZER = 'SGD'" in explain("SOLVER.NESTEROV")
    assert explain("SOLVER.AMP.DTYPE").endswith("Needs: SOLVER.AMP.ENABLED")
    assert explain("MODEL.SWIN.DEPTHS").endswith("by: build_swin_backbone, build_swin_fpn_backbone")


def test_settings_that_only_default_trainer_follows_ask_for_nothing_by_default():
    idle = default_trainer_settings()
    assert idle["SOLVER.ACCUM_STEPS"] == 1
    assert "SOLVER.MAX_ITER" not in idle


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


# --- keys in the code ---


def _chain(node, aliases):
    """`cfg.MODEL.RPN` or `x.cfg.MODEL.RPN` -> "MODEL.RPN", also through a local name of a group; else None."""
    parts = []
    while isinstance(node, ast.Attribute) and node.attr != "cfg":
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Attribute):
        return ".".join(reversed(parts))
    if not isinstance(node, ast.Name):
        return None
    if node.id in aliases:
        parts.append(aliases[node.id])
    elif node.id != "cfg":
        return None
    return ".".join(part for part in reversed(parts) if part)


def _assignments(function):
    """Every `name = value` in a function, also of `a, b = x, y`."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
            both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            pairs = zip(target.elts, value.elts, strict=False) if both else [(target, value)]
            yield from ((t.id, v) for t, v in pairs if isinstance(t, ast.Name))


def keys_read(path):
    """Every config key that a file names by attribute of `cfg`, with the line."""
    found = {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for function in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)] + [tree]:
        aliases = {}
        for name, value in _assignments(function):
            chain = _chain(value, aliases)
            if chain and isinstance(_look_up(chain), dict):
                aliases[name] = chain
        for node in ast.walk(function):
            chain = _chain(node, aliases)
            key = ".".join(
                part for part in (chain or "").split(".") if part.isupper() or part == ""
            )
            if key:
                found.setdefault(key, f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def keys_read_of_arguments(paths):
    """Keys that functions read of a group they are called with: `build_pooler(cfg, cfg.MODEL.ROI_MASK_HEAD)`."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    passed = {}  # (function, position) -> groups that it is called with
    for path, tree in trees.items():
        for call in [n for n in ast.walk(tree) if isinstance(n, ast.Call)]:
            name = getattr(call.func, "id", getattr(call.func, "attr", None))
            for position, argument in enumerate(call.args):
                group = _chain(argument, {})
                if group:
                    where = f"{path.relative_to(ROOT)}:{call.lineno}"
                    passed.setdefault((name, position), {})[group] = where
    found = {}
    for tree in trees.values():
        for function in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]:
            for position, argument in enumerate(function.args.args):
                groups = passed.get((function.name, position), {})
                for node in ast.walk(function) if groups else ():
                    if isinstance(node, ast.Attribute) and _chain(node, {argument.arg: ""}):
                        for group, where in groups.items():
                            found.setdefault(f"{group}.{node.attr}", where)
    return {key: where for key, where in found.items() if _look_up(key) is not ...}


def _look_up(key):
    """The setting or group at a key; `...` where there is none."""
    node = get_cfg()
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return ...
        node = node[part]
    return node


@pytest.fixture(scope="module")
def read():
    paths = sorted((ROOT / "detkit").rglob("*.py")) + sorted((ROOT / "tools").glob("*.py"))
    found = keys_read_of_arguments(paths)
    for path in paths:
        for key, where in keys_read(path).items():
            found.setdefault(key, where)
    return found


def test_keys_that_the_code_reads_are_declared(read):
    unknown = {
        key: where
        for key, where in read.items()
        if _look_up(key) is ... and not key.startswith("MODEL.CUSTOM")
    }
    assert unknown == {}


def test_keys_that_are_declared_are_read_or_say_why_not(read):
    unread = {key for key, spec in _TABLE.items() if not spec.unread and key not in read}
    assert unread == set(), "declared, not read by any file and without a reason in `unread`"


def test_keys_said_to_be_unread_are_unread(read):
    stale = {key: read[key] for key, spec in _TABLE.items() if spec.unread and key in read}
    assert stale == {}


def test_checker_follows_aliases():
    path = ROOT / "tests" / "config" / "_never_written.py"

    class Fake:
        def read_text(self, encoding):
            return "def f(cfg):\n    rpn, m = cfg.MODEL.RPN, cfg.MODEL\n    return rpn.NMS_THRESH, cfg.SEED, m.NOPE.lower()\n"

        def relative_to(self, root):
            return path.relative_to(root)

    assert set(keys_read(Fake())) >= {"MODEL.RPN.NMS_THRESH", "SEED", "MODEL.NOPE"}


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        (["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.RESNETS.DEPTH", 101, "MODEL.ROI_HEADS.NAME", "StandardROIHeads"], "MODEL.RESNETS.DEPTH"),
        (["MODEL.BACKBONE.NAME", "build_torchvision_backbone", "MODEL.RESNETS.NORM", "BN", "MODEL.ROI_HEADS.NAME", "StandardROIHeads"], "MODEL.RESNETS.NORM"),
        (["MODEL.TORCHVISION.NAME", "resnet18"], "MODEL.TORCHVISION.NAME"),
        (["MODEL.BACKBONE.NAME", "build_vit_backbone", "MODEL.TORCHVISION.NORM", "FrozenBN", "MODEL.RESNETS.OUT_FEATURES", ["res5"], "MODEL.VIT.DEPTH", 24], "MODEL.TORCHVISION.NORM"),
        (["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.NAME", "resnet18", "MODEL.SWIN.DEPTHS", [1]], "MODEL.SWIN.DEPTHS"),
        (["MODEL.ROI_BOX_HEAD.NUM_FC", 2], "MODEL.ROI_BOX_HEAD.NUM_FC"),
        (["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"], "MODEL.ROI_BOX_HEAD.NAME"),
        (["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.5], "MODEL.ROI_HEADS.SCORE_THRESH_TEST"),
        (["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.STEPS", (5,)], "SOLVER.STEPS"),
        (["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.GAMMA", 0.5], "SOLVER.GAMMA"),
    ],
)  # fmt: skip
def test_keys_that_the_chosen_part_does_not_read_are_named(settings, unread):
    cfg = get_cfg()
    cfg.merge_from_list(settings)
    assert list(settings_without_effect(cfg)) == [unread]


@pytest.mark.parametrize(
    "settings",
    [
        ["MODEL.BACKBONE.NAME", "my_backbone", "MODEL.RESNETS.DEPTH", 101, "MODEL.VIT.DEPTH", 24],
        ["MODEL.ROI_HEADS.NAME", "MyHeads", "MODEL.ROI_BOX_HEAD.NUM_FC", 2],
        ["SOLVER.LR_SCHEDULER_NAME", "WarmupStepWithFixedGammaLR", "SOLVER.GAMMA", 0.5],
    ],
)
def test_parts_of_the_users_own_may_read_any_key(settings):
    cfg = get_cfg()
    cfg.merge_from_list(settings)
    assert settings_without_effect(cfg) == {}


def test_keys_added_to_the_defaults_are_in_all_configs(monkeypatch):
    monkeypatch.setattr(defaults, "_C", defaults._C.clone())
    defaults._C.MODEL.MY_PART = defaults.CfgNode({"SIZE": 3})
    assert get_cfg().MODEL.MY_PART.SIZE == 3
    get_cfg().MODEL.MY_PART.SIZE = 4
    assert get_cfg().MODEL.MY_PART.SIZE == 3


def test_node_that_a_project_puts_in_place_of_one_here_is_its_own():
    cfg = get_cfg()
    cfg.MODEL.SWIN = defaults.CfgNode({"EMBED_DIM": 192, "APE": False})
    cfg.MODEL.FCOS = defaults.CfgNode()
    cfg.SOLVER.NUM_DECAYS = 4
    assert list(settings_without_effect(cfg)) == ["SOLVER.NUM_DECAYS"]
    assert unread_settings(cfg) == {}
