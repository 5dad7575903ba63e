import copy
import datetime
import logging
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from detkit.layers import (
    NORM_NAMES,
    Conv2d,
    CycleBatchNormList,
    EvalBatchNorm2d,
    FrozenBatchNorm2d,
    LayerNorm2d,
    get_norm,
)
from detkit.layers import norm as norm_module
from detkit.layers.norm import SyncBatchNorm2d, fixed_norm
from detkit.utils import comm


def _trained_batchnorm(channels: int, norm_class=nn.BatchNorm2d):
    norm = norm_class(channels)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    return norm


def test_new_frozen_norm_changes_nothing():
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(FrozenBatchNorm2d(4)(x), x)


def test_frozen_norm_equals_batchnorm_in_eval_mode():
    norm = _trained_batchnorm(4)
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(norm)
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(frozen(x), norm.eval()(x))


def test_frozen_norm_has_the_names_of_batchnorm_and_no_parameters():
    frozen = FrozenBatchNorm2d(4)
    assert list(frozen.state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    assert list(frozen.parameters()) == []


def test_frozen_norm_keeps_the_dtype_of_its_input():
    assert (
        FrozenBatchNorm2d(4)(torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    )


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_training", [True, False])
def test_frozen_norm_is_folded_by_one_operator_in_later_passes(is_training):
    conv = Conv2d(4, 4, 1, bias=False, norm=FrozenBatchNorm2d(4)).train(is_training)
    x = torch.randn(1, 4, 3, 3)
    first = conv(x)
    with _Operators() as operators:
        second = conv(x)
    assert torch.equal(first, second)
    assert operators.names == ["view", "mul", "convolution"]
    second.sum().backward()
    assert conv.weight.grad is not None


def _load(norm):
    norm.load_state_dict({**norm.state_dict(), "weight": torch.full((4,), 3.0)})


def _write(norm):
    norm.weight.fill_(3)


def _replace(norm):
    norm.weight = torch.full((4,), 3.0)


def _write_data_and_train(norm):
    norm.weight.data.fill_(3)
    norm.train()


def _convert_type(norm):
    norm.weight.fill_(3)
    norm.double().float()


@pytest.mark.parametrize("change", [_load, _write, _replace, _write_data_and_train, _convert_type])
def test_frozen_norm_follows_its_buffers(change):
    norm, x = FrozenBatchNorm2d(4), torch.randn(1, 4, 2, 2)
    assert torch.equal(norm(x), x)
    change(norm)
    torch.testing.assert_close(norm(x), 3 * x)
    copied = copy.deepcopy(norm)
    copied.weight.zero_()
    torch.testing.assert_close(norm(x), 3 * x)
    assert torch.equal(copied(x), torch.zeros_like(x))


def test_frozen_norm_counts_operators_without_numbers():
    with FakeTensorMode():
        assert FrozenBatchNorm2d(4)(torch.zeros(1, 4, 2, 2)).shape == (1, 4, 2, 2)
    norm = FrozenBatchNorm2d(4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        norm(torch.zeros(1, 4, 2, 2))
    x = torch.randn(1, 4, 2, 2)
    assert torch.equal(norm(x), x)


def test_frozen_norm_takes_an_empty_batch():
    assert FrozenBatchNorm2d(4)(torch.zeros(0, 4, 2, 2)).shape == (0, 4, 2, 2)


@pytest.mark.parametrize("norm_class", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_convert_freezes_every_batchnorm_inside_and_keeps_the_names(norm_class):
    module = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Sequential(_trained_batchnorm(4, norm_class), nn.GroupNorm(2, 4))
    )
    before = {name: value.clone() for name, value in module.state_dict().items()}
    converted = FrozenBatchNorm2d.convert_frozen_batchnorm(module)
    assert converted is module
    assert [type(child) for child in module[1]] == [FrozenBatchNorm2d, nn.GroupNorm]
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


class _NormWithActivation(nn.BatchNorm2d):
    """As timm has them."""

    def forward(self, x):
        return super().forward(x).relu()


def test_convert_keeps_what_a_derived_batchnorm_computes_besides():
    module = nn.Sequential(_trained_batchnorm(4, _NormWithActivation))
    x = torch.randn(2, 4, 3, 3)
    want = module.eval()(x)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    FrozenBatchNorm2d.convert_frozen_batchnorm(module).train()
    assert torch.equal(module(x), want)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_frozen_copy_does_not_follow_its_batchnorm():
    norm = _trained_batchnorm(4)
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(norm)
    before = frozen.running_mean.clone()
    norm(torch.randn(8, 4, 2, 2) + 5)
    assert torch.equal(frozen.running_mean, before)


def test_frozen_norms_learn_again_from_where_they_stand():
    module = nn.Sequential(_trained_batchnorm(4), nn.Sequential(_trained_batchnorm(3)))
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(module.eval())
    state = {name: value.clone() for name, value in frozen.state_dict().items()}
    thawed = FrozenBatchNorm2d.convert_frozenbatchnorm2d_to_batchnorm2d(frozen)
    assert [type(thawed[0]), type(thawed[1][0])] == [nn.BatchNorm2d] * 2
    assert all(torch.equal(thawed.state_dict()[name], x) for name, x in state.items() if x.ndim)
    assert all(parameter.requires_grad for parameter in thawed.parameters())
    assert not thawed[0].training
    alone = FrozenBatchNorm2d.convert_frozenbatchnorm2d_to_batchnorm2d(FrozenBatchNorm2d(4, 1e-3))
    assert alone.eps == 1e-3
    torch.testing.assert_close(alone.running_var, torch.full((4,), 0.999))


def test_convert_needs_running_statistics():
    with pytest.raises(ValueError, match="only a batch norm with running statistics can be frozen"):
        FrozenBatchNorm2d.convert_frozen_batchnorm(nn.BatchNorm2d(4, track_running_stats=False))


def test_eval_norm_stays_in_eval_mode_with_the_names_of_batchnorm():
    norm, plain = EvalBatchNorm2d(4), _trained_batchnorm(4)
    norm.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 3, 3)
    want = plain.eval()(x)
    assert not norm.training
    torch.testing.assert_close(nn.Sequential(norm).train()(x), want)
    assert not norm.training
    assert all(torch.equal(b, plain.get_buffer(name)) for name, b in norm.named_buffers())
    assert all(parameter.requires_grad for parameter in norm.parameters())


def test_eval_norm_is_frozen_with_the_others():
    assert type(FrozenBatchNorm2d.convert_frozen_batchnorm(EvalBatchNorm2d(4))) is FrozenBatchNorm2d


def test_layer_norm_normalises_the_channels_of_each_pixel():
    x = torch.randn(2, 8, 3, 5) * 3 + 1
    y = LayerNorm2d(8)(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y.mean(dim=1), torch.zeros(2, 3, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(dim=1, unbiased=False), torch.ones(2, 3, 5), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("", type(None), id="empty"),
        pytest.param(None, type(None), id="none"),
        pytest.param("FrozenBN", FrozenBatchNorm2d, id="FrozenBN"),
        pytest.param("BN", nn.BatchNorm2d, id="BN"),
        pytest.param("SyncBN", nn.BatchNorm2d, id="SyncBN in one process"),
        pytest.param("GN", nn.GroupNorm, id="GN"),
        pytest.param("LN", LayerNorm2d, id="LN"),
        pytest.param(nn.InstanceNorm2d, nn.InstanceNorm2d, id="a class"),
    ],
)
def test_get_norm_builds_what_the_name_says(name, expected):
    norm = get_norm(name, 64)
    assert type(norm) is expected
    if norm is not None:
        assert norm(torch.randn(2, 64, 3, 3)).shape == (2, 64, 3, 3)


def test_group_norm_has_32_groups():
    norm = get_norm("GN", 64)
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == 32


@pytest.mark.parametrize(
    ("backend", "expected"), [("nccl", nn.SyncBatchNorm), ("gloo", SyncBatchNorm2d)]
)
def test_sync_bn_is_synchronised_where_there_are_processes(monkeypatch, backend, expected):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    assert type(get_norm("SyncBN", 4)) is expected


def test_sync_bn_in_one_process_says_so_once(monkeypatch):
    calls = []
    monkeypatch.setattr(
        norm_module, "log_first_n", lambda *args, **kwargs: calls.append((args, kwargs))
    )
    get_norm("SyncBN", 4)
    ((level, message), keywords) = calls[0]
    assert level == logging.INFO
    assert "built as BN" in message
    assert keywords == {"key": "SyncBN as BN"}


def test_names_are_listed_for_those_who_check_a_config():
    others = ("nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
    assert list(NORM_NAMES) == ["", "FrozenBN", "BN", "SyncBN", *others, "GN", "LN"]


def test_unknown_name_is_an_error_with_near_misses():
    with pytest.raises(
        ValueError, match=r"unknown norm 'FrozenBn'. Did you mean 'FrozenBN'.*Known: FrozenBN, BN"
    ):
        get_norm("FrozenBn", 4)


def test_group_norm_over_a_wrong_number_of_channels_is_an_error():
    with pytest.raises(ValueError, match="norm 'GN' has 32 groups: .* multiple of 32, got 48"):
        get_norm("GN", 48)


# Batches of different sizes, as images have them.
SHAPES = [(2, 3, 4, 5), (1, 3, 6, 4)]


def _batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * 3 + 10 for shape in SHAPES]


def _norm(cls, momentum: float | None) -> nn.Module:
    norm = cls(3, momentum=momentum)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    return norm


def _of_one_process(batches: list[torch.Tensor], momentum: float | None):
    """Outputs, gradients and buffers of plain batch norm over the pixels of all batches."""
    batches = [batch.clone().requires_grad_() for batch in batches]
    norm = _norm(nn.BatchNorm2d, momentum)
    pixels = torch.cat([batch.movedim(1, 0).flatten(1) for batch in batches], dim=1)
    outputs = norm(pixels[None, :, :, None])[0, :, :, 0].split(
        [b.numel() // 3 for b in batches], dim=1
    )
    sum(output.pow(3).sum() for output in outputs).backward()
    maps = [
        output.view(3, len(b), *b.shape[2:]).movedim(0, 1)
        for output, b in zip(outputs, batches, strict=True)
    ]
    return maps, [batch.grad for batch in batches], norm


def _worker(rank: int, port: int, momentum: float | None, folder: Path) -> None:
    init = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init, datetime.timedelta(seconds=60), world_size=2, rank=rank)
    outputs, grads, plain = _of_one_process(_batches(), momentum)
    norm = _norm(SyncBatchNorm2d, momentum)
    x = _batches()[rank].requires_grad_()
    y = norm(x)
    y.pow(3).sum().backward()
    torch.testing.assert_close(y, outputs[rank], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad, grads[rank], atol=1e-3, rtol=1e-4)
    total = comm.all_gather(norm.weight.grad)
    torch.testing.assert_close(sum(total), plain.weight.grad, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(dict(norm.named_buffers()), dict(plain.named_buffers()))
    dist.destroy_process_group()
    (folder / f"agreed_{rank}").touch()


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.1, None])
def test_two_processes_on_cpus_normalise_by_the_statistics_of_both(momentum, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (port, momentum, tmp_path), nprocs=2)
    assert {path.name for path in tmp_path.iterdir()} == {"agreed_0", "agreed_1"}


@pytest.mark.parametrize("momentum", [0.1, None])
def test_processes_with_nothing_to_add_leave_plain_batch_norm(monkeypatch, momentum):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    (batch, _) = _batches()
    (want,), (grad,), plain = _of_one_process([batch], momentum)
    norm, x = _norm(SyncBatchNorm2d, momentum), batch.clone().requires_grad_()
    y = norm(x)
    y.pow(3).sum().backward()
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad, grad, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(dict(norm.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("training", [True, False])
def test_one_process_has_plain_batch_norm(training):
    x = _batches()[0]
    ours, plain = (
        _norm(SyncBatchNorm2d, 0.1).train(training),
        _norm(nn.BatchNorm2d, 0.1).train(training),
    )
    assert torch.equal(ours(x), plain(x))


def test_in_eval_mode_it_is_folded_like_the_others():
    assert fixed_norm(SyncBatchNorm2d(4)) is None
    norm = SyncBatchNorm2d(4).eval()
    assert fixed_norm(norm) is norm
    assert Conv2d(3, 4, 1, norm=norm).eval()(torch.zeros(1, 3, 2, 2)).shape == (1, 4, 2, 2)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm2d])
def test_names_are_those_of_detectron2(norm):
    statistics = ["running_mean", "running_var", "num_batches_tracked"]
    expected = {"weight", "bias", *(f"{level}.{name}" for level in range(2) for name in statistics)}
    assert set(CycleBatchNormList(2, norm, num_features=4).state_dict()) == expected


def test_each_level_is_normalised_with_its_own_statistics():
    norm = CycleBatchNormList(2, num_features=4)
    maps = [torch.randn(3, 4, 5, 5), 7 + 3 * torch.randn(3, 4, 2, 2)]
    for level, x in enumerate(maps):
        torch.testing.assert_close(norm(x, level), nn.BatchNorm2d(4)(x))
    assert norm[0].running_mean.abs().max() < 0.2
    assert norm[1].running_mean.min() > 0.4


def test_levels_share_weight_and_bias():
    norm = CycleBatchNormList(2, num_features=4).eval()
    with torch.no_grad():
        norm.weight.fill_(2.0)
        norm.bias.fill_(1.0)
    x = torch.randn(1, 4, 2, 2)
    for level in range(2):
        torch.testing.assert_close(norm(x, level), 2 * x / (1 + 1e-5) ** 0.5 + 1)
    assert len(list(norm.parameters())) == 2


def test_levels_are_counted_where_they_are_not_named():
    norm = CycleBatchNormList(2, num_features=4, affine=False)
    assert not list(norm.parameters())
    for x in (torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)):
        assert norm(x).shape == x.shape
    assert [int(level.num_batches_tracked) for level in norm] == [2, 1]
    assert norm[0].running_mean.eq(0).all()
    assert norm[1].running_mean.gt(0).all()


def test_naive_synchronised_batch_norm_takes_detectron2s_mode():
    assert SyncBatchNorm2d(4, eps=1e-3, stats_mode="N").eps == 1e-3


@pytest.mark.parametrize("name", ["nnSyncBN", "naiveSyncBN", "naiveSyncBN_N"])
def test_other_names_of_synchronised_batch_norm(name):
    assert type(get_norm(name, 8)) is type(get_norm("SyncBN", 8))
