import pytest
from torch import nn

from detkit.solver import layer_decay_factors, lr_factor_func


class Staged(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.res2 = nn.Linear(2, 2), nn.Linear(2, 2)

    def parameter_stages(self):
        return {name: int(name.startswith("res2")) for name, _ in self.named_parameters()}


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = Staged(), nn.Linear(2, 2)


def factors(model=None, **kwargs):
    model = model or Detector()
    factor = lr_factor_func(model, **kwargs)
    return {name: factor(name) for name, _ in model.named_parameters()}


def test_without_settings_every_factor_is_one():
    assert set(factors().values()) == {1.0}


def test_patterns_are_searched_for_and_the_last_one_counts():
    found = factors(lr_mult=[["^backbone", 0.1], [r"res2\.weight", 3]])
    assert found == {
        "backbone.stem.weight": 0.1,
        "backbone.stem.bias": 0.1,
        "backbone.res2.weight": 3.0,
        "backbone.res2.bias": 0.1,
        "head.weight": 1.0,
        "head.bias": 1.0,
    }


def test_depth_counts_from_the_end_of_the_backbone():
    found = factors(layer_decay=0.5)
    assert [found[f"{part}.weight"] for part in ("backbone.stem", "backbone.res2", "head")] == [
        0.25,
        0.5,
        1.0,
    ]


def test_factors_multiply():
    found = factors(layer_decay=0.5, lr_mult=[["stem", 0.1]], bias_lr_factor=2.0)
    assert found["backbone.stem.bias"] == pytest.approx(0.25 * 0.1 * 2)
    assert found["backbone.stem.weight"] == pytest.approx(0.25 * 0.1)
    assert found["head.bias"] == 2.0


def test_pattern_that_is_found_nowhere_names_near_misses():
    with pytest.raises(
        ValueError,
        match=r"LR_MULT\[1\]: '\^bakbone\\\\.res2' is found in .* Did you mean 'backbone.res2'",
    ):
        factors(lr_mult=[["head", 2], [r"^bakbone\.res2", 0.1]])


def test_pattern_that_only_frozen_parameters_have_says_so():
    model = Detector()
    model.backbone.stem.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"no parameter that trains. 2 that are frozen .* backbone\.stem\.weight"
    ):
        factors(model, lr_mult=[["stem", 2]])


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        pytest.param(
            ["head"],
            r"LR_MULT\[0\] must be a pair \[regular expression, factor\], got \['head'\]",
            id="one",
        ),
        pytest.param([2, "head"], "must be a pair", id="reversed"),
        pytest.param(
            ["head", 0], r"factor of 'head' must be above 0, got 0 \(SOLVER\.FREEZE", id="zero"
        ),
        pytest.param(["head", "x"], "must be above 0, got 'x'", id="text"),
        pytest.param(["head", float("nan")], "must be above 0, got nan", id="nan"),
        pytest.param(
            ["(head", 1.0], "'\\(head' is not a regular expression", id="not an expression"
        ),
    ],
)
def test_bad_pairs_are_errors(pair, message):
    with pytest.raises(ValueError, match=message):
        factors(lr_mult=[pair])


@pytest.mark.parametrize("decay", [0.0, 1.5])
def test_decay_out_of_range_is_an_error(decay):
    with pytest.raises(ValueError, match=r"SOLVER\.LAYER_DECAY must lie in \(0, 1\]"):
        layer_decay_factors(Detector(), decay)


def test_decay_without_stages_is_an_error():
    with pytest.raises(
        ValueError,
        match=r"LAYER_DECAY is 0\.5, but no backbone .* parameter_stages.*SOLVER\.LR_MULT",
    ):
        layer_decay_factors(nn.Linear(2, 2), 0.5)
