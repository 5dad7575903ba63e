import logging

import pytest
import torch
from torch import nn

from detkit.config import get_cfg
from detkit.solver import build_lr_scheduler, build_optimizer, maybe_add_gradient_clipping
from detkit.solver.build import GradientClipType, _create_gradient_clipper
from detkit.utils.errors import ConfigError


def make_cfg(**solver):
    cfg = get_cfg()
    for name, value in {
        "BASE_LR": 1.0,
        "MAX_ITER": 10,
        "STEPS": (),
        "WARMUP_ITERS": 0,
        **solver,
    }.items():
        cfg.SOLVER[name] = value
    return cfg


def rates(cfg, num_iters=None):
    """Learning rate at each iteration of a run."""
    optimizer = build_optimizer(cfg, nn.Linear(2, 2))
    scheduler = build_lr_scheduler(cfg, optimizer)
    found = []
    for _ in range(num_iters or cfg.SOLVER.MAX_ITER):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_first_rates_agree_with_detectron2():
    # Recorded from Detectron2 0.6 in shared/golden/faster_fpn.npz.
    cfg = make_cfg(BASE_LR=0.0005, WARMUP_ITERS=2, MAX_ITER=90000, STEPS=(60000, 80000))
    assert rates(cfg, 3) == pytest.approx([5e-7, 0.00025025, 0.0005], rel=1e-9)


def test_multi_step_falls_at_each_step():
    assert rates(make_cfg(STEPS=(3, 7), GAMMA=0.1)) == pytest.approx(
        [1] * 3 + [0.1] * 4 + [0.01] * 3
    )


def test_warmup_precedes_multi_step():
    got = rates(make_cfg(STEPS=(6,), WARMUP_ITERS=4, WARMUP_FACTOR=0.2))
    assert got == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 0.1, 0.1, 0.1, 0.1])


def test_shares_of_the_run():
    shares = make_cfg(STEPS=("60%",), WARMUP_ITERS="40%", WARMUP_FACTOR=0.2)
    assert rates(shares) == rates(make_cfg(STEPS=(6,), WARMUP_ITERS=4, WARMUP_FACTOR=0.2))


def test_share_of_the_warmup_is_not_rounded():
    got = rates(make_cfg(WARMUP_ITERS="25%", WARMUP_FACTOR=0.0), 3)
    assert got == pytest.approx([0, 0.4, 0.8])


@pytest.mark.parametrize("key", ["WARMUP_ITERS", "STEPS"])
def test_other_texts_than_shares_are_refused(key):
    value = ("half",) if key == "STEPS" else "half"
    with pytest.raises(ConfigError, match=f"SOLVER.{key} must be iterations, or a share such as"):
        rates(make_cfg(**{key: value}))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["bias"], r"OVERRIDES\[0\] must be a pair"),
        ([["bais", 0.0]], r"OVERRIDES\[0\]: no parameter of the model is called 'bais'.*bias"),
        ([["bias", -1.0]], r"OVERRIDES\[0\]: the weight decay must be at least 0, got -1"),
    ],
)
def test_wrong_weight_decay_override_is_named(pairs, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(make_cfg(WEIGHT_DECAY_OVERRIDES=pairs), nn.Linear(2, 2))


def test_cosine_goes_from_base_to_end():
    got = rates(
        make_cfg(LR_SCHEDULER_NAME="WarmupCosineLR", BASE_LR=2.0, BASE_LR_END=1.0, MAX_ITER=4)
    )
    half = 0.5**0.5 / 2
    assert got == pytest.approx([2.0, 1.5 + half, 1.5, 1.5 - half])


def test_step_with_fixed_gamma_falls_at_equal_distances():
    got = rates(
        make_cfg(
            LR_SCHEDULER_NAME="WarmupStepWithFixedGammaLR", NUM_DECAYS=1, GAMMA=0.5, MAX_ITER=4
        )
    )
    assert got == pytest.approx([1, 1, 0.5, 0.5])


def test_rescaled_interval_starts_after_the_warmup():
    got = rates(
        make_cfg(
            STEPS=(5,),
            WARMUP_ITERS=2,
            WARMUP_METHOD="constant",
            WARMUP_FACTOR=0.5,
            RESCALE_INTERVAL=True,
        )
    )
    assert got == pytest.approx([0.5] * 2 + [1] * 4 + [0.1] * 4)


def test_step_at_or_beyond_the_end_is_named_in_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="detkit"):
        got = rates(make_cfg(STEPS=(5, 10, 30000)))
    assert got == pytest.approx([1] * 5 + [0.1] * 5)
    assert "SOLVER.STEPS [10, 30000] have no effect" in caplog.text


