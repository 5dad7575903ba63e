"""A restricted unpickler for arrays, numbers, strings and containers, with a budget.

Detectron2's model zoo distributes weights as pickles of NumPy arrays. A pickle is a program: it
names functions and the arguments to call them with. This reader first records what a pickle would
build, without hashing or calling anything. Then it builds that from the inside out: with stand-ins
for the functions of a short table, which check their arguments, and a limit for how deep and how
large an object becomes when shared parts are counted each time. NumPy's own functions are not
called, as `dtype.__setstate__` and `ndarray.__setstate__` trust their input.
"""

import math
import pickle
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import IO, Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

# Not that in C: opcodes of this one can be replaced, and it takes no gigabytes for a pickle that
# gives an object the number two billion.
_Unpickler: Any = pickle._Unpickler
_NUMBER_CODES = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))
_PLAIN = frozenset((bool, int, float, complex, str, bytes, type(None)))
# Limits far above any checkpoint. The work is the number of objects in all objects.
_MAX_OBJECTS = 2**23
_MAX_DEPTH = 64
_MAX_INT = 2**256
_MAX_KEY_PARTS = 16
_MAX_EQUAL_HASHES = 50
_FREE_WORK = 2**20
_WORK_PER_BYTE = 64


class UnsafePickleError(pickle.UnpicklingError):
    """A pickle names a function or class that weights do not need."""

    def __init__(self, asked_for: str) -> None:
        super().__init__(asked_for)
        self.asked_for = asked_for


def load_array_pickle(file: IO[bytes]) -> Any:
    """Load a pickle with its arrays as tensors and its NumPy scalars as numbers.

    Raises:
        UnsafePickleError: The pickle names anything besides arrays and containers.
        pickle.UnpicklingError: It takes far more time or memory than its length suggests.
        Exception: The pickle is damaged; the type depends on the place of the damage.
    """
    reader = _Reader(file)
    return reader.build((reader.load(),))[0][0]


def require_modest_pickle(file: IO[bytes], num_bytes: int = 0) -> None:
    """Refuse a pickle of torch that takes far more time or memory than its length suggests.

    Containers, text and numbers are built as torch would build them, including those that the
    pickle discards again; nothing else is.

    Args:
        file: Opened for reading; is left at the end of the pickle.
        num_bytes: Bytes for the storages that the pickle names.

    Raises:
        pickle.UnpicklingError: A limit is exceeded, or the pickle is damaged.
    """
    reader = _Reader(file, is_torch=True)
    reader.build((reader.load(),))
    for obj in reader.recorded:
        reader.build(obj)
    claimed = sum(reader.claims.values())
    if claimed > num_bytes:
        raise pickle.UnpicklingError(f"{claimed} numbers in {num_bytes} bytes")


class _Name(str):
    """The full name of a function or class in a pickle."""

    __slots__ = ()


class _Recorded:
    """An object before it is built: what is called, arguments and items, and the state set last."""

    __slots__ = ("name", "num_args", "parts", "state")

    def __init__(self, name: str, args: list[Any], items: list[Any]) -> None:
        self.name, self.num_args, self.parts, self.state = name, len(args), args + items, None

    # Opcodes that fill lists, sets and dicts call these.

    def append(self, item: Any) -> None:
        self.parts.append(item)

    add = append

    def __setitem__(self, key: Any, value: Any) -> None:
        self.parts += (key, value)


