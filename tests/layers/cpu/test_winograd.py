import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from detkit.layers import Conv2d, cpu_kernels, get_norm
from detkit.layers.cpu import winograd
from detkit.layers.cpu.prepared_weights import PreparedWeights
from detkit.layers.cpu.winograd import WinogradConv2d, transform_weight, winograd_applies
from detkit.layers.cpu.winograd import winograd_conv2d as convolve_points

CHANNELS_LAST = torch.channels_last


def winograd_conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return convolve_points(x, transform_weight(weight), bias)


def _map(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(
        memory_format=CHANNELS_LAST
    )


def _weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) / (9 * shape[1]) ** 0.5


def _assert_equals_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    want = F.conv2d(x, weight, bias, padding=1)
    got = winograd_conv2d(x, weight, bias)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize(
    ("N", "C", "K", "H", "W"),
    [
        pytest.param(1, 8, 8, 12, 18, id="whole tiles"),
        pytest.param(1, 8, 8, 13, 19, id="one pixel over"),
        pytest.param(1, 8, 8, 11, 17, id="one pixel short"),
        pytest.param(1, 8, 8, 9, 12, id="height between"),
        pytest.param(1, 8, 8, 12, 9, id="width between"),
        pytest.param(1, 8, 8, 1, 1, id="one pixel"),
        pytest.param(1, 8, 8, 1, 9, id="one row"),
        pytest.param(1, 8, 8, 10, 1, id="one column"),
        pytest.param(1, 8, 8, 50, 250, id="several strips"),
        pytest.param(1, 2, 3, 14, 1560, id="row longer than a strip"),
        pytest.param(5, 4, 6, 14, 14, id="regions"),
        pytest.param(11, 4, 6, 7, 5, id="oblong regions, last row not full"),
        pytest.param(1500, 2, 2, 7, 7, id="several mosaics"),
        pytest.param(2, 4, 6, 16, 17, id="too wide for regions"),
        pytest.param(3, 8, 16, 7, 10, id="three images"),
        pytest.param(2, 1, 5, 6, 7, id="one channel in"),
        pytest.param(2, 5, 1, 6, 7, id="one channel out"),
        pytest.param(2, 128, 144, 61, 63, id="a size that applies"),
    ],
)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_equals_torch(N, C, K, H, W, has_bias):
    bias = torch.linspace(-1, 1, K) if has_bias else None
    _assert_equals_torch(_map(N, C, H, W), _weight(K, C, 3, 3), bias)


def test_equals_torch_with_channels_last_weights():
    _assert_equals_torch(
        _map(1, 8, 9, 9), _weight(6, 8, 3, 3).to(memory_format=CHANNELS_LAST), None
    )


def test_images_of_a_batch_do_not_mix():
    x, weight = _map(3, 8, 9, 20), _weight(8, 8, 3, 3)
    one_by_one = torch.cat([winograd_conv2d(x_i[None], weight) for x_i in x])
    torch.testing.assert_close(winograd_conv2d(x, weight), one_by_one, rtol=0, atol=0)


def test_regions_of_a_mosaic_do_not_mix():
    x, weight = _map(6, 8, 7, 5), _weight(8, 8, 3, 3)
    x[2] = 0
    y = winograd_conv2d(x, weight, torch.ones(8))
    assert torch.all((y[2] - 1).abs() <= 1e-4)


def test_inputs_are_not_changed():
    tensors = (_map(1, 8, 9, 10), _weight(8, 8, 3, 3), torch.ones(8))
    before = [tensor.clone() for tensor in tensors]
    winograd_conv2d(*tensors)
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))


@pytest.mark.parametrize("size", [(12, 12), (13, 10)], ids=["whole tiles", "odd"])
def test_result_is_channels_last(size):
    assert winograd_conv2d(_map(2, 8, *size), _weight(6, 8, 3, 3)).is_contiguous(
        memory_format=CHANNELS_LAST
    )


