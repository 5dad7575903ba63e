import os
from pathlib import Path

import pytest

import detkit
from detkit.config import get_cfg
from detkit.config.yaml_loader import evaluate_arithmetic, load_yaml
from detkit.model_zoo import get_config
from detkit.utils.errors import ConfigError, MissingFileError


def write(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    return path


def test_keys_remember_their_lines(tmp_path):
    file = load_yaml(write(tmp_path, "# c\nA:\n  B: 1\n  C:\n    D: x\nE: [1, 2]\n"))
    assert file.tree == {"A": {"B": 1, "C": {"D": "x"}}, "E": [1, 2]}
    assert file.lines == {"A": 2, "A.B": 3, "A.C": 4, "A.C.D": 5, "E": 6}


def test_empty_file_is_an_empty_mapping(tmp_path):
    assert load_yaml(write(tmp_path, "# nothing\n")).tree == {}


def test_anchor_sizes_of_retinanet_are_computed(tmp_path):
    # The expression in Detectron2's Base-RetinaNet.yaml.
    text = (
        "MODEL:\n  ANCHOR_GENERATOR:\n"
        '    SIZES: !!python/object/apply:eval ["[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]"]\n'
    )
    cfg = get_cfg()
    cfg.merge_from_file(str(write(tmp_path, text)))
    assert [
        [x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in (32, 64, 128, 256, 512)
    ] == cfg.MODEL.ANCHOR_GENERATOR.SIZES


HOSTILE = "!!python/object/apply:os.system ['touch {}']"


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("!!python/object/apply:os.system ['touch {}']", id="apply"),
        pytest.param("!!python/object/new:os.system ['touch {}']", id="new"),
        pytest.param("!!python/name:os.system ''", id="name"),
        pytest.param("!!python/object/apply:eval [\"__import__('os').system('touch {}')\"]", id="eval-call"),
        pytest.param("!!python/object/apply:eval [\"open('{}', 'w')\"]", id="eval-open"),
        pytest.param("!!python/object/apply:eval [\"[x for x in ().__class__.__base__.__subclasses__()]\"]", id="eval-attribute"),
        pytest.param("!!python/object/apply:eval ['1', '2']", id="eval-two-arguments"),
        pytest.param("!mine 3", id="unknown-tag"),
    ],
)  # fmt: skip
def test_tag_that_would_run_code_is_refused_and_runs_nothing(tmp_path, value):
    victim = tmp_path / "ran"
    path = write(tmp_path, "A: 1\nOUTPUT_DIR: " + value.replace("{}", str(victim)) + "\n")
    with pytest.raises(ValueError, match=r"a\.yaml:2: .*(refused|takes a list of one)"):
        get_cfg().merge_from_file(str(path))
    assert not victim.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("A: &a {<<: *a}\n", r"contains itself|not valid YAML", id="merges-itself"),
        pytest.param(
            "A: {<<: [1]}\n", r"a\.yaml:1: << takes a mapping or a list", id="merged-list"
        ),
        pytest.param("1: x\n", r"a\.yaml:1: a config key must be a string", id="number-as-key"),
        pytest.param(
            "A: [1\n",
            r"a\.yaml is not valid YAML: line 2: [^\n]*, while parsing a flow sequence that begins in"
            r" line 1$",
            id="syntax",
        ),
        pytest.param(
            "A: 1\nB:\n\tC: 1\n",
            r"line 3: [^\n]*\. Tabs do not indent in YAML: use spaces$",
            id="tab",
        ),
        pytest.param("A: &a [*a]\n", r"contains itself|not valid YAML", id="self-alias"),
        pytest.param("[" * 100_000, r"nested more than 64 deep|maximum nesting depth", id="deep"),
        pytest.param("A: [" * 100_000, r"a\.yaml:1: nested more than 64 deep", id="deep-mappings"),
        pytest.param(
            "".join(f"{' ' * i}a:\n" for i in range(70)),
            r"a\.yaml:65: nested more than 64",
            id="deep-block",
        ),
        pytest.param("A: [" + "1," * 200_001 + "]", r"more than 100000 values", id="many"),
        pytest.param("A: " + "x" * 2**22, r"is larger than 4 MiB", id="large"),
        pytest.param(
            "A: !!bool maybe\n",
            r"a\.yaml:1: A has an unreadable value 'maybe'",
            id="no-truth-value",
        ),
        pytest.param(
            "A: !!timestamp now\n", r"a\.yaml:1: A has an unreadable value 'now'", id="no-date"
        ),
        pytest.param("A: !!int ''\n", r"a\.yaml:1: A has an unreadable value ''", id="no-number"),
    ],
)
def test_unusable_file_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_yaml(write(tmp_path, text))