class _Reader(_Unpickler):
    """Records the objects of a pickle, and builds them."""

    def __init__(self, file: IO[bytes], *, is_torch: bool = False) -> None:
        # Python 2 stored arrays as strings; latin1 maps each character to the byte of its value.
        super().__init__(file, encoding="latin1")
        self.recorded: list[_Recorded] = []
        # Length of each storage of torch, by its key.
        self.claims: dict[Any, int] = {}
        self._is_torch, self._file, self._start = is_torch, file, file.tell()
        self._work = self._max_work = 0
        # By identity, with the objects themselves: the id of a deleted one may be reused.
        self._built: dict[int, tuple[Any, Any, int, int]] = {}

    def load(self) -> Any:
        try:
            root = super().load()
        except (LookupError, struct.error) as error:
            raise pickle.UnpicklingError(f"the pickle is truncated or damaged: {error}") from error
        self._max_work = _FREE_WORK + _WORK_PER_BYTE * (self._file.tell() - self._start)
        return root

    def find_class(self, module: str, name: str, /) -> Any:
        full_name = _Name(f"{module}.{name}")
        if not self._is_torch and full_name not in _STAND_INS:
            raise UnsafePickleError(full_name)
        return full_name

    def persistent_load(self, pid: Any) -> _Name:
        if not self._is_torch:
            raise pickle.UnpicklingError("a persistent id")
        if pid[0] == "storage":  # its type, key, device and length, and in old files a view
            _, _, key, _, length, *view = pid
            _require_keys([key, *view])
            self.claims[key] = max(abs(length), self.claims.get(key, 0))
        return _Name(pid[0])  # also "module", a class, which torch refuses

    def record(self, name: str, args: list[Any], items: list[Any]) -> None:
        self.append(_Recorded(name, args, items))
        self.recorded.append(self.stack[-1])
        if len(self.recorded) > _MAX_OBJECTS:
            raise pickle.UnpicklingError(f"more than {_MAX_OBJECTS} objects")

    def load_reduce(self) -> None:
        args, name = self.stack.pop(), self.stack.pop()
        if type(name) is not _Name or type(args) is not tuple:
            raise pickle.UnpicklingError(f"a call of a {type(name).__name__}")
        self.record(name, [str(arg) if type(arg) is _Name else arg for arg in args], [])

    def load_build(self) -> None:
        state, obj = self.stack.pop(), self.stack[-1]
        if type(obj) is not _Recorded or obj.state is not None:
            raise UnsafePickleError(f"a change of {getattr(obj, 'name', obj)!r:.80}")
        obj.state = state

    dispatch: Any = {
        **_Unpickler.dispatch,
        pickle.EMPTY_LIST[0]: lambda self: self.record("builtins.list", [], []),
        pickle.LIST[0]: lambda self: self.record("builtins.list", [], self.pop_mark()),
        pickle.EMPTY_DICT[0]: lambda self: self.record("builtins.dict", [], []),
        pickle.DICT[0]: lambda self: self.record("builtins.dict", [], self.pop_mark()),
        pickle.EMPTY_SET[0]: lambda self: self.record("builtins.set", [], []),
        pickle.FROZENSET[0]: lambda self: self.record("builtins.set", [], self.pop_mark()),
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        # Python's would take and fill as many bytes as the pickle claims to have.
        pickle.BYTEARRAY8[0]: _Unpickler.load_binbytes8,
    }

    def build(self, obj: Any, level: int = 0) -> tuple[Any, int, int]:
        """Return what a tuple or recorded object becomes, and its size and depth.

        Parts that are shared count wherever they occur.

        Raises:
            UnsafePickleError: It needs a function or class that is refused.
            pickle.UnpicklingError: A limit is exceeded.
        """
        if id(obj) in self._built:
            return self._built[id(obj)][1:]
        is_tuple = type(obj) is tuple
        values, size, depth = [], 1, 0
        for part in obj if is_tuple else (*obj.parts, obj.state):
            if level > _MAX_DEPTH or depth > _MAX_DEPTH:
                raise pickle.UnpicklingError(f"objects nested more than {_MAX_DEPTH} deep")
            kind, value, part_size, part_depth = type(part), part, 1, 0
            if kind is str or kind is bytes:
                # By its length: messages show a text wherever it is shared.
                part_size += len(part) // 64
            elif kind is int:
                if not -_MAX_INT <= part <= _MAX_INT:
                    raise pickle.UnpicklingError("an integer of more than 256 bits")
            elif kind is _Name:
                if not self._is_torch:
                    raise UnsafePickleError(part)
            elif kind not in _PLAIN:
                value, part_size, part_depth = self.build(part, level + 1)
            values.append(value)
            size += part_size
            if part_depth >= depth:
                depth = part_depth + 1
        self._work += size
        if self._work > self._max_work:
            raise pickle.UnpicklingError("objects that contain each other millions of times")
        value = tuple(values) if is_tuple else self._call(obj, values)
        self._built[id(obj)] = (obj, value, size, depth)
        return value, size, depth

    def _call(self, obj: _Recorded, values: list[Any]) -> Any:
        function = _STAND_INS.get(obj.name)
        if function is None:  # of torch, which then refuses it or makes a tensor from the file
            if obj.num_args and obj.name.endswith(("Tensor", "Storage")):
                raise UnsafePickleError(f"a call of {obj.name}")
            return obj
        *parts, state = values
        more = {"items": parts[obj.num_args :]} if len(parts) > obj.num_args else {}
        if state is not None:
            more["state"] = state
        return function(*parts[: obj.num_args], **more)


_STAND_INS: dict[str, Callable[..., Any]] = {}


def _stands_for(*full_names: str) -> Callable[[F], F]:
    """Register a stand-in for a function, under its names in all versions of Python and NumPy.

    It gets the arguments of the call, what was put into the object as `items`, and its `state`.
    """

    def register(function: F) -> F:
        _STAND_INS.update(dict.fromkeys(full_names, function))
        return function

    return register


