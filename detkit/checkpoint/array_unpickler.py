"""A restricted unpickler for arrays, numbers, strings and containers.

Detectron2's model zoo distributes weights as pickles of NumPy arrays. A pickle is a program: it
names functions and the arguments to call them with. This reader refuses every name outside a short
table, and resolves those in the table to stand-ins that record the arguments, check them, and build
tensors. NumPy's own functions are not called, as `dtype.__setstate__` and `ndarray.__setstate__`
trust their input.
"""

import math
import pickle
import pickletools
import sys
from collections.abc import Callable
from typing import IO, Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

_NUMBER_CODES = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))
_PUTS = frozenset(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"))
_GETS = frozenset(("GET", "BINGET", "LONG_BINGET"))
_CHANGES = frozenset(("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"))
_VALUES = {"NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
# Limits of `require_modest_pickle`, far above any checkpoint. The work is the number of objects in
# all objects that are put into others.
_MAX_DEPTH = 64
_MAX_EQUAL_HASHES = 50
_FREE_WORK = 2**20
_WORK_PER_BYTE = 64
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


class UnsafePickleError(pickle.UnpicklingError):
    """A pickle names a function or class that weights do not need."""

    def __init__(self, asked_for: str) -> None:
        super().__init__(asked_for)
        self.asked_for = asked_for


def load_array_pickle(file: IO[bytes]) -> Any:
    """Load a pickle with its arrays as tensors and its NumPy scalars as numbers.

    Args:
        file: Opened for reading; must support `seek`.

    Raises:
        UnsafePickleError: The pickle names anything besides arrays and containers.
        Exception: The pickle is damaged; the type depends on the place of the damage.
    """
    start = file.tell()
    require_modest_pickle(file)
    file.seek(start)
    # Python 2 stored arrays as strings; latin1 maps each character to the byte of the same value.
    return _Plain().convert(_ArrayUnpickler(file, encoding="latin1").load())


class _Built:
    """What is known of an object that a pickle builds, before it is built."""

    __slots__ = ("check", "depth", "hash", "is_used", "largest", "size")

    def __init__(self, value: Any = None) -> None:
        self.size, self.depth, self.largest, self.is_used = 1, 0, 0, False
        # A second hash, which differs for numbers of equal hash.
        self.hash = self.check = id(self) if isinstance(value, bytes | bytearray) else hash(value)
        if isinstance(value, int):
            self.largest = abs(value)
            if self.largest >= sys.hash_info.modulus:
                self.check = hash(str(value))
        elif isinstance(value, float):
            self.check = hash(repr(value))
        elif isinstance(value, str | bytes | bytearray):
            # By length, as `repr` writes a text out wherever it is shared.
            self.size += len(value) // 64

    def __hash__(self) -> int:
        return self.hash

    def add(self, items: list[Any]) -> None:
        for item in items:
            item.is_used = True
            self.size += item.size
            if item.depth >= self.depth:
                self.depth = item.depth + 1
            if item.largest > self.largest:
                self.largest = item.largest
        # Otherwise `size` is wrong. Python fills containers before it puts them into others.
        if self.is_used:
            raise pickle.UnpicklingError("an object changes after its use in another or in itself")


def require_modest_pickle(file: IO[bytes], num_bytes: int = 0) -> None:
    """Refuse a pickle that takes far more time, stack or memory than its length suggests.

    Its opcodes are followed without building anything: only the size of each object, with shared
    parts counted each time, its depth, and its hash. Hashing, comparing and printing of nested
    tuples run in C, without an end that could be awaited or a depth that is checked.

    Args:
        file: Opened for reading; is left at the end of the pickle.
        num_bytes: Bytes for the storages of torch that the pickle names.

    Raises:
        pickle.UnpicklingError: A limit is exceeded, or the pickle is incomplete.
    """
    stack: list[_Built] = []
    marks: list[int] = []
    memo: dict[int, _Built] = {}
    checks: dict[int, set[int]] = {}
    storages: set[int] = set()
    work = claimed = count = 0
    start, problem = file.tell(), ""
    operations: Any = pickletools.genops(file)
    try:
        for count, (opcode, argument, position) in enumerate(operations, start=1):
            name = opcode.name
            if name in _PUTS:
                index = len(memo) if argument is None else argument
                # The memo of Python's unpickler is an array: nine bytes that store one object at
                # index two billion would allocate gigabytes.
                if index > count:
                    problem = f"memo index {index}"
                    break
                memo[index] = stack[-1]
                continue
            if name in _GETS or name == "DUP":
                stack.append(stack[-1] if name == "DUP" else memo[argument])
                continue
            if name == "MARK":
                marks.append(len(stack))
                continue
            if name == "POP" and marks and marks[-1] == len(stack):
                marks.pop()
                continue
            before = opcode.stack_before
            if pickletools.markobject in before:
                first = marks.pop() - before.index(pickletools.markobject)
            else:
                first = len(stack) - len(before)
            if first < 0:
                raise LookupError("it takes objects that do not exist")
            items = stack[first:]
            del stack[first:]
            if not opcode.stack_after:
                continue
            is_change, is_tuple = name in _CHANGES, "TUPLE" in name
            built = items.pop(0) if is_change else _Built(_VALUES.get(name, argument))
            size = built.size
            built.add(items)
            work += built.size - size
            if is_tuple:
                built.hash, built.check = hash(tuple(items)), hash(str([i.check for i in items]))
            elif items and not is_change:  # what a call returns is like nothing else
                built.hash = built.check = id(built)
            if name == "BINPERSID" and items[0].hash not in storages:
                # A storage of torch: its type, key, device and length.
                storages.add(items[0].hash)
                claimed += items[0].largest
            # A dict with many keys of one hash takes quadratic time.
            if is_tuple or built.largest >= sys.hash_info.modulus:
                same = checks.setdefault(built.hash, set())
                same.add(built.check)
                if len(same) > _MAX_EQUAL_HASHES:
                    problem = f"more than {_MAX_EQUAL_HASHES} different objects of equal hash"
            if claimed > num_bytes:
                problem = f"{claimed} numbers in {num_bytes} bytes"
            elif built.largest.bit_length() > 256:
                problem = "an integer of more than 256 bits"
            elif built.depth > _MAX_DEPTH:
                problem = f"objects nested more than {_MAX_DEPTH} deep"
            elif work > _FREE_WORK + _WORK_PER_BYTE * (position - start):
                problem = "objects that contain each other millions of times"
            if problem:
                break
            stack.append(built)
    except (ValueError, LookupError) as error:
        raise pickle.UnpicklingError(f"opcode {count}: {error}") from error
    if problem:
        raise pickle.UnpicklingError(f"opcode {count}: {problem}, which no weights need")


class _ArrayUnpickler(pickle.Unpickler):
    """Resolves names to the stand-ins below and refuses all others."""

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in _STAND_INS:
            raise UnsafePickleError(f"{module}.{name}")
        return _STAND_INS[module, name]


class _StandIn:
    """A function that a pickle may call in place of the one that it names."""

    # A wrapper, as a pickle may set attributes of any object, also of a function.
    __slots__ = ("_function", "_name")

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self._name = name
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise UnsafePickleError(f"a change of {self._name}")


_STAND_INS: dict[tuple[str, str], _StandIn] = {}


def _stands_for(*full_names: str) -> Callable[[F], F]:
    """Register a stand-in for a function, under its names in all versions of Python and NumPy."""

    def register(function: F) -> F:
        for full_name in full_names:
            module, _, name = full_name.rpartition(".")
            _STAND_INS[module, name] = _StandIn(full_name, function)
        return function

    return register


_stands_for("builtins.set", "__builtin__.set")(set)
_stands_for("builtins.frozenset", "__builtin__.frozenset")(frozenset)


@_stands_for("collections.OrderedDict")
class _Dict(dict[Any, Any]):
    """An OrderedDict that ignores attributes, such as torch's `_metadata`."""

    def __setstate__(self, state: Any) -> None:
        pass


@_stands_for("numpy.dtype")
class _Dtype:
    """A numeric numpy.dtype."""

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


def _as_tensor(data: Any, dtype: Any, shape: Any, order: Literal["C", "F"]) -> Tensor:
    """Return a tensor with a copy of raw bytes."""
    if isinstance(data, str):  # from Python 2
        data = data.encode("latin1")
    if not isinstance(data, bytes | bytearray | memoryview) or not isinstance(dtype, _Dtype):
        raise TypeError(
            f"an array must have bytes and a number type, got {type(data).__name__},"
            f" {type(dtype).__name__}"
        )
    is_shape = isinstance(shape, tuple) and len(shape) <= 64  # NumPy's most
    if not is_shape or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"the shape of an array must be a tuple of sizes, got {shape!r:.80}")
    number = dtype.resolve()
    if len(data) != math.prod(shape) * number.itemsize:
        raise ValueError(
            f"an array of shape {shape} and type {number} cannot have {len(data)} bytes"
        )
    array = np.frombuffer(data, dtype=number).reshape(shape, order=order)
    return torch.from_numpy(array.astype(number.newbyteorder("="), order="C", copy=True))


# NumPy 2 moved numpy.core to numpy._core.
@_stands_for("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
def _reconstruct(subtype: Any, *shape_and_type: Any) -> _Array:
    if subtype is not _STAND_INS["numpy", "ndarray"]:
        raise UnsafePickleError(f"an array of class {subtype!r:.80}")
    return _Array()


@_stands_for("numpy.ndarray")
def _ndarray(*args: Any) -> Any:
    # Only an argument of _reconstruct.
    raise UnsafePickleError("a call of numpy.ndarray")


@_stands_for("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")
def _from_buffer(data: Any, dtype: Any, shape: Any, order: str) -> _Array:
    """Build an array from the arguments that pickle protocol 5 stores."""
    array = _Array()
    array.__setstate__((shape, dtype, order == "F", data))
    return array


@_stands_for("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
def _scalar(dtype: Any, data: Any) -> Any:
    return _as_tensor(data, dtype, (), "C").item()


@_stands_for("_codecs.encode")
def _encode(text: str, encoding: str) -> bytes:
    """Build bytes from the text that pickle protocols below 3 store."""
    if encoding != "latin1":
        raise UnsafePickleError(f"_codecs.encode(..., {encoding!r})")
    return text.encode("latin1")


@_stands_for("builtins.bytes", "__builtin__.bytes")
def _empty_bytes(*args: Any) -> bytes:
    """Build empty bytes, for which pickle protocol 2 calls `bytes()`."""
    if args:
        raise UnsafePickleError("bytes(...) with arguments")
    return b""


class _Plain:
    """Converts unpickled objects to plain containers, numbers and tensors."""

    def __init__(self) -> None:
        # By identity: a shared object is converted once. The values keep the objects alive, since
        # the id of a deleted object may be reused.
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