@pytest.mark.parametrize(
    "shape", [(0, 8, 5, 6), (2, 8, 0, 6), (2, 8, 5, 0)], ids=["no images", "no rows", "no columns"]
)
def test_nothing_in_gives_nothing_out(shape):
    y = winograd_conv2d(_map(*shape), _weight(6, 8, 3, 3), torch.ones(6))
    assert y.shape == (shape[0], 6, *shape[2:])


def _conv(in_channels: int = 128, out_channels: int = 128, **changes) -> Conv2d:
    arguments = {"kernel_size": 3, "padding": 1} | changes
    torch.manual_seed(0)
    return Conv2d(in_channels, out_channels, **arguments).eval()


def _applies(conv: nn.Conv2d, x: torch.Tensor) -> bool:
    return winograd_applies(x, list(conv.parameters()), conv)


@pytest.mark.parametrize(
    "changes", [{}, {"bias": False}, {"out_channels": 256}], ids=["bias", "no bias", "wider"]
)
def test_applies_to_inference_of_a_large_map(changes):
    with torch.no_grad():
        assert _applies(_conv(**changes), _map(1, 128, 60, 60))


def test_applies_where_gradients_are_on_and_nothing_needs_one():
    assert _applies(_conv().requires_grad_(False), _map(1, 128, 60, 60))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"stride": 2}, id="stride"),
        pytest.param({"padding": 0}, id="no padding"),
        pytest.param({"padding": "same"}, id="padding by name"),
        pytest.param({"padding": 2, "dilation": 2}, id="dilation"),
        pytest.param({"groups": 2}, id="groups"),
        pytest.param({"padding_mode": "reflect"}, id="padding mode"),
        pytest.param({"kernel_size": 1, "padding": 0}, id="1 x 1"),
        pytest.param({"kernel_size": 5}, id="5 x 5"),
        pytest.param({"kernel_size": (3, 1)}, id="3 x 1"),
        pytest.param({"in_channels": 64}, id="few channels in"),
        pytest.param({"out_channels": 64}, id="few channels out"),
        pytest.param({"dtype": torch.float64}, id="weight in another dtype"),
        pytest.param({"device": "meta"}, id="weight on another device"),
    ],
)
def test_does_not_apply_to_other_layers(changes):
    conv = _conv(**changes)
    with torch.no_grad():
        assert not _applies(conv, _map(1, conv.in_channels, 60, 60))


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(_map(1, 128, 60, 60).contiguous(), id="contiguous"),
        pytest.param(_map(1, 128, 60, 120)[..., ::2], id="with gaps"),
        pytest.param(_map(1, 128, 54, 60), id="small"),
        pytest.param(_map(1, 128, 1, 594), id="one row"),
        pytest.param(_map(1, 128, 60, 60).bfloat16(), id="bfloat16"),
        pytest.param(_map(1, 128, 60, 60).double(), id="float64"),
        pytest.param(_map(1, 128, 60, 60).to("meta"), id="another device"),
        pytest.param(torch.zeros(128, 60, 60), id="no batch dimension"),
        pytest.param(_map(1, 129, 60, 60), id="wrong channels"),
    ],
)
def test_does_not_apply_to_other_inputs(x):
    with torch.no_grad():
        assert not _applies(_conv(), x)


def test_does_not_apply_under_autocast():
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert not _applies(_conv(), _map(1, 128, 60, 60))


def _vmap(function, x):
    return torch.func.vmap(function)(x[None])


def _gradient(function, x):
    return torch.func.grad(function)(x)


def _forward_gradient(function, x):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, x))