def _require_keys(keys: Sequence[Any]) -> None:
    """Refuse keys that take long to hash, and those that a dict finds only one after the other."""
    for key in keys:
        parts = key if type(key) is tuple else (key,)
        if len(parts) > _MAX_KEY_PARTS or not all(
            type(p) in _PLAIN or type(p) is _Name for p in parts
        ):
            raise pickle.UnpicklingError(f"{getattr(key, 'name', type(key).__name__)} as a key")
    if len(keys) - len(set(map(hash, keys))) > _MAX_EQUAL_HASHES:
        raise pickle.UnpicklingError(f"more than {_MAX_EQUAL_HASHES} keys of equal hash")


@_stands_for("builtins.list")
def _list(*, items: Sequence[Any] = ()) -> list[Any]:
    return list(items)


@_stands_for("builtins.dict", "collections.OrderedDict")
def _dict(
    pairs: Iterable[Any] = (), *, items: Sequence[Any] = (), state: Any = None
) -> dict[Any, Any]:
    # The state of an OrderedDict is left out, such as torch's `_metadata`.
    pairs = [*pairs, *zip(items[::2], items[1::2], strict=True)]
    _require_keys([key for key, _ in pairs])
    return dict(pairs)


@_stands_for("collections.Counter")
def _counter(counts: dict[Any, Any], *, items: Sequence[Any] = ()) -> dict[Any, Any]:
    return _dict(counts.items(), items=items)


@_stands_for(*(f"{m}.{name}" for m in ("builtins", "__builtin__") for name in ("set", "frozenset")))
def _set(members: Sequence[Any] = (), *, items: Sequence[Any] = ()) -> set[Any]:
    members = [*members, *items]
    _require_keys(members)
    return set(members)


@_stands_for(
    *(f"{m}.{name}" for m in ("builtins", "__builtin__") for name in ("bytes", "bytearray"))
)
def _bytes(data: Any = b"") -> bytes:
    """Return bytes from those that pickle protocol 2 stores otherwise."""
    if type(data) is not bytes:
        raise UnsafePickleError(f"bytes of a {type(data).__name__}")
    return data


@_stands_for("_codecs.encode")
def _encode(text: str, encoding: str) -> bytes:
    """Return bytes from the text that pickle protocols below 3 store."""
    if encoding != "latin1":
        raise UnsafePickleError(f"_codecs.encode(..., {encoding!r:.80})")
    return text.encode("latin1")


_stands_for("builtins.complex", "__builtin__.complex")(complex)


@_stands_for("torch._tensor._rebuild_from_type_v2")
def _rebuild_from_type(function: str, *args: Any) -> None:
    # It would call any function that torch knows.
    if not function.startswith("torch._utils._rebuild_"):
        raise UnsafePickleError(f"a call of {function:.80}")


@_stands_for("numpy.dtype")
def _dtype(code: str, *flags: Any, state: Sequence[Any] = (3, "=")) -> np.dtype[Any]:
    if code not in _NUMBER_CODES:
        raise UnsafePickleError(f"arrays of dtype {code!r:.80}")
    return np.dtype({"<": "<", ">": ">"}.get(state[1], "=") + code)


@_stands_for("numpy.ndarray")
def _ndarray(*args: Any) -> None:
    # Only an argument of _reconstruct.
    raise UnsafePickleError("a call of numpy.ndarray")


# NumPy 2 moved numpy.core to numpy._core.
@_stands_for("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
def _reconstruct(subtype: Any, *shape_and_type: Any, state: Sequence[Any] = ()) -> Tensor:
    if subtype != "numpy.ndarray":
        raise UnsafePickleError(f"an array of class {subtype!r:.80}")
    shape, dtype, is_fortran, data = state[-4:]  # after a version number, since NumPy 1.0
    return _as_tensor(data, dtype, shape, "F" if is_fortran else "C")


@_stands_for("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")
def _from_buffer(data: Any, dtype: Any, shape: Any, order: str) -> Tensor:
    """Return an array from the arguments that pickle protocol 5 stores."""
    return _as_tensor(data, dtype, shape, "F" if order == "F" else "C")


@_stands_for("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
def _scalar(dtype: Any, data: Any) -> Any:
    return _as_tensor(data, dtype, (), "C").item()


def _as_tensor(data: Any, dtype: Any, shape: Any, order: Literal["C", "F"]) -> Tensor:
    """Return a tensor with a copy of raw bytes."""
    if isinstance(data, str):  # from Python 2
        data = data.encode("latin1")
    if not isinstance(data, bytes) or not isinstance(dtype, np.dtype):
        raise TypeError(
            f"an array must have bytes and a number type, got {type(data).__name__},"
            f" {type(dtype).__name__}"
        )
    is_shape = isinstance(shape, tuple) and len(shape) <= 64  # NumPy's most
    if not is_shape or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"the shape of an array must be a tuple of sizes, got {shape!r:.80}")
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"an array of shape {shape} and type {dtype} cannot have {len(data)} bytes"
        )
    array = np.frombuffer(data, dtype).reshape(shape, order=order)
    return torch.from_numpy(array.astype(dtype.newbyteorder("="), order="C", copy=True))