def test_alias_bomb_is_refused(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(ValueError, match="more than 100000 values through aliases"):
        load_yaml(write(tmp_path, "\n".join(lines)))


def test_binary_file_is_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="is not a YAML text file"):
        load_yaml(path)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", 7),
        ("-(7 // 2) % 5", 2),
        ("[x / 2 for x in (1, 2)]", [0.5, 1.0]),
        ("[[x * y for y in [1, 2]] for x in [3, 4]]", [[3, 6], [4, 8]]),
        ("2 ** -1", 0.5),
        ("2 ** 64", 2**64),
        # Sizes of crops in projects.
        ("[int(0.1 * x * 640) for x in range(5, 8)]", [320, 384, 448]),
        ("int(-2.7)", -2),
        ("range(3)", [0, 1, 2]),
        ("range(9, 0, -4)", [9, 5, 1]),
        ("tuple(range(640, 701, 32))", (640, 672)),
        ("[round(2.6), float(3), list((1, 2))]", [3, 3.0, [1, 2]]),
    ],
)
def test_arithmetic(expression, value):
    assert evaluate_arithmetic(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["f(1)", "a", "int", "int()", "int('7')", "int([1])", "int(1e308 * 1e308)", "int(x=1)", "range(1.5)", "range(0, 5, 0)", "list(range(10**9))",
     "range(10 ** 9)", "range(*[1, 2])", "[int for int in [1]][0](2)", "max(1, 2)", "'x' * 3", "[1] * 3", "9 ** 9 ** 9", "2 ** 65", "1 / 0", "[x for x in 5]", "x.y", "lambda: 1", "True", "(-8) ** 0.5",
     "range(10**30)", "int(1, 2)", "int(1.0, base=3)", "round(1, -10**9)", "print(1)", "tuple([range(9000), range(9000)])",
     "[x for x in [1] if x]", "1 if 1 else 2", "f'{1}'", "[[x for x in [1,2,3,4,5,6,7,8,9]] for y in " + str([0] * 2000) + "]",
     "[[x, x] for x in " * 50 + "[1, 1]" + "]" * 50, "[(x, x, x) for x in " * 12 + "[1]" + "]" * 12],
)  # fmt: skip
def test_everything_else_is_refused(expression):
    with pytest.raises(ValueError):
        evaluate_arithmetic(expression)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("0100", r"0100, which YAML 1\.1 reads in base 8: write", id="octal"),
        pytest.param("-0_17", "base 8", id="octal-with-sign"),
        pytest.param("!!int '010'", "base 8", id="octal-by-tag"),
        pytest.param("1:30", r"1:30, which YAML 1\.1 reads in base 60.* in quotes", id="base-60"),
        pytest.param("1:30.5", "base 60", id="base-60-with-fraction"),
        pytest.param("1" + ":1" * 2_000_000, "at most 64 characters, got 1:1:1", id="4-MB"),
        pytest.param("0x" + "f" * 5000, "at most 64 characters", id="hexadecimal"),
        pytest.param("1" + "0" * 400, "at most 64 characters", id="decimal"),
    ],
)
def test_number_that_is_not_what_it_looks_like_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"a\.yaml:1: A .*{message}"):
        load_yaml(write(tmp_path, f"A: {text}\n"))


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("-1_000", -1000), ("0x1F", 31), ("0.10", 0.1), ("1.5e+3", 1500.0), ("'0100'", "0100"), ("'1:30'", "1:30"),
     ("09", "09"), ("a:b", "a:b"), ("12:30:00 x", "12:30:00 x")],
)  # fmt: skip
def test_other_numbers_and_texts_are_read(tmp_path, text, value):
    assert load_yaml(write(tmp_path, f"A: {text}\n")).tree == {"A": value}


def test_long_sum_is_refused():
    with pytest.raises(ValueError, match=r"'1\+1\+.* is nested too deep") as error:
        evaluate_arithmetic("1+" * 1500 + "1")
    assert len(str(error.value)) < 200


