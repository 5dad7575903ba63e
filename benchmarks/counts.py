"""Count what a program asks of its device, by its operators: numbers that need no quiet machine.

`Waits` counts where a GPU would be waited for, `Traffic` the memory that operators take and the
bytes that they only move, `Parcel` what one process sends to another.
"""

import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ROOT = Path(__file__).resolve().parents[1]
# Each either gives the host a number, or gives a tensor whose size the device must tell first. On a
# GPU the host waits for all that was queued before, and the device then waits for the host.
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
# Their output, or what they write, holds no number that was not there before. Methods such as
# `contiguous`, `to` and `reshape` come down to some of these where they copy at all.
_COPIES = {
    f"aten::{name}"
    for name in (
        "copy_",
        "_to_copy",
        "clone",
        "cat",
        "stack",
        "index",
        "index_select",
        "gather",
        "masked_select",
        "index_put",
        "index_put_",
        "_index_put_impl_",
        "index_copy",
        "index_copy_",
        "repeat",
        "flip",
        "roll",
        "constant_pad_nd",
        "slice_backward",
        "select_backward",
    )
}


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
        self._modes = (_Operators(self._observe), _Methods(self._count))

    def __enter__(self) -> "Waits":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*exc_info)

    def __len__(self) -> int:
        return self.kinds.total()

    def _observe(self, name: str, args: Any, kwargs: Any, output: Any) -> None:
        if name in _OPERATORS:
            self._count(_OPERATORS[name])
        elif name in _INDEXING and _has_mask(args[1]):
            self._count("index by a mask")
        elif name == "aten::repeat_interleave" and not kwargs.get("output_size"):
            self._count("repeat_interleave")

    def _count(self, kind: str) -> None:
        self.kinds[kind] += 1
        self.places[f"{kind} at {_place()}"] += 1


class Traffic:
    """The memory that operators take within `with`, and the bytes that are only moved.

    What an operator does within itself is not seen: a convolution may lay out its input anew.

    Example:
        >>> import torch
        >>> with Traffic() as traffic:
        ...     half = torch.zeros(1000)[:500]
        ...     doubled = torch.cat([half, half])
        >>> traffic.operators, traffic.allocations, traffic.allocated, traffic.copied.total()
        (3, 2, 8000, 4000)

    Attributes:
        operators: How many ran; views count.
        allocations: How many new pieces of memory they returned.
        allocated: Bytes of these.
        copied: Bytes written by copies, by operator, and file and line in this checkout.
    """

    def __init__(self) -> None:
        self.operators = self.allocations = self.allocated = 0
        self.copied: Counter[str] = Counter()
        self._mode = _Operators(self._observe)

    def __enter__(self) -> "Traffic":
        self._mode.__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._mode.__exit__(*exc_info)

    def _observe(self, name: str, args: Any, kwargs: Any, output: Any) -> None:
        self.operators += 1
        known = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(output):
            storage = tensor.untyped_storage()
            if storage.nbytes() > 0 and storage._cdata not in known:
                known.add(storage._cdata)
                self.allocations += 1
                self.allocated += storage.nbytes()
        if name in _COPIES:
            # Into a tensor by an index: as many numbers as there are values.
            is_part = "index_put" in name or name == "aten::index_copy_"
            written = args[2 if "put" in name else 3] if is_part else output
            self.copied[f"{name.removeprefix('aten::')} at {_place()}"] += written.nbytes


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


class Parcel:
    """What a process of the data loader sends for a value, as torch packs it.

    Attributes:
        memories: How many pieces of shared memory the tensors take: each is a file to open.
        shared: Bytes of these. A tensor takes along all of the memory that it is a view of.
        piped: Bytes of all else, which are pickled, and copied through a pipe.
    """

    def __init__(self, value: Any) -> None:
        storages: dict[int, int] = {}

        class Pickler(ForkingPickler):
            def reducer_override(self, obj: Any) -> Any:
                if not isinstance(obj, torch.UntypedStorage):
                    return NotImplemented
                storages[obj._cdata] = obj.nbytes()
                return bytes, ()  # in place of a handle of shared memory

        stream = io.BytesIO()
        Pickler(stream).dump(value)
        self.memories, self.shared = len(storages), sum(storages.values())
        self.piped = len(stream.getvalue())


class _Operators(TorchDispatchMode):
    """Calls a function with name, arguments and output of every operator, backward as well."""

    def __init__(self, observe: Callable[[str, Any, Any, Any], None]) -> None:
        super().__init__()
        self._observe = observe

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self._observe(func._schema.name, args, kwargs or {}, output)
        return output


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
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        # A virtual environment may lie in the checkout.
        is_ours = path.is_relative_to(_ROOT) and "site-packages" not in path.parts
        if is_ours and path != Path(__file__):
            return f"{path.relative_to(_ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