def test_warmup_longer_than_training_is_shortened_and_named(caplog):
    with caplog.at_level(logging.WARNING, logger="detkit"):
        got = rates(make_cfg(WARMUP_ITERS=1000, WARMUP_FACTOR=0.0, MAX_ITER=4))
    assert got == pytest.approx([0, 0.25, 0.5, 0.75])
    assert "SOLVER.WARMUP_ITERS=1000 is longer than training" in caplog.text


def test_one_iteration_run_has_a_schedule():
    assert rates(make_cfg(MAX_ITER=1)) == [1.0]


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        pytest.param(
            {"LR_SCHEDULER_NAME": "WarmupCosine"},
            "SOLVER.LR_SCHEDULER_NAME .* 'WarmupCosineLR'",
            id="name",
        ),
        pytest.param({"MAX_ITER": 0}, "SOLVER.MAX_ITER must be at least 1", id="max-iter"),
        pytest.param(
            {"STEPS": (5, 3)},
            r"SOLVER.STEPS must be positive and increasing, got \[5, 3\]",
            id="steps-fall",
        ),
        pytest.param({"STEPS": (0, 3)}, "SOLVER.STEPS must be positive", id="step-zero"),
        pytest.param({"WARMUP_ITERS": -1}, "SOLVER.WARMUP_ITERS must be at least 0", id="warmup"),
        pytest.param(
            {"WARMUP_METHOD": "exp"},
            "SOLVER.WARMUP_METHOD must be one of linear, constant; got",
            id="method",
        ),
        pytest.param({"BASE_LR": 0.0}, "SOLVER.BASE_LR must be above 0", id="base-lr"),
        pytest.param(
            {"OPTIMIZER": "Adamw"},
            "SOLVER.OPTIMIZER must be one of SGD, AdamW; got 'Adamw'",
            id="optimizer",
        ),
        pytest.param(
            {"LAYER_DECAY": 0.0},
            r"layer_decay must lie in \(0, 1\], got 0\.0 \(set by SOLVER\.LAYER_DECAY\)",
            id="layer-decay",
        ),
        pytest.param(
            {"LR_MULT": [["x", 2.0]]},
            r"lr_mult\[0\]: 'x' is found in the name of no .* \(set by SOLVER\.LR_MULT\)",
            id="lr-mult",
        ),
        pytest.param(
            {"NESTEROV": True, "MOMENTUM": 0.0},
            "SOLVER.NESTEROV needs SOLVER.MOMENTUM",
            id="nesterov",
        ),
        pytest.param(
            {"LR_SCHEDULER_NAME": "WarmupCosineLR", "BASE_LR_END": 2.0},
            "SOLVER.BASE_LR_END must lie between",
            id="end",
        ),
        pytest.param(
            {"LR_SCHEDULER_NAME": "WarmupStepWithFixedGammaLR", "NUM_DECAYS": 0},
            "SOLVER.NUM_DECAYS must",
            id="decays",
        ),
    ],
)
def test_bad_value_names_its_key(solver, message):
    with pytest.raises(ValueError, match=message):
        rates(make_cfg(**solver), 1)


def test_optimizer_takes_the_solver_settings():
    cfg = make_cfg(
        MOMENTUM=0.8,
        NESTEROV=True,
        WEIGHT_DECAY=0.3,
        WEIGHT_DECAY_NORM=0.1,
        WEIGHT_DECAY_BIAS=0.0,
        BIAS_LR_FACTOR=2.0,
    )
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.SGD)
    found = {
        id(p): (g["lr"], g["weight_decay"], g["momentum"], g["nesterov"])
        for g in optimizer.param_groups
        for p in g["params"]
    }
    assert found[id(model[0].weight)] == (1.0, 0.3, 0.8, True)
    assert found[id(model[1].weight)] == (1.0, 0.1, 0.8, True)
    assert found[id(model[0].bias)] == found[id(model[1].bias)] == (2.0, 0.0, 0.8, True)


def test_clipping_is_installed_when_enabled():
    cfg = make_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.5
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = build_optimizer(cfg, model)
    model.weight.grad = torch.tensor([[4.0]])
    optimizer.step()
    assert model.weight.item() == -0.5


