import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from detkit.layers import CheckpointedSequential, Conv2d, get_norm


def _blocks(norm: str) -> list[nn.Module]:
    torch.manual_seed(0)
    convs = [
        Conv2d(32, 32, 3, padding=1, bias=False, norm=get_norm(norm, 32), activation=torch.relu_)
        for _ in "abcd"
    ]
    return [nn.Sequential(*convs[:2]), nn.Sequential(*convs[2:])]


def _pair(norm: str = "BN") -> tuple[nn.Sequential, CheckpointedSequential]:
    plain = nn.Sequential(*_blocks(norm))
    return plain, CheckpointedSequential(*copy.deepcopy(_blocks(norm)))


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN", "LN", ""])
@pytest.mark.parametrize("training", [True, False])
def test_output_and_gradients_are_the_same_bit_for_bit(norm, training):
    x = torch.randn(2, 32, 6, 6)
    results = []
    for net in _pair(norm):
        image = x.clone().requires_grad_()
        y = net.train(training)(image)
        grads = torch.autograd.grad(y.square().sum(), [image, *net.parameters()])
        results.append([y, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_are_updated_once_per_step(momentum):
    plain, saving = _pair()
    for net in (plain, saving):
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
        for seed in range(3):
            torch.manual_seed(seed)
            net(torch.randn(2, 32, 6, 6)).sum().backward()
    for (name, a), (_, b) in zip(plain.named_buffers(), saving.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert saving.state_dict().keys() == plain.state_dict().keys()
    assert saving[0][0].norm.num_batches_tracked == 3


def test_buffers_stay_the_same_objects():
    _, net = _pair()
    before = [id(buffer) for buffer in net.buffers()]
    net(torch.randn(2, 32, 6, 6)).sum().backward()
    assert [id(buffer) for buffer in net.buffers()] == before


def test_only_the_inputs_are_kept():
    kept = []
    for net in _pair():
        sizes = {}

        def keep(tensor, sizes=sizes):
            if tensor.dim() == 4 and tensor.shape[0] == 2:  # an activation
                sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            y = net(torch.randn(2, 32, 6, 6))
        kept.append(sum(sizes.values()))
        assert y.requires_grad
    assert kept[1] <= kept[0] / 2


def test_without_gradients_nothing_is_computed_twice():
    _, net = _pair()
    calls = []
    net[0].register_forward_hook(lambda *args: calls.append(args))
    with torch.no_grad():
        net(torch.randn(2, 32, 6, 6))
    assert len(calls) == 1


def test_autocast_holds_in_the_second_pass():
    plain, saving = _pair("FrozenBN")
    x = torch.randn(2, 32, 6, 6)
    for net in (plain, saving):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = net(x)
        y.float().square().sum().backward()
    assert all(
        torch.equal(a.grad, b.grad)
        for a, b in zip(plain.parameters(), saving.parameters(), strict=True)
    )
