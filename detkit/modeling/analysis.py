"""How much a model computes and holds: operations, activations, parameters; over fvcore.

Legend: N images.
"""

import functools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from detkit.layers import cpu_kernels
from detkit.structures import Instances
from detkit.utils.module_state import preserved_modes


class _OfTensors(nn.Module):
    """A model as a function of tensors, which is what can be traced."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.model = model
        leaves, self._structure = pytree.tree_flatten(inputs)
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._leaves = leaves
        self.tensors = tuple(leaves[i] for i in self._places)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        outputs = self.model(pytree.tree_unflatten(leaves, self._structure))
        return tuple(_tensors_of(outputs))


def _tensors_of(outputs: Any) -> list[Tensor]:
    found = []
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, Instances):
            found += _tensors_of(list(leaf.get_fields().values()))
        elif isinstance(leaf := getattr(leaf, "tensor", leaf), Tensor):
            found.append(leaf)
    return found


class FlopCountAnalysis:
    """Counts of a model's operations for given inputs: fvcore's class of this name.

    A multiplication with an addition counts as one. The model runs as it does in inference, without
    the faster convolutions of CPUs; numbers that depend on how many objects it finds vary.

    Example:
        ```python
        flops = FlopCountAnalysis(model, [{"image": torch.rand(3, 800, 800)}])
        flops.total(), flops.by_operator()["conv"], flops.by_module()["backbone"]
        ```
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        """Take a model and the inputs that it is called with, such as N dicts with `image`."""
        # Imported here: fvcore.nn compiles with torch.jit.script on import, which today's torch
        # warns about.
        from fvcore.nn import FlopCountAnalysis as Analysis

        self._model = model
        wrapped = _OfTensors(model, inputs)
        self._analysis = Analysis(wrapped, wrapped.tensors)
        self._analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        self._analysis.tracer_warnings("none")

    def _counted(self, name: str, *args: Any) -> Any:
        with preserved_modes(self._model), torch.no_grad(), cpu_kernels(False):
            self._model.eval()
            return getattr(self._analysis, name)(*args)

    def __getattr__(self, name: str) -> Any:
        """Answer fvcore's other methods, such as `unsupported_ops` and those that set warnings."""
        if name == "_analysis":  # not set yet
            raise AttributeError(name)
        method = getattr(self._analysis, name)

        @functools.wraps(method)
        def called(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            return self if result is self._analysis else result

        return called

    def total(self, module_name: str = "") -> int:
        """Return the operations of the model, or of one of its modules."""
        return self._counted("total", _inside(module_name))

    def by_operator(self, module_name: str = "") -> Mapping[str, int]:
        """Return the operations by kind, such as `conv`."""
        return self._counted("by_operator", _inside(module_name))

    def by_module(self) -> dict[str, int]:
        """Return the operations by the name of the module, "" for the model."""
        return _by_module(self._counted("by_module"))

    def by_module_and_operator(self) -> dict[str, Mapping[str, int]]:
        """Return the operations by module and kind."""
        return _by_module(self._counted("by_module_and_operator"))


def _inside(module_name: str) -> str:
    return f"model.{module_name}" if module_name else ""


def _by_module(counts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name.removeprefix("model").removeprefix("."): count
        for name, count in counts.items()
        if name.startswith("model")
    }


def flop_count_operators(model: nn.Module, inputs: Any) -> defaultdict[str, float]:
    """Return a model's operations by kind, in units of 10^9; see `FlopCountAnalysis`."""
    counts = FlopCountAnalysis(model, inputs).by_operator()
    return defaultdict(float, {name: count / 1e9 for name, count in counts.items()})


def activation_count_operators(model: nn.Module, inputs: Any) -> defaultdict[str, float]:
    """Return the sizes of what a model's operations return by kind, in units of 10^6 numbers."""
    from fvcore.nn import ActivationCountAnalysis

    wrapped = _OfTensors(model, inputs)
    with preserved_modes(model), torch.no_grad(), cpu_kernels(False):
        model.eval()
        analysis = ActivationCountAnalysis(wrapped, wrapped.tensors)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counts = analysis.tracer_warnings("none").by_operator()
    return defaultdict(float, {name: count / 1e6 for name, count in counts.items()})


def parameter_count(model: nn.Module) -> defaultdict[str, int]:
    """Return the number of parameters of each module and parameter by name, "" for the model.

    A parameter that several modules share counts once in each of them.
    """
    counts: defaultdict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        for k in range(len(parts) + 1):
            counts[".".join(parts[:k])] += parameter.numel()
    return counts


def parameter_count_table(model: nn.Module, max_depth: int = 3) -> str:
    """Return a table of the parameters of a model's modules, down to a depth."""
    from fvcore.nn import parameter_count_table as table

    return table(model, max_depth)


def find_unused_parameters(model: nn.Module, inputs: Any) -> list[str]:
    """Return the names of the parameters that get no gradient from the losses of a batch.

    Args:
        model: In training mode.
        inputs: A batch.

    Raises:
        ValueError: The model is in eval mode.
    """
    if not model.training:
        raise ValueError("the model must be in training mode: its losses are what is looked at")
    before = {name: p.grad for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None
    losses = model(inputs)
    losses = losses if isinstance(losses, Mapping) else {"loss": losses}
    torch.stack(list(losses.values())).sum().backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    for name, parameter in model.named_parameters():
        parameter.grad = before[name]
    return unused
