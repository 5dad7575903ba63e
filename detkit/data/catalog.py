"""The two tables of data sets: how to load one by its name, and its metadata."""

from __future__ import annotations

import contextlib
import functools
import pickle
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any

import numpy as np

from detkit.structures import ImageRecord
from detkit.utils.env import garbage_collection_off
from detkit.utils.errors import TakenNameError, UnknownNameError
from detkit.utils.text import cut, did_you_mean, shortened

# Inside the classes below, `list` is a method.
Names = list[str]
Records = list[ImageRecord]
PickledRecords = list[bytes]
Loader = Callable[[], Records]
# Bytes of pickled records that are kept in all.
_MAX_KEPT = 2**29


class DatasetCatalogTable(UserDict[str, Loader]):
    """Name -> function that loads the data set's records; the one instance is `DatasetCatalog`.

    A dict otherwise, as in Detectron2: `DatasetCatalog[name]` is the function.

    Example:
        >>> DatasetCatalog.register("my_two_cells", lambda: [{"file_name": "a.jpg", "image_id": 1}])
        >>> len(DatasetCatalog.get("my_two_cells"))
        1
    """

    def __init__(self) -> None:
        super().__init__()
        # The loader that was called, and what it returned, pickled; None before that.
        self._kept: dict[str, tuple[Loader, PickledRecords] | None] = {}

    def register(self, name: str, func: Loader) -> None:
        """Add a data set.

        A name may be registered again with the same function, with a `functools.partial` of the
        same function and equal arguments, or with a function of the same module and name, such as
        that of a module that was reloaded: the newer one is used.

        Args:
            name: Its name, as in `DATASETS.TRAIN`.
            func: Takes no arguments and returns the records, the same ones in the same order
                whenever it is called.

        Raises:
            TypeError: `func` cannot be called.
            TakenNameError: The name is taken by another data set.
        """
        if not callable(func):
            raise TypeError(
                f"data set {name!r} must be registered with a function that returns records, got"
                f" {func!r}"
            )
        known = self.data.get(name)
        if known is not None and not _same_loader(known, func):
            raise TakenNameError(
                f"data set {name!r} is already registered with other contents: {_describe(known)};"
                f" now {_describe(func)}. Choose another name, bind arguments with"
                " functools.partial so that equal ones can be recognized, or call"
                f" DatasetCatalog.remove({name!r}) first."
            )
        # `kept` goes by the object, and DATASETS.REGISTER is read several times in a run.
        if not (isinstance(known, functools.partial) and known.func is getattr(func, "func", None)):
            self.data[name] = func

    def get(self, name: str) -> Records:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Load a data set's records, which are the caller's own: nobody else sees changes to them.

        Raises:
            UnknownNameError: Nothing has that name; the message lists the closest names and how to
                add one.
        """
        self._require(name)
        loader, kept = self.data[name], self._kept.get(name)
        if kept is not None and kept[0] is loader:
            with garbage_collection_off():
                return [pickle.loads(record) for record in kept[1]]  # written by `_keep`
        records = loader()
        if name in self._kept:
            self._keep(name, loader, records)
        return records

    def _keep(self, name: str, loader: Loader, records: Records) -> None:
        self._kept[name] = None
        num_bytes = sum(len(r) for kept in self._kept.values() if kept for r in kept[1])
        # Pickled, they take a tenth of the memory, and worker processes share it.
        pickled: PickledRecords = []
        for record in records:
            pickled.append(pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL))
            num_bytes += len(pickled[-1])
            if num_bytes > _MAX_KEPT:
                return
        self._kept[name] = loader, pickled

    @contextlib.contextmanager
    def kept(self, names: Iterable[str]) -> Iterator[None]:
        """Within the block, load each of these data sets once, and return copies after that.

        For data sets that are asked for again and again, as each evaluation of a run does. Those
        that take more than half a gigabyte are loaded each time, as are all outside of the block.
        Blocks may lie within each other.

        Args:
            names: Data sets whose records can be pickled.
        """
        added = [name for name in dict.fromkeys(names) if name not in self._kept]
        self._kept |= dict.fromkeys(added)
        try:
            yield
        finally:
            for name in added:
                del self._kept[name]

    def list(self) -> Names:
        """Return all names, sorted."""
        return sorted(self.data)

    def remove(self, name: str) -> None:
        """Remove a data set; its metadata stays until `MetadataCatalog.remove`."""
        self._require(name)
        del self.data[name]

    def _require(self, name: str) -> None:
        if name in self.data:
            return
        known = did_you_mean(name, self.data) or f" Registered: {', '.join(self.list()) or 'none'}."
        raise UnknownNameError(
            f"data set {name!r} is not registered.{known} Declare your own in YAML under"
            " DATASETS.REGISTER ([{name: ..., format: coco, images: ..., annotations: ...}]), which"
            " detkit.engine.prepare(cfg) registers, or in Python with"
            " detkit.data.datasets.register_coco_instances, register_pascal_voc or"
            " DatasetCatalog.register, in a module that IMPORTS names."
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.list())

    def __repr__(self) -> str:
        return f"DatasetCatalog({', '.join(self.list())})"


class Metadata:
    """The metadata of one data set, as attributes.

    Usual ones: `thing_classes` (names, in the order of the contiguous ids), `thing_colors` (RGB, 0
    to 255), `thing_dataset_id_to_contiguous_id`, `json_file`, `image_root`, `evaluator_type`,
    `dirname`, `split`, `year`. An attribute may be set again to the same value only: two parts of a
    program that disagree about a data set would otherwise go unnoticed.

    Example:
        >>> metadata = MetadataCatalog.get("my_two_cells").set(thing_classes=["cell"])
        >>> metadata.thing_classes
        ['cell']
    """

    # In a slot: projects for Detectron2 go through `__dict__` for all attributes, and copy them.
    __slots__ = ("__dict__", "__weakref__", "_lazy")

    name: str
    _lazy: dict[str, Callable[[], Any]]

    def __init__(self, name: str = "N/A") -> None:
        self._lazy = {}
        self.__dict__["name"] = name

    def set(self, /, **kwargs: Any) -> Metadata:
        """Set several attributes, and return this object."""
        for key, value in kwargs.items():
            setattr(self, key, value)
        return self

    def set_lazy(self, **kwargs: Callable[[], Any]) -> Metadata:
        """Set attributes that are computed at each read, such as paths below `$DETKIT_DATASETS`."""
        self._lazy.update(kwargs)
        return self

    def get(self, key: str, default: Any = None) -> Any:
        """Return an attribute, or `default` if it is not set."""
        return getattr(self, key, default)

    def as_dict(self) -> dict[str, Any]:
        """Return all attributes."""
        return {**{key: compute() for key, compute in self._lazy.items()}, **self.__dict__}

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "_lazy":
            object.__setattr__(self, key, value)
            return
        if key not in self.__dict__ and key not in self._lazy:
            self.__dict__[key] = value
            return
        present = getattr(self, key)
        # The first value stays, so that a list that equals a tuple remains the list.
        if not _equal(present, value):
            raise TakenNameError(
                f"metadata {key!r} of data set {self.name!r} is already {shortened(present)}, and"
                f" cannot become {shortened(value)}. A data set with other contents needs another"
                f" name, or MetadataCatalog.remove({self.name!r}) first."
            )

    def __getattr__(self, key: str) -> Any:
        # Called only for attributes that are not stored. `_lazy` is missing while an object is
        # unpickled or copied.
        lazy = {} if key == "_lazy" else self._lazy
        if key in lazy:
            return lazy[key]()
        known = [*self.__dict__, *lazy]
        raise AttributeError(
            f"data set {self.__dict__.get('name')!r} has no metadata"
            f" {key!r}.{did_you_mean(key, known)} It has: {', '.join(sorted(known))}. Class names"
            " of a COCO file are known once the data set has been loaded."
        )

    def __repr__(self) -> str:
        return f"Metadata({', '.join(f'{k}={shortened(v)}' for k, v in self.as_dict().items())})"


class MetadataCatalogTable(UserDict[str, Metadata]):
    """Name -> `Metadata`, created by `get` when first asked for; see `MetadataCatalog`."""

    def get(self, name: str) -> Metadata:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the metadata of a data set, empty if none was set."""
        if not name:
            raise ValueError("metadata needs the name of a data set, got an empty one")
        return self.data.setdefault(name, Metadata(name))

    def list(self) -> Names:
        """Return all names, sorted."""
        return sorted(self.data)

    def remove(self, name: str) -> None:
        """Remove the metadata of a data set, if there is any."""
        self.data.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.list())

    def __repr__(self) -> str:
        return f"MetadataCatalog({', '.join(self.list())})"


