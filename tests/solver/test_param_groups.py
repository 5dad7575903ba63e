import pytest
from torch import nn

from detkit.layers import LayerNorm2d
from detkit.solver import get_default_optimizer_params, reduce_param_groups


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
        pytest.param(LayerNorm2d(4), id="layer, over channels"),
        pytest.param(nn.GroupNorm(2, 4), id="group"),
        pytest.param(nn.LayerNorm(4), id="layer"),
        pytest.param(nn.InstanceNorm2d(4, affine=True), id="instance"),
        pytest.param(nn.RMSNorm(4), id="rms"),
    ],
)
def test_norm_types_are_recognised(norm):
    groups = get_default_optimizer_params(norm, weight_decay=1.0, weight_decay_norm=0.0)
    assert [g["weight_decay"] for g in groups] == [0.0]


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
    with pytest.raises(ValueError, match="one or the other"):
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