def _fake(function, x):
    with FakeTensorMode() as mode:
        return function(mode.from_tensor(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch loads its own
@pytest.mark.parametrize("transform", [_vmap, _gradient, _forward_gradient, _fake])
def test_does_not_apply_where_torch_must_know_the_operators(transform):
    conv, x, found = _conv().requires_grad_(False), _map(1, 128, 60, 60), []
    assert _applies(conv, x)

    def look(x: torch.Tensor) -> torch.Tensor:
        found.append(_applies(conv, x))
        return x.sum()

    transform(look, x)
    assert found == [False]
    assert _applies(conv, x)


def test_applies_to_smaller_maps_where_weights_are_kept():
    conv, small, smaller = _conv(), _map(1, 128, 30, 36), _map(1, 128, 30, 30)
    with torch.no_grad(), PreparedWeights().in_use():
        assert _applies(conv, small)
        assert not _applies(conv, smaller)
    with torch.no_grad():
        assert not _applies(conv, small)


@pytest.mark.parametrize("name", ["input", "weight", "bias"])
def test_applies_to_training_on_batches_that_pay_for_it(name):
    conv, small = _conv().train().requires_grad_(False), _map(1, 128, 60, 60)
    for x, applies in [(small, False), (_map(1, 128, 90, 60), True), (_map(2, 128, 60, 60), True)]:
        tensors = {"input": x, "weight": conv.weight, "bias": conv.bias}
        tensors[name].requires_grad_()
        assert _applies(conv, x) == applies
        with PreparedWeights().in_use():
            assert _applies(conv, x) == applies


@pytest.mark.parametrize(
    ("num_regions", "applies"), [(10, False), (11, False), (16, True), (24, True)]
)
def test_applies_to_many_regions(num_regions, applies):
    with torch.no_grad():
        assert _applies(_conv(), _map(num_regions, 128, 14, 14)) == applies
    assert _applies(_conv(), _map(num_regions, 128, 14, 14)) == (num_regions == 24)
    with torch.no_grad(), PreparedWeights().in_use():
        assert _applies(_conv(), _map(num_regions, 128, 14, 14)) == (num_regions >= 10)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_exported_graph_holds_the_plain_convolution(strict):
    with torch.no_grad():
        program = torch.export.export(_conv(), (_map(1, 128, 60, 60),), strict=strict)
    assert any("conv2d" in str(node.target) for node in program.graph.nodes)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning")
def test_traced_graph_holds_the_plain_convolution():
    with torch.no_grad():
        graph = torch.jit.trace(_conv(), _map(1, 128, 60, 60), check_trace=False).inlined_graph
    assert "aten::_convolution" in str(graph)


@pytest.fixture
def winograd_calls(monkeypatch):
    calls = []

    def record(*args):
        calls.append(args)
        return convolve_points(*args)

    monkeypatch.setattr("detkit.layers.conv.winograd_conv2d", record)
    return calls


@pytest.mark.parametrize("norm", ["", "FrozenBN", "BN", "GN"])
def test_layer_in_inference_uses_it_and_equals_torch(norm, winograd_calls):
    conv, x = _conv(norm=get_norm(norm, 128), activation=F.relu_), _map(2, 128, 61, 62)
    with torch.no_grad():
        if norm in ("FrozenBN", "BN"):
            conv.norm.running_var.uniform_(0.5, 2)
            conv.norm.bias.uniform_(-1, 1)
        got = conv(x)
        want = F.conv2d(x, conv.weight, conv.bias, padding=1)
        want = F.relu(want if conv.norm is None else conv.norm(want))
    assert len(winograd_calls) == 1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("norm", ["", "FrozenBN", "GN"])
def test_layer_in_training_equals_torch(norm):
    conv, x = _conv(norm=get_norm(norm, 128)).train(), _map(2, 128, 61, 62).requires_grad_()
    if norm == "FrozenBN":
        conv.norm.running_var.uniform_(0.5, 2)
    inputs = [x, *conv.parameters()]
    got = conv(x)
    with cpu_kernels(False):
        want = conv(x)
    assert not torch.equal(got, want)
    output_gradient = _map(*got.shape)
    for y, y_want in zip(
        (got, *torch.autograd.grad(got, inputs, output_gradient)),
        (want, *torch.autograd.grad(want, inputs, output_gradient)),
        strict=True,
    ):
        torch.testing.assert_close(y, y_want, rtol=0, atol=1e-4 * y_want.abs().max().item())


@pytest.mark.parametrize(
    ("N", "C", "K", "H", "W"),
    [
        pytest.param(2, 8, 6, 12, 18, id="whole tiles"),
        pytest.param(2, 5, 7, 13, 19, id="one pixel over"),
        pytest.param(1, 3, 4, 1, 1, id="one pixel"),
        pytest.param(1, 4, 3, 50, 250, id="several strips"),
        pytest.param(11, 4, 6, 7, 5, id="regions"),
        pytest.param(1500, 2, 2, 7, 7, id="several mosaics"),
        pytest.param(0, 4, 3, 6, 6, id="no images"),
    ],
)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_gradients_equal_those_of_torch(N, C, K, H, W, has_bias):
    inputs = [_map(N, C, H, W), _weight(K, C, 3, 3)]
    inputs += [torch.linspace(-1, 1, K)] if has_bias else []
    x, weight, bias = *(tensor.requires_grad_() for tensor in inputs), *[None] * (not has_bias)
    output_gradient = torch.randn((N, K, H, W), generator=torch.Generator().manual_seed(2))
    got = torch.autograd.grad(WinogradConv2d.apply(x, weight, bias), inputs, output_gradient)
    want = torch.autograd.grad(F.conv2d(x, weight, bias, padding=1), inputs, output_gradient)
    for y, y_want in zip(got, want, strict=True):
        atol = 1e-4 * y_want.abs().max().item() if y_want.numel() > 0 else 0
        torch.testing.assert_close(y, y_want, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("name", "computed"),
    [("input", ["winograd_conv2d"]), ("weight", ["_weight_gradient"]), ("bias", [])],
)
def test_only_gradients_that_are_needed_are_computed(monkeypatch, name, computed):
    tensors = {"input": _map(1, 8, 9, 10), "weight": _weight(6, 8, 3, 3), "bias": torch.ones(6)}
    tensors[name].requires_grad_()
    loss = WinogradConv2d.apply(*tensors.values()).sum()
    calls = []
    for function in (convolve_points, winograd._weight_gradient):

        def record(*args, function=function):
            calls.append(function.__name__)
            return function(*args)

        monkeypatch.setattr(winograd, function.__name__, record)
    loss.backward()
    assert calls == computed


def test_gradients_of_gradients_equal_those_of_torch():
    x, weight = _map(1, 4, 9, 10).requires_grad_(), _weight(3, 4, 3, 3).requires_grad_()

    def second(convolve) -> tuple[torch.Tensor, ...]:
        loss = convolve(x, weight, torch.ones(3)).square().sum()
        (of_input,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(of_input.square().sum(), (x, weight))

    got = second(WinogradConv2d.apply)
    want = second(lambda *tensors: F.conv2d(*tensors, padding=1))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_backward_under_autocast_computes_as_the_forward_pass_did():
    x, weight = _map(1, 4, 9, 10).requires_grad_(), _weight(3, 4, 3, 3).requires_grad_()
    want = torch.autograd.grad(F.conv2d(x, weight, padding=1).square().sum(), (x, weight))
    loss = WinogradConv2d.apply(x, weight, None).square().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(loss, (x, weight))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_backward_of_a_batch_of_gradients_equals_that_of_torch():
    x, weight = _map(1, 4, 9, 10).requires_grad_(), _weight(3, 4, 3, 3).requires_grad_()
    gradients = torch.randn(2, 1, 3, 9, 10, generator=torch.Generator().manual_seed(2))

    def backward(output):
        return torch.func.vmap(lambda g: torch.autograd.grad(output, (x, weight), g))(gradients)

    got = backward(WinogradConv2d.apply(x, weight, None))
    torch.testing.assert_close(got, backward(F.conv2d(x, weight, padding=1)), rtol=1e-4, atol=1e-3)