DatasetCatalog = DatasetCatalogTable()
MetadataCatalog = MetadataCatalogTable()


def _same_loader(first: Any, second: Any) -> bool:
    """Return whether two loaders are the same by `DatasetCatalogTable.register`'s rule."""
    if first is second:
        return True
    if isinstance(first, functools.partial) and isinstance(second, functools.partial):
        equal_arguments = (first.args, first.keywords) == (second.args, second.keywords)
        return equal_arguments and _same_loader(first.func, second.func)
    origin = _origin(first)
    return origin is not None and origin == _origin(second)


def _origin(loader: Any) -> tuple[str, str, int] | None:
    """Return where a loader was written, None if that does not tell which data it loads."""
    # A closure's data depend on what it captured, which cannot be compared in a plain way.
    if not isinstance(loader, FunctionType) or loader.__closure__:
        return None
    # All lambdas of a module have the same name: the line tells them apart.
    line = loader.__code__.co_firstlineno if loader.__name__ == "<lambda>" else 0
    return loader.__module__, loader.__qualname__, line


def _equal(first: Any, second: Any) -> bool:
    """Return whether two values of metadata are equal, lists and tuples being alike."""
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_equal, first, second))
    if isinstance(first, np.ndarray) or isinstance(second, np.ndarray):
        return np.array_equal(first, second)
    try:
        return first is second or bool(first == second)
    except (TypeError, ValueError):  # values that have no single answer
        return False


def _describe(loader: Any) -> str:
    if isinstance(loader, functools.partial):
        values = [*map(repr, loader.args), *(f"{k}={v!r}" for k, v in loader.keywords.items())]
        text = f"{getattr(loader.func, '__name__', loader.func)}({', '.join(values)})"
        return cut(text)
    code = getattr(loader, "__code__", None)
    where = f", {code.co_filename}:{code.co_firstlineno}" if code is not None else ""
    return f"{getattr(loader, '__qualname__', repr(loader))}{where}"
