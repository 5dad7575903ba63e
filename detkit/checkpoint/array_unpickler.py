"""A reader of pickles that hold arrays, numbers, strings and containers, and nothing else.

Detectron2's model zoo distributes weights as pickles of NumPy arrays. A pickle is a program: it
names functions and the arguments to call them with. Here every name outside a short table is
refused, and those in the table resolve to stand-ins that only record their arguments: NumPy's own
`dtype.__setstate__` and `ndarray.__setstate__` trust their input. The stand-ins check it, and build
the tensors at the end.
"""

import math
import pickle
import pickletools
from collections.abc import Callable
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

_NUMBER_CODES = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))
_MEMO_OPCODES = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


class UnsafePickleError(pickle.UnpicklingError):
    """A pickle that asks for a function or class that weights do not need."""

    def __init__(self, asked_for: str) -> None:
        super().__init__(asked_for)
        self.asked_for = asked_for


def load_array_pickle(file: IO[bytes]) -> Any:
    """Load a pickle of arrays without running anything: arrays become tensors, scalars numbers.

    The file must allow `seek`.

    Raises:
        UnsafePickleError: The pickle asks for anything but arrays and containers.
        Exception: The pickle is broken; the type depends on where.
    """
    require_modest_memo(file)
    # latin1 maps the strings of Python 2 to the same bytes, which is what arrays are stored in.
    return _Plain().convert(_ArrayUnpickler(file, encoding="latin1").load())


def require_modest_memo(file: IO[bytes]) -> None:
    """Refuse a pickle that numbers its objects beyond their count.

    Raises:
        pickle.UnpicklingError: It does, or it is incomplete.
    """
    # Python's unpickler keeps objects in an array by number: nine bytes that number one object two
    # billion take gigabytes.
    start = file.tell()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file), start=1):
            if opcode.name in _MEMO_OPCODES and argument is not None and argument > count:
                raise pickle.UnpicklingError(f"object {count} at the most is numbered {argument}")
    except ValueError as error:
        raise pickle.UnpicklingError(str(error)) from error
    file.seek(start)


class _ArrayUnpickler(pickle.Unpickler):
    """Resolves the names in `_STAND_INS` and refuses all others."""

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in _STAND_INS:
            raise UnsafePickleError(f"{module}.{name}")
        return _STAND_INS[module, name]


class _StandIn:
    """A function that a pickle may call."""

    # Not the function itself, as a pickle can set attributes of what it gets.

    __slots__ = ("_name", "function")

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name = name
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: Any) -> None:
        raise UnsafePickleError(f"a change of {self._name}")


class _Dict(dict[Any, Any]):
    """An OrderedDict that ignores attributes, such as torch's `_metadata`."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Dtype:
    """A numpy.dtype of numbers."""

    def __init__(self, code: str, *flags: Any) -> None:
        if code not in _NUMBER_CODES:
            raise UnsafePickleError(f"arrays of dtype {code!r}")
        self._code = code
        self._byte_order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._byte_order = {"<": "<", ">": ">"}.get(state[1], "=")

    def resolve(self) -> np.dtype[Any]:
        return np.dtype(self._byte_order + self._code)


class _Array:
    """A NumPy array: shape, dtype, order and bytes, checked once all are known."""

    def __init__(self) -> None:
        self._state: tuple[Any, ...] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._state = tuple(state)[-4:]  # after a version number, since NumPy 1.0

    def tensor(self) -> Tensor:
        if self._state is None:
            raise ValueError("an array without content")
        shape, dtype, is_fortran, data = self._state
        return _as_tensor(data, dtype, shape, "F" if is_fortran else "C")


def _as_tensor(data: Any, dtype: Any, shape: Any, order: str) -> Tensor:
    """Return a tensor with its own memory from raw bytes."""
    if isinstance(data, str):  # from Python 2
        data = data.encode("latin1")
    if not isinstance(data, bytes | bytearray | memoryview) or not isinstance(dtype, _Dtype):
        raise TypeError(
            f"an array must have bytes and a number type, got {type(data).__name__},"
            f" {type(dtype).__name__}"
        )
    if not isinstance(shape, tuple) or not all(
        isinstance(side, int) and side >= 0 for side in shape
    ):
        raise ValueError(f"an array's shape must be a tuple of sizes, got {shape!r}")
    number = dtype.resolve()
    if len(data) != math.prod(shape) * number.itemsize:
        raise ValueError(
            f"an array of shape {shape} and type {number} cannot have {len(data)} bytes"
        )
    array = np.frombuffer(data, dtype=number).reshape(shape, order="F" if order == "F" else "C")
    return torch.from_numpy(array.astype(number.newbyteorder("="), order="C", copy=True))


def _reconstruct(subtype: Any, *shape_and_type: Any) -> _Array:
    if subtype is not _NDARRAY:
        raise UnsafePickleError(f"an array of class {subtype!r}")
    return _Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: str) -> _Array:
    """Build an array as pickle protocol 5 does."""
    array = _Array()
    array.__setstate__((shape, dtype, order == "F", data))
    return array


def _scalar(dtype: Any, data: Any) -> Any:
    return _as_tensor(data, dtype, (), "C").item()


def _encode(text: str, encoding: str) -> bytes:
    """Build bytes as pickle protocols below 3 do."""
    if encoding != "latin1":
        raise UnsafePickleError(f"_codecs.encode(..., {encoding!r})")
    return text.encode("latin1")


def _no_bytes(*args: Any) -> bytes:
    """Build empty bytes as pickle protocol 2 does."""
    if args:
        raise UnsafePickleError("bytes(...) with arguments")
    return b""


def _never(*args: Any) -> Any:
    raise UnsafePickleError("a call of numpy.ndarray")


_NDARRAY = _StandIn("numpy.ndarray", _never)
_STAND_INS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _StandIn("collections.OrderedDict", _Dict),
    ("_codecs", "encode"): _StandIn("_codecs.encode", _encode),
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _StandIn("numpy.dtype", _Dtype),
    # Protocol 2 writes these names as Python 2 had them.
    **{
        (module, name): _StandIn(f"{module}.{name}", function)
        for module in ("__builtin__", "builtins")
        for name, function in (("set", set), ("frozenset", frozenset), ("bytes", _no_bytes))
    },
    # NumPy 2 moved numpy.core to numpy._core.
    **{
        (f"numpy.{core}.{module}", name): _StandIn(f"numpy.{core}.{module}.{name}", function)
        for core in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}


class _Plain:
    """Converts what was read to plain containers, numbers and tensors."""

    def __init__(self) -> None:
        # By identity: a shared object is converted once. The values keep the objects alive, so that
        # no other gets their id.
        self._done: dict[int, tuple[Any, Any]] = {}

    def convert(self, obj: Any) -> Any:
        if type(obj) in _PLAIN:
            return obj
        if id(obj) in self._done:
            return self._done[id(obj)][1]
        if isinstance(obj, _Array):
            plain: Any = obj.tensor()
        elif isinstance(obj, dict):
            plain = {self.convert(key): self.convert(value) for key, value in obj.items()}
        elif isinstance(obj, list | tuple | set | frozenset):
            plain = type(obj)(self.convert(item) for item in obj)
        else:
            raise UnsafePickleError(f"an object of type {type(obj).__name__}")
        self._done[id(obj)] = (obj, plain)
        return plain