def test_adamw_takes_its_settings_and_the_groups_of_norms_and_biases():
    cfg = make_cfg(
        OPTIMIZER="AdamW", WEIGHT_DECAY=0.3, WEIGHT_DECAY_NORM=0.1, WEIGHT_DECAY_BIAS=0.0
    )
    cfg.SOLVER.ADAMW.BETAS, cfg.SOLVER.ADAMW.EPS = (0.8, 0.9), 1e-6
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    found = {
        id(p): (g["lr"], g["weight_decay"], g["betas"], g["eps"])
        for g in optimizer.param_groups
        for p in g["params"]
    }
    assert found[id(model[0].weight)] == (1.0, 0.3, (0.8, 0.9), 1e-6)
    assert found[id(model[1].weight)] == (1.0, 0.1, (0.8, 0.9), 1e-6)
    assert found[id(model[0].bias)] == (1.0, 0.0, (0.8, 0.9), 1e-6)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("BETAS", (0.9,), r"SOLVER\.ADAMW\.BETAS must be two numbers in \[0, 1\), got \(0\.9,\)"),
        ("BETAS", (0.9, 1.0), r"SOLVER\.ADAMW\.BETAS must be two"),
        ("EPS", 0.0, r"SOLVER\.ADAMW\.EPS must be above 0"),
    ],
)
def test_bad_settings_of_adamw_name_their_key(key, value, message):
    cfg = make_cfg(OPTIMIZER="AdamW")
    cfg.SOLVER.ADAMW[key] = value
    with pytest.raises(ValueError, match=message):
        build_optimizer(cfg, nn.Linear(2, 2))


def test_factors_by_name_reach_weights_and_biases():
    cfg = make_cfg(LR_MULT=[["^0", 0.5]], BIAS_LR_FACTOR=2.0)
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    found = {id(p): g["lr"] for g in build_optimizer(cfg, model).param_groups for p in g["params"]}
    assert [found[id(p)] for p in model.parameters()] == [0.5, 1.0, 1.0, 2.0]


# --- gradient clipping ---


def step_with(clip_type, clip_value, norm_type=2.0, enabled=True):
    """The gradients (3, -4) and (0, 12) as a step sees them: parameters from zero, one SGD step of rate 1."""
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = enabled
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = clip_type
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = clip_value
    cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE = norm_type
    a, b, unused = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, -4.0]), torch.tensor([0.0, 12.0])
    optimizer = torch.optim.SGD([a, b, unused], lr=1.0)
    assert maybe_add_gradient_clipping(cfg, optimizer) is optimizer
    optimizer.step()
    return (-a).tolist(), (-b).tolist()


@pytest.mark.parametrize(
    ("clip_type", "value", "norm_type", "a", "b"),
    [
        pytest.param("value", 3.5, 2.0, [3.0, -3.5], [0.0, 3.5], id="value"),
        pytest.param("norm", 10.0, 2.0, [3.0, -4.0], [0.0, 10.0], id="norm-each-by-itself"),
        pytest.param("norm", 2.0, float("inf"), [1.5, -2.0], [0.0, 2.0], id="largest-element"),
        pytest.param("full_model", 6.5, 2.0, [1.5, -2.0], [0.0, 6.0], id="full-model-norm-13"),
    ],
)
def test_gradients_are_clipped_before_the_step(clip_type, value, norm_type, a, b):
    got_a, got_b = step_with(clip_type, value, norm_type)
    assert got_a == pytest.approx(a, rel=1e-5)
    assert got_b == pytest.approx(b, rel=1e-5)


def test_disabled_leaves_gradients_alone():
    assert step_with("value", 1.0, enabled=False) == ([3.0, -4.0], [0.0, 12.0])


def test_unknown_type_names_the_key_and_near_misses():
    with pytest.raises(
        ValueError,
        match=r"SOLVER.CLIP_GRADIENTS.CLIP_TYPE must be one of .* got 'values'.* 'value'",
    ):
        step_with("values", 1.0)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_value_must_be_positive(value):
    with pytest.raises(ValueError, match=r"SOLVER.CLIP_GRADIENTS.CLIP_VALUE must be above 0"):
        step_with("norm", value)


def test_class_of_optimizers_clips():
    cfg = get_cfg()
    assert maybe_add_gradient_clipping(cfg, torch.optim.SGD) is torch.optim.SGD
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = GradientClipType.VALUE.value
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.5
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = maybe_add_gradient_clipping(cfg, torch.optim.SGD)([parameter], lr=1.0)
    assert isinstance(optimizer, torch.optim.SGD)
    parameter.grad = torch.tensor([3.0, -0.2])
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.5, 0.2]))


@pytest.mark.parametrize(
    ("clip_type", "expected"), [("value", [2.0, 2.0]), ("norm", [1.2, 1.6]), ("full_model", None)]
)
def test_clipper_of_the_settings_takes_one_parameter_or_several(clip_type, expected):
    settings = make_cfg().SOLVER.CLIP_GRADIENTS
    settings.CLIP_TYPE, settings.CLIP_VALUE = clip_type, 2.0
    clip = _create_gradient_clipper(settings)
    settings.CLIP_VALUE = 100.0
    first, second = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    for parameter in (first, second):
        parameter.grad = torch.tensor([3.0, 4.0])
    if clip_type == "full_model":
        clip([first, second])
        assert torch.cat([first.grad, second.grad]).norm() == pytest.approx(2.0)
        return
    clip(first)
    assert first.grad.tolist() == pytest.approx(expected)
    assert second.grad.tolist() == [3.0, 4.0]