def test_pipe_in_place_of_a_file_is_refused(cfg, tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(FileNotFoundError, match=r"no config file .*pipe\.yaml: it is a .*pipe"):
        cfg.merge_from_file(put(tmp_path, "a.yaml", "_BASE_: pipe.yaml\n"))


# --- _BASE_ ---


def put(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_base_is_relative_to_the_file_and_is_overridden_by_it(cfg, tmp_path):
    put(tmp_path, "base.yaml", "SOLVER:\n  BASE_LR: 1.0\n  GAMMA: 0.2\n")
    put(tmp_path, "deep/mid.yaml", "_BASE_: ../base.yaml\nSOLVER:\n  BASE_LR: 2.0\n")
    cfg.merge_from_file(
        put(tmp_path, "deep/er/top.yaml", "_BASE_: ../mid.yaml\nSOLVER:\n  MOMENTUM: 0.5\n")
    )
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.GAMMA, cfg.SOLVER.MOMENTUM) == (2.0, 0.2, 0.5)


def test_base_may_be_absolute(cfg, tmp_path):
    base = put(tmp_path, "x/base.yaml", "SEED: 5\n")
    cfg.merge_from_file(put(tmp_path, "y/top.yaml", f"_BASE_: {base}\n"))
    assert cfg.SEED == 5


def test_base_may_lie_in_the_home_folder(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    put(tmp_path, "base.yaml", "SEED: 6\n")
    cfg.merge_from_file(put(tmp_path, "y/top.yaml", "_BASE_: ~/base.yaml\n"))
    assert cfg.SEED == 6


def test_place_of_configs_in_detectron2s_package_has_those_of_detkit(cfg):
    place = Path(detkit.__file__).parent / "model_zoo" / "configs"
    cfg.merge_from_file(str(place / "COCO-Detection" / "faster_rcnn_R_50_FPN_1x.yaml"))
    assert cfg == get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    with pytest.raises(MissingFileError, match=r"configs/COCO-Detection/faster_rcnn\.yaml"):
        cfg.merge_from_file(str(place / "COCO-Detection" / "faster_rcnn.yaml"))


def test_base_may_be_a_packaged_config(cfg, tmp_path):
    cfg.merge_from_file(
        put(tmp_path, "my.yaml", "_BASE_: detkit://COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml\n")
    )
    assert cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone"


def test_several_bases_are_merged_in_order(cfg, tmp_path):
    put(tmp_path, "a.yaml", "SEED: 1\nVIS_PERIOD: 1\n")
    put(tmp_path, "b.yaml", "SEED: 2\n")
    cfg.merge_from_file(put(tmp_path, "top.yaml", "_BASE_: [a.yaml, b.yaml]\n"))
    assert (cfg.SEED, cfg.VIS_PERIOD) == (2, 1)


def test_base_of_a_link_lies_beside_the_link(cfg, tmp_path):
    put(tmp_path, "elsewhere/real.yaml", "_BASE_: base.yaml\n")
    put(tmp_path, "base.yaml", "SEED: 7\n")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "elsewhere" / "real.yaml")
    cfg.merge_from_file(str(tmp_path / "link.yaml"))
    assert cfg.SEED == 7


def test_value_of_a_base_that_is_overridden_may_be_a_placeholder(cfg, tmp_path):
    put(tmp_path, "base.yaml", "SEED: ???\nSOLVER:\n  MAX_ITER: ???\n  GAMMA: 0.5\n")
    put(tmp_path, "middle.yaml", "_BASE_: base.yaml\nSEED: 3\n")
    path = put(tmp_path, "own.yaml", "_BASE_: middle.yaml\nSOLVER: {MAX_ITER: 9}\n")
    cfg.merge_from_file(path)
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER, cfg.SOLVER.GAMMA) == (3, 9, 0.5)
    with pytest.raises(ValueError, match=r"base\.yaml:3: SOLVER\.MAX_ITER must be an int"):
        cfg.merge_from_file(str(tmp_path / "middle.yaml"))


def test_circle_of_bases_is_named(cfg, tmp_path):
    put(tmp_path, "a.yaml", "_BASE_: b.yaml\n")
    path = put(tmp_path, "b.yaml", "_BASE_: a.yaml\n")
    with pytest.raises(
        ValueError, match=r"_BASE_ forms a circle: .*b\.yaml -> .*a\.yaml -> .*b\.yaml"
    ):
        cfg.merge_from_file(path)


