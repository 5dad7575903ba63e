import pytest

from detkit.config.setting_types import coerce


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
    coerced = coerce(value, present, "K", "")
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
            "K holds <built-in function print>, .* settings are plain values",
            id="function",
        ),
    ],
)
def test_value_of_another_type_is_an_error(value, present, message):
    with pytest.raises(ValueError, match=message):
        coerce(value, present, "K", "f:1: ")
