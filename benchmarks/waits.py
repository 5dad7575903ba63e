"""Count how often a program waits for its device: what it asks of a GPU, without one.

Each operator here either gives the host a number, or gives a tensor whose size the device must tell
first. On a GPU the host waits for all that was queued before, and the device then waits for the
host.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_ROOT = Path(__file__).resolve().parents[1]
_OPERATORS = {
    "aten::_local_scalar_dense": "item",  # also float(), int() and the boolean test
    "aten::nonzero": "nonzero",
    "aten::masked_select": "masked_select",
    "aten::_unique2": "unique",
    "aten::unique_consecutive": "unique",
    "aten::unique_dim": "unique",
    "aten::bincount": "bincount",
    "torchvision::nms": "nms",
}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# What takes a tensor to the host without an operator where it lies there already.
_TO_HOST = {Tensor.tolist: "tolist", Tensor.cpu: "cpu"}


class Waits:
    """The waits of the code within `with`, as far as operators show them.

    On a CPU nothing tells that a value has to come from another device: copies by `to` are not
    counted there.

    Example:
        >>> import torch
        >>> with Waits() as waits:
        ...     torch.arange(6)[torch.arange(6) > 2].sum().item()
        12
        >>> dict(waits.kinds)
        {'index by a mask': 1, 'item': 1}

    Attributes:
        kinds: How often each kind occurred.
        places: The same by kind, and file and line in this checkout.
    """

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.places: Counter[str] = Counter()
        self._modes = (_Operators(self._count), _Methods(self._count))

    def __enter__(self) -> "Waits":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*exc_info)

    def __len__(self) -> int:
        return self.kinds.total()

    def _count(self, kind: str) -> None:
        self.kinds[kind] += 1
        self.places[f"{kind} at {_place()}"] += 1


class _Operators(TorchDispatchMode):
    def __init__(self, count: Callable[[str], None]) -> None:
        super().__init__()
        self._count = count

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        if name in _OPERATORS:
            self._count(_OPERATORS[name])
        elif name in _INDEXING and _has_mask(args[1]):
            self._count("index by a mask")
        elif name == "aten::repeat_interleave" and not (kwargs or {}).get("output_size"):
            self._count("repeat_interleave")
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, count: Callable[[str], None]) -> None:
        super().__init__()
        self._count = count

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _TO_HOST:
            self._count(_TO_HOST[func])
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _place() -> str:
    """Return file and line in this checkout that called torch."""
    own = Path(__file__).name
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        # A virtual environment may lie in the checkout.
        is_ours = path.is_relative_to(_ROOT) and "site-packages" not in path.parts
        if is_ours and path.name != own:
            return f"{path.relative_to(_ROOT)}:{frame.lineno}"
    return "elsewhere"