def test_bases_that_multiply_are_refused(cfg, tmp_path):
    put(tmp_path, "0.yaml", "SEED: 1\n")
    for i in range(1, 40):
        path = put(tmp_path, f"{i}.yaml", f"_BASE_: [{i - 1}.yaml, {i - 1}.yaml]\n")
    with pytest.raises(ValueError, match=r"\.yaml includes more than 100 files through _BASE_"):
        cfg.merge_from_file(path)


def test_endless_bases_are_refused(cfg, tmp_path):
    for i in range(101):
        path = put(tmp_path, f"{i}.yaml", f"_BASE_: {i - 1}.yaml\n")
    with pytest.raises(ValueError, match=r"100\.yaml has a chain of more than 100 files in _BASE_"):
        cfg.merge_from_file(path)


def test_missing_file_is_named(cfg):
    with pytest.raises(FileNotFoundError, match=r"no config file .*nowhere\.yaml"):
        cfg.merge_from_file("nowhere.yaml")


def test_missing_base_names_the_file_that_asks_for_it(cfg, tmp_path):
    path = put(tmp_path, "top.yaml", "_BASE_: gone.yaml\n")
    put(tmp_path, "gome.yaml", "")
    message = r"gone\.yaml, named as _BASE_ in .*top\.yaml\. Did you mean 'gome\.yaml'\?"
    with pytest.raises(FileNotFoundError, match=message):
        cfg.merge_from_file(path)


def test_paths_of_declared_data_sets_are_relative_to_their_file(cfg, tmp_path):
    (tmp_path / "pics").mkdir()
    (tmp_path / "train").mkdir()
    text = "DATASETS:\n  REGISTER:\n    - {name: a, format: coco, images: pics, annotations: elsewhere.json, split: train}\n"
    cfg.merge_from_file(put(tmp_path, "a.yaml", text))
    entry = cfg.DATASETS.REGISTER[0]
    assert entry["split"] == "train"  # a name, not the folder of that name
    assert entry["images"] == str(tmp_path / "pics")
    assert (
        entry["annotations"] == "elsewhere.json"
    )  # not beside the file: left for $DETKIT_DATASETS


def test_of_two_values_of_a_key_the_last_counts_with_a_warning(tmp_path, caplog):
    file = tmp_path / "a.yaml"
    file.write_text("A: {B: 1}\nC: 1\nA:\n  D: 2\n  D: 3\n")
    assert load_yaml(file).tree == {"A": {"D": 3}, "C": 1}
    assert "a.yaml:3: A is set twice: what stands in line 1 is not used" in caplog.text
    assert "a.yaml:5: A.D is set twice: what stands in line 4 is not used" in caplog.text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("!!python/unicode '12'", "12"),
        ("!!python/long 12", 12),
        ("!!python/bool True", True),
        ("!!python/none", None),
        ("!!python/list [1, !!python/float 2]", [1, 2.0]),
        ("!!python/dict {B: 1}", {"B": 1}),
    ],
)
def test_plain_values_under_their_names_in_python_are_read(tmp_path, text, value):
    assert load_yaml(write(tmp_path, f"A: {text}\n")).tree == {"A": value}


def test_mapping_merges_in_others_below_its_own_keys(tmp_path, caplog):
    file = tmp_path / "a.yaml"
    file.write_text(
        "A: &a {X: 1, Y: {Z: 1}}\nB: &b {X: 2, W: 2}\nC: {X: 3, <<: *a}\n"
        "D: {<<: [*a, *b], V: 4}\nE: {<<: {<<: *b, X: 5}}\n"
    )
    tree = load_yaml(file).tree
    assert tree["C"] == {"X": 3, "Y": {"Z": 1}}
    assert tree["D"] == {"X": 1, "Y": {"Z": 1}, "W": 2, "V": 4}  # the first of a list counts
    assert tree["E"] == {"X": 5, "W": 2}
    assert not caplog.records


def test_bomb_of_merged_mappings_is_refused(tmp_path):
    lines = ["a0: &a0 {k: 1}"] + [
        f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 12)
    ]
    file = tmp_path / "a.yaml"
    file.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="more than 100000 values through aliases"):
        load_yaml(file)
