import copy
import gc
import pickle
import threading

import pytest
import torch
from torch import nn

from detkit.layers import Conv2d, DeformConv, FrozenBatchNorm2d, PreparedWeights
from detkit.layers.cpu.prepared_weights import are_weights_kept, prepared
from detkit.layers.norm import scale_and_shift


class _Counter:
    """Computes from a weight, and counts how often."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.layer, self.weight, self.count = nn.Identity(), weight, 0

    def __call__(self, name: str = "double") -> torch.Tensor:
        return prepared(self.layer, name, [self.weight, None], self._compute)

    def _compute(self) -> torch.Tensor:
        self.count += 1
        return 2 * self.weight


@pytest.fixture
def double():
    return _Counter(torch.ones(3))


def test_without_a_store_every_call_computes(double):
    assert torch.equal(double(), double())
    assert double.count == 2
    assert not are_weights_kept()


def test_in_use_the_first_call_computes(double):
    with PreparedWeights().in_use():
        assert are_weights_kept()
        assert double() is double()
    assert double.count == 1
    assert not are_weights_kept()


def test_a_store_remembers_from_one_use_to_the_next(double):
    weights = PreparedWeights()
    for _ in range(3):
        with weights.in_use():
            double()
    assert double.count == 1


def test_another_store_computes_its_own(double):
    for _ in range(3):
        with PreparedWeights().in_use():
            double()
    assert double.count == 3


def test_the_inner_of_two_stores_is_used_and_the_outer_comes_back(double):
    outer = PreparedWeights()
    with outer.in_use():
        first = double()
        with PreparedWeights().in_use():
            assert double() is not first
        assert double() is first


def test_an_error_ends_the_use():
    with pytest.raises(RuntimeError, match="stop"), PreparedWeights().in_use():
        raise RuntimeError("stop")
    assert not are_weights_kept()


def test_values_of_a_layer_have_names(double):
    with PreparedWeights().in_use():
        assert double("a") is not double("b")
        assert double("a") is double("a")


def _fill(counter: _Counter) -> None:
    counter.weight.fill_(5)


def _replace(counter: _Counter) -> None:
    counter.weight = torch.full((3,), 5.0)


def _set_data(counter: _Counter) -> None:
    counter.weight.data = torch.full((3,), 5.0)


def _step(counter: _Counter) -> None:
    counter.weight.grad = torch.full((3,), -4.0)
    torch.optim.SGD([counter.weight], lr=1.0).step()


def _load(counter: _Counter) -> None:
    module = nn.Module()
    module.register_buffer("w", counter.weight)
    module.load_state_dict({"w": torch.full((3,), 5.0)})


@pytest.mark.parametrize("change", [_fill, _replace, _set_data, _step, _load])
def test_changed_weights_are_noticed(double, change):
    with PreparedWeights().in_use():
        assert double().tolist() == [2, 2, 2]
        change(double)
        assert double().tolist() == [10, 10, 10]
        assert double.count == 2


def test_new_weights_at_the_address_of_the_old_ones_are_noticed():
    double = _Counter(torch.ones(4096))
    with PreparedWeights().in_use():
        double()
        for _ in range(2):  # the second time, the first memory is free unless it is held
            double.weight.data = double.weight.data + 2
        assert double()[0] == 10


def test_other_threads_are_not_concerned():
    seen = []
    with PreparedWeights().in_use():
        thread = threading.Thread(target=lambda: seen.append(are_weights_kept()))
        thread.start()
        thread.join()
    assert seen == [False]


def test_where_a_gradient_is_needed_nothing_is_kept(double):
    double.weight.requires_grad_()
    with PreparedWeights().in_use():
        with torch.no_grad():
            kept = double()
        double().sum().backward()
        assert double.weight.grad.tolist() == [2, 2, 2]
        with torch.no_grad():
            assert double() is kept


def test_values_made_in_inference_mode_serve_a_pass_with_gradients(double):
    x = torch.ones(3, requires_grad=True)
    with PreparedWeights().in_use():
        with torch.inference_mode():
            double()
        (double() * x).sum().backward()
    assert double.count == 1
    assert x.grad.tolist() == [2, 2, 2]


def test_weights_made_in_inference_mode_are_not_kept():
    with torch.inference_mode():
        double = _Counter(torch.ones(3))
    with PreparedWeights().in_use():
        double()
        with torch.inference_mode():
            double.weight.fill_(5)
        assert double().tolist() == [10, 10, 10]


def test_values_go_with_their_layer(double):
    weights = PreparedWeights()
    with weights.in_use():
        double()
    assert len(weights._of_layer) == 1
    del double.layer
    gc.collect()
    assert len(weights._of_layer) == 0


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
def test_a_copy_is_empty(double, duplicate):
    weights = PreparedWeights()
    with weights.in_use():
        double()
    with duplicate(weights).in_use():
        double()
    assert double.count == 2


def _frozen(channels: int) -> FrozenBatchNorm2d:
    norm = FrozenBatchNorm2d(channels)
    norm.running_var.uniform_(0.5, 2)
    norm.bias.uniform_(-1, 1)
    return norm


@pytest.mark.parametrize("side", [8, 60], ids=["direct", "winograd"])
@pytest.mark.parametrize("make_norm", [_frozen, lambda _: None], ids=["norm", "no norm"])
def test_convolution_gives_the_same_and_follows_its_weights(side, make_norm):
    torch.manual_seed(0)
    conv = Conv2d(128, 128, 3, padding=1, bias=False, norm=make_norm(128)).eval()
    x = torch.randn(1, 128, side, side).to(memory_format=torch.channels_last)
    with torch.no_grad(), PreparedWeights().in_use():
        for tensor in [None, *conv.state_dict().values()]:
            if tensor is not None:
                tensor.mul_(1.5)
            torch.testing.assert_close(conv(x), _without_store(conv, x), rtol=0, atol=0)


def _without_store(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Whatever was kept does not go into a copy."""
    return copy.deepcopy(conv)(x)


def test_convolutions_fold_once(monkeypatch):
    folded = []

    def record(norm):
        folded.append(norm)
        return scale_and_shift(norm)

    monkeypatch.setattr("detkit.layers.conv.scale_and_shift", record)
    conv = Conv2d(4, 4, 3, norm=_frozen(4)).eval()
    deform = DeformConv(4, 4, 1, norm=_frozen(4)).eval()
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad(), PreparedWeights().in_use():
        for _ in range(3):
            conv(x)
            deform(x, torch.zeros(1, 2, 8, 8))
    assert folded == [conv.norm, deform.norm]
