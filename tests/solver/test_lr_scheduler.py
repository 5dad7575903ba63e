import logging
import math

import pytest
import torch
from fvcore.common.param_scheduler import (
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
)
from torch import nn

from detkit.solver import (
    LRMultiplier,
    StepWithFixedGamma,
    WarmupCosineLR,
    WarmupMultiStepLR,
    WarmupParamScheduler,
)
from detkit.solver.lr_scheduler import warmup_factor_at


def sgd(*rates):
    return torch.optim.SGD(
        [{"params": [nn.Parameter(torch.zeros(1))], "lr": r} for r in rates or (1.0,)], lr=1.0
    )


def course(optimizer, scheduler, num_iters):
    """Learning rate of the first group at each iteration."""
    rates = []
    for _ in range(num_iters):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_linear_warmup_rises_to_the_schedule():
    warmup = WarmupParamScheduler(ConstantParamScheduler(2.0), warmup_factor=0.1, warmup_length=0.5)
    assert [warmup(w) for w in (0.0, 0.25, 0.5, 0.9)] == pytest.approx([0.2, 1.1, 2.0, 2.0])


def test_constant_warmup_jumps():
    warmup = WarmupParamScheduler(ConstantParamScheduler(1.0), 0.1, 0.5, warmup_method="constant")
    assert [warmup(w) for w in (0.0, 0.49, 0.5)] == pytest.approx([0.1, 0.1, 1.0])


def test_rescaled_schedule_starts_when_the_warmup_ends():
    fixed = WarmupParamScheduler(LinearParamScheduler(1.0, 0.0), 0.0, 0.5)
    rescaled = WarmupParamScheduler(LinearParamScheduler(1.0, 0.0), 0.0, 0.5, rescale_interval=True)
    assert [fixed(w) for w in (0.25, 0.5, 0.75)] == pytest.approx([0.25, 0.5, 0.25])
    assert [rescaled(w) for w in (0.25, 0.5, 0.75)] == pytest.approx([0.5, 1.0, 0.5])


def test_no_warmup_at_all():
    assert WarmupParamScheduler(ConstantParamScheduler(1.0), 0.001, 0.0)(0.0) == 1.0


@pytest.mark.parametrize("length", [-0.1, 1.1])
def test_warmup_length_outside_the_run_is_an_error(length):
    with pytest.raises(ValueError, match=r"warmup_length must lie in \[0, 1\]"):
        WarmupParamScheduler(ConstantParamScheduler(1.0), 0.1, length)


def test_unknown_warmup_method_is_an_error():
    with pytest.raises(ValueError, match=r"warmup_method must be linear or constant, got 'cosine'"):
        WarmupParamScheduler(ConstantParamScheduler(1.0), 0.1, 0.1, warmup_method="cosine")


def test_fixed_gamma_falls_at_equal_distances_and_has_a_value_at_the_end():
    schedule = StepWithFixedGamma(num_decays=3, gamma=0.1)
    assert [schedule(w) for w in (0, 0.24, 0.25, 0.5, 0.75, 1.0)] == pytest.approx(
        [1, 1, 0.1, 0.01, 0.001, 0.001]
    )


def test_multiplier_scales_each_group_by_its_own_base():
    optimizer = sgd(1.0, 2.0)
    scheduler = LRMultiplier(optimizer, LinearParamScheduler(1.0, 0.0), max_iter=4)
    optimizer.step()
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.75, 1.5]


def test_resumed_schedule_equals_the_undisturbed_one():
    whole, first, second = sgd(), sgd(), sgd()
    want = course(whole, LRMultiplier(whole, LinearParamScheduler(1.0, 0.0), 10), 10)
    before = LRMultiplier(first, LinearParamScheduler(1.0, 0.0), 10)
    got = course(first, before, 4)
    after = LRMultiplier(second, LinearParamScheduler(1.0, 0.0), 10)
    second.load_state_dict(first.state_dict())
    after.load_state_dict(before.state_dict())
    assert got + course(second, after, 6) == want


def test_state_holds_position_and_bases_only():
    assert LRMultiplier(sgd(), ConstantParamScheduler(1.0), 10).state_dict() == {
        "base_lrs": [1.0],
        "last_epoch": 0,
    }


def test_other_base_rate_in_the_config_is_reported_on_resume(caplog):
    state = LRMultiplier(sgd(0.5), ConstantParamScheduler(1.0), 10).state_dict()
    with caplog.at_level(logging.WARNING, logger="detkit"):
        LRMultiplier(sgd(0.1), ConstantParamScheduler(1.0), 10).load_state_dict(state)
    assert "base learning rates [0.5] of the checkpoint, not [0.1]" in caplog.text


def test_other_number_of_groups_is_an_error_on_resume():
    state = LRMultiplier(sgd(1.0, 1.0), ConstantParamScheduler(1.0), 10).state_dict()
    with pytest.raises(ValueError, match="2 parameter groups, this one 1"):
        LRMultiplier(sgd(), ConstantParamScheduler(1.0), 10).load_state_dict(state)


def test_max_iter_below_one_is_an_error():
    with pytest.raises(ValueError, match=r"max_iter must be at least 1, got 0"):
        LRMultiplier(sgd(), ConstantParamScheduler(1.0), 0)


def rates(build, steps=12):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, found = build(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_older_schedules_are_factors_with_a_warmup():
    steps = rates(lambda o: WarmupMultiStepLR(o, [6, 9], 0.1, 0.5, 4))
    assert steps[:5] == pytest.approx([1.0, 1.25, 1.5, 1.75, 2.0])
    assert steps[5:] == pytest.approx([2.0, 0.2, 0.2, 0.2, 0.02, 0.02, 0.02])
    cosine = rates(lambda o: WarmupCosineLR(o, 12, 0.5, 0))
    assert cosine == pytest.approx([1 + math.cos(math.pi * i / 12) for i in range(12)])
    assert warmup_factor_at("constant", 3, 5, 0.1) == 0.1
    with pytest.raises(ValueError, match="must rise"):
        rates(lambda o: WarmupMultiStepLR(o, [9, 6]))
    with pytest.raises(ValueError, match="linear or constant"):
        warmup_factor_at("other", 0, 5, 0.1)


def test_learning_rate_behind_the_last_iteration_is_that_of_the_end():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = LRMultiplier(optimizer, CosineParamScheduler(1, 0.25), max_iter=4)
    constant = LRMultiplier(optimizer, ConstantParamScheduler(0.5), max_iter=4)
    optimizer.step()
    for _ in range(6):
        scheduler.step()
        constant.step()  # which is not defined at the end itself
    assert scheduler.get_lr() == pytest.approx([0.5])
    assert constant.get_lr() == [1.0]
