"""The switch reaches every CPU kernel, and only changes numbers by rounding."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

import detkit.layers.conv
import detkit.layers.deform_conv
from detkit.layers import (
    Conv2d,
    FrozenBatchNorm2d,
    ModulatedDeformConv,
    PreparedWeights,
    ROIAlign,
    ROIAlignRotated,
    cpu_kernels,
    cpu_kernels_enabled,
)
from detkit.layers.cpu.prepared_weights import are_weights_kept


def _run_winograd() -> torch.Tensor:
    torch.manual_seed(0)
    conv = Conv2d(128, 128, 3, padding=1).eval()
    return conv(torch.randn(1, 128, 60, 60).to(memory_format=torch.channels_last))


def _run_roi_align() -> torch.Tensor:
    torch.manual_seed(0)
    features = torch.randn(1, 4, 12, 12).to(memory_format=torch.channels_last)
    return ROIAlign(3, 1.0, 2)(features, torch.tensor([[0.0, 1.0, 2.0, 9.0, 7.5]]))


def _run_deform_conv() -> torch.Tensor:
    torch.manual_seed(0)
    layer = ModulatedDeformConv(4, 4, 3, padding=1)
    return layer(torch.randn(1, 4, 6, 6), torch.randn(1, 18, 6, 6), torch.rand(1, 9, 6, 6))


def _run_roi_align_rotated() -> torch.Tensor:
    torch.manual_seed(0)
    region = torch.tensor([[0.0, 6.0, 5.0, 7.0, 4.0, 30.0]])
    return ROIAlignRotated(3, 1.0, 2)(torch.randn(1, 4, 12, 12), region)


# A layer that uses the kernel, where the layer finds it, and its name there.
KERNELS = [
    pytest.param(_run_winograd, detkit.layers.conv, "winograd_conv2d", id="winograd"),
    pytest.param(
        _run_roi_align,
        importlib.import_module("detkit.layers.roi_align"),
        "roi_align_rows",
        id="roi_align_rows",
    ),
    pytest.param(
        _run_deform_conv, detkit.layers.deform_conv, "deform_conv2d_on_cpu", id="deform_sampling"
    ),
    pytest.param(
        _run_roi_align_rotated,
        importlib.import_module("detkit.layers.roi_align_rotated"),
        "weighted_row_sums",
        id="weighted_rows",
    ),
]


@pytest.mark.parametrize(("run", "module", "name"), KERNELS)
@pytest.mark.parametrize("way", ["context", "environment"])
def test_switched_off_no_kernel_runs_and_the_result_is_the_same(
    run, module, name, way, monkeypatch
):
    calls = []
    kernel = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: calls.append(name) or kernel(*args))
    with torch.no_grad():
        fast = run()
        assert calls == [name]
        if way == "context":
            with cpu_kernels(False):
                plain = run()
        else:
            monkeypatch.setenv("DETKIT_CPU_KERNELS", "0")
            plain = run()
    assert calls == [name]
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-4 * plain.abs().max().item())


def test_switched_off_no_weights_are_kept():
    conv = Conv2d(4, 4, 1, norm=FrozenBatchNorm2d(4))
    weights = PreparedWeights()
    with torch.no_grad(), weights.in_use():
        with cpu_kernels(False):
            conv(torch.zeros(1, 4, 2, 2))
            assert not are_weights_kept()
        assert len(weights._of_layer) == 0
        conv(torch.zeros(1, 4, 2, 2))
        assert len(weights._of_layer) == 1


def test_every_file_of_kernels_is_covered_here():
    folder = Path(detkit.layers.cpu.__path__[0])
    files = {path.stem for path in folder.glob("*.py")}
    covered = {param.id for param in KERNELS} | {"prepared_weights", "switch", "__init__"}
    assert files == covered


@pytest.mark.parametrize(
    ("value", "expected"), [(None, True), ("1", True), ("0", False), ("", True)]
)
def test_environment_variable(value, expected, monkeypatch):
    monkeypatch.delenv("DETKIT_CPU_KERNELS", raising=False)
    if value is not None:
        monkeypatch.setenv("DETKIT_CPU_KERNELS", value)
    assert cpu_kernels_enabled() is expected


def test_context_overrules_the_environment_and_ends_with_an_error(monkeypatch):
    monkeypatch.setenv("DETKIT_CPU_KERNELS", "0")
    with cpu_kernels(True):
        assert cpu_kernels_enabled()
        with pytest.raises(RuntimeError, match="stop"), cpu_kernels(False):
            raise RuntimeError("stop")
        assert cpu_kernels_enabled()
    assert not cpu_kernels_enabled()


def test_a_graph_is_recorded_without_kernels():
    layer = nn.Sequential(Conv2d(128, 128, 3, padding=1)).eval()
    x = torch.zeros(1, 128, 60, 60).to(memory_format=torch.channels_last)
    with torch.no_grad():
        graph = torch.export.export(layer, (x,), strict=True).graph
    assert any("conv2d" in str(node.target) for node in graph.nodes)
