import pytest
from torch import nn

from detkit.layers import LayerNorm2d
from detkit.solver import (
    get_default_optimizer_params,
    layer_decay_factors,
    lr_factor_func,
    reduce_param_groups,
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)


def settings_of(model, groups):
    """Name -> settings of its group."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: {k: v for k, v in g.items() if k != "params"}
        for g in groups
        for p in g["params"]
    }


def test_every_parameter_is_in_exactly_one_group():
    model = Net()
    groups = get_default_optimizer_params(model, base_lr=0.1, weight_decay_norm=0.0)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(
        id(p) for p in model.parameters()
    )


def test_norm_weight_and_bias_take_weight_decay_norm():
    model = Net()
    found = settings_of(
        model,
        get_default_optimizer_params(model, base_lr=0.1, weight_decay=1e-4, weight_decay_norm=0.0),
    )
    assert found["norm.weight"] == found["norm.bias"] == {"lr": 0.1, "weight_decay": 0.0}
    assert found["conv.weight"] == found["fc.bias"] == {"lr": 0.1, "weight_decay": 1e-4}


def test_bias_settings_win_over_norm_settings():
    model = Net()
    groups = get_default_optimizer_params(
        model, base_lr=0.1, weight_decay_norm=0.5, bias_lr_factor=2.0, weight_decay_bias=0.0
    )
    found = settings_of(model, groups)
    assert found["norm.bias"] == found["conv.bias"] == {"lr": 0.2, "weight_decay": 0.0}
    assert found["norm.weight"] == {"lr": 0.1, "weight_decay": 0.5}


def test_weight_decay_bias_none_leaves_the_optimizers_default():
    model = Net()
    assert settings_of(model, get_default_optimizer_params(model, base_lr=0.1))["fc.bias"] == {
        "lr": 0.1
    }


def test_equal_settings_make_one_group():
    assert len(get_default_optimizer_params(Net(), base_lr=0.1)) == 1


@pytest.mark.parametrize(
    "norm",
    [
        pytest.param(nn.SyncBatchNorm(4), id="sync"),
        pytest.param(nn.GroupNorm(2, 4), id="group"),
        pytest.param(nn.LayerNorm(4), id="layer"),
        pytest.param(nn.InstanceNorm2d(4, affine=True), id="instance"),
        pytest.param(nn.RMSNorm(4), id="rms"),
    ],
)
def test_norm_types_are_recognised(norm):
    groups = get_default_optimizer_params(norm, weight_decay=1.0, weight_decay_norm=0.0)
    assert [g["weight_decay"] for g in groups] == [0.0]


def test_layer_norm_over_channels_decays_as_other_layers_do():
    # As in Detectron2, whose LN is not among its norm types: ViTDet's heads and pyramid.
    groups = get_default_optimizer_params(LayerNorm2d(4), weight_decay=1.0, weight_decay_norm=0.0)
    assert [g["weight_decay"] for g in groups] == [1.0]


def test_frozen_parameters_are_left_out():
    model = Net()
    model.conv.requires_grad_(False)
    assert set(settings_of(model, get_default_optimizer_params(model))) == {
        "norm.weight",
        "norm.bias",
        "fc.weight",
        "fc.bias",
    }


def test_shared_parameter_is_taken_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert sum(len(g["params"]) for g in get_default_optimizer_params(model)) == 3


def test_lr_factor_func_sees_full_names():
    model = Net()
    groups = get_default_optimizer_params(
        model, base_lr=1.0, lr_factor_func=lambda n: 0.1 if n.startswith("conv.") else 1.0
    )
    found = settings_of(model, groups)
    assert found["conv.weight"]["lr"] == pytest.approx(0.1)
    assert found["fc.weight"]["lr"] == 1.0


def test_overrides_win_over_everything():
    model = Net()
    groups = get_default_optimizer_params(
        model, base_lr=1.0, weight_decay_norm=0.5, overrides={"weight": {"weight_decay": 9.0}}
    )
    assert settings_of(model, groups)["norm.weight"]["weight_decay"] == 9.0


def test_bias_set_twice_is_an_error():
    with pytest.raises(ValueError, match="set 'bias' too"):
        get_default_optimizer_params(
            Net(), base_lr=1.0, bias_lr_factor=2.0, overrides={"bias": {"lr": 3.0}}
        )


def test_factor_without_base_lr_is_an_error():
    with pytest.raises(ValueError, match="give base_lr"):
        get_default_optimizer_params(Net(), bias_lr_factor=2.0)


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="no parameter of the model trains"):
        get_default_optimizer_params(Net().requires_grad_(False))


def test_reduce_merges_equal_settings_and_keeps_the_order():
    groups = [{"params": [1], "lr": 0.1}, {"params": [2], "lr": 0.2}, {"params": [3, 4], "lr": 0.1}]
    assert reduce_param_groups(groups) == [
        {"lr": 0.1, "params": [1, 3, 4]},
        {"lr": 0.2, "params": [2]},
    ]


def test_reduce_of_nothing_is_nothing():
    assert reduce_param_groups([]) == []


# --- factors on learning rates ---


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
        match=r"lr_mult\[1\]: '\^bakbone\\\\.res2' is found in .* Did you mean 'backbone.res2'",
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
            r"lr_mult\[0\] must be a pair \[regular expression, factor\], got \['head'\]",
            id="one",
        ),
        pytest.param([2, "head"], "must be a pair", id="reversed"),
        pytest.param(
            ["head", 0], r"factor of 'head' must be above 0, got 0; .* SOLVER\.FREEZE", id="zero"
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
    with pytest.raises(ValueError, match=r"layer_decay must lie in \(0, 1\]"):
        layer_decay_factors(Detector(), decay)


def test_decay_without_stages_is_an_error():
    with pytest.raises(
        ValueError,
        match=r"layer_decay is 0\.5, but no backbone .* parameter_stages.*lr_mult",
    ):
        layer_decay_factors(nn.Linear(2, 2), 0.5)


def test_parameter_in_several_groups_has_the_last_settings():
    groups = [
        {"params": ["a", "b"], "lr": 1.0, "weight_decay": 3.0},
        {"params": ["b"], "lr": 2.0, "momentum": 0.5},
        {"params": ["c"], "lr": 1.0, "weight_decay": 3.0},
    ]
    assert reduce_param_groups(groups) == [
        {"params": ["a", "c"], "lr": 1.0, "weight_decay": 3.0},
        {"params": ["b"], "lr": 2.0, "weight_decay": 3.0, "momentum": 0.5},
    ]
