import datetime
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from detkit.layers import Conv2d
from detkit.layers.norm import fixed_norm
from detkit.layers.sync_batch_norm import SyncBatchNorm2d
from detkit.utils import comm

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
