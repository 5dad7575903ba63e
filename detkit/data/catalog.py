"""The two tables of data sets: how to load one by its name, and what is known about it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

from detkit.structures import ImageRecord
from detkit.utils.near_miss import did_you_mean

# Names for types whose spelling the methods called `list` below would hide.
Names = list[str]
Records = list[ImageRecord]
Loader = Callable[[], Records]


class UnknownDatasetError(KeyError):
    """A data set that nobody registered; unlike KeyError, its text prints as it is."""

    def __str__(self) -> str:
        return str(self.args[0])


class DatasetCatalogTable:
    """Name -> function that loads the data set's records. There is one, `DatasetCatalog`."""

    def __init__(self) -> None:
        self._loaders: dict[str, Loader] = {}

    def register(self, name: str, func: Loader) -> None:
        """Add a data set. Adding the same one again does nothing.

        Args:
            name: Its name, as in `DATASETS.TRAIN`.
            func: Takes nothing, gives the records, the same ones in the same order whenever it is
                called.

        Raises:
            TypeError: `func` cannot be called.
            ValueError: The name already means another data set.
        """
        if not callable(func):
            raise TypeError(
                f"data set {name!r} must be registered with a function that gives records, got"
                f" {func!r}"
            )
        known = self._loaders.get(name)
        if known is not None and not _same_loader(known, func):
            raise ValueError(
                f"data set {name!r} is already registered with other contents: {_describe(known)};"
                f" now {_describe(func)}. Choose another name, or call"
                f" DatasetCatalog.remove({name!r}) first."
            )
        self._loaders[name] = func

    def get(self, name: str) -> Records:
        """Load a data set's records.

        Raises:
            UnknownDatasetError: Nothing has that name; the message lists the closest names and how
                to add one.
        """
        self._require(name)
        return self._loaders[name]()

    def list(self) -> Names:
        """Return all names, sorted."""
        return sorted(self._loaders)

    def remove(self, name: str) -> None:
        """Forget a data set; its metadata stays until `MetadataCatalog.remove`."""
        self._require(name)
        del self._loaders[name]

    def _require(self, name: str) -> None:
        if name in self._loaders:
            return
        raise UnknownDatasetError(
            f"data set {name!r} is not registered.{did_you_mean(name, self._loaders)} Registered:"
            f" {', '.join(self.list()) or 'none'}. Declare your own in YAML under DATASETS.REGISTER"
            " ([{name: ..., format: coco, images: ..., annotations: ...}]), or in Python with"
            " detkit.data.datasets.register_coco_instances, register_pascal_voc or"
            " DatasetCatalog.register, in a module that IMPORTS names."
        )

    def __contains__(self, name: object) -> bool:
        return name in self._loaders

    def __iter__(self) -> Iterator[str]:
        return iter(self.list())

    def __len__(self) -> int:
        return len(self._loaders)

    def __repr__(self) -> str:
        return f"DatasetCatalog({', '.join(self.list())})"


class Metadata:
    """What is known about one data set, as attributes.

    Usual ones: `thing_classes` (names, in the order of the contiguous ids), `thing_colors` (RGB, 0
    to 255), `thing_dataset_id_to_contiguous_id`, `json_file`, `image_root`, `evaluator_type`,
    `dirname`, `split`, `year`. An attribute that is set may be set again to the same value only:
    two parts of a program that disagree about a data set would otherwise go unnoticed.
    """

    name: str
    _lazy: dict[str, Callable[[], Any]]

    def __init__(self, name: str) -> None:
        self.__dict__["name"] = name
        self.__dict__["_lazy"] = {}

    def set(self, **kwargs: Any) -> Metadata:
        """Set several attributes, and give this object."""
        for key, value in kwargs.items():
            setattr(self, key, value)
        return self

    def set_lazy(self, **kwargs: Callable[[], Any]) -> Metadata:
        """Set attributes that are computed whenever they are read, such as paths below
        `$DETKIT_DATASETS`.
        """
        self.__dict__["_lazy"].update(kwargs)
        return self

    def get(self, key: str, default: Any = None) -> Any:
        """Return an attribute, or `default` where it is not set."""
        return getattr(self, key, default)

    def as_dict(self) -> dict[str, Any]:
        """Return all attributes."""
        stored = {key: value for key, value in self.__dict__.items() if key != "_lazy"}
        return {**{key: compute() for key, compute in self._lazy.items()}, **stored}

    def __setattr__(self, key: str, value: Any) -> None:
        present = self.get(key, value)
        if not _equal(present, value):
            raise ValueError(
                f"metadata {key!r} of data set {self.name!r} is already {_shortened(present)}, and"
                f" cannot become {_shortened(value)}. A data set with other contents needs another"
                f" name, or MetadataCatalog.remove({self.name!r}) first."
            )
        # The value stays that was set first, so that a list that equals a tuple remains the list.
        if key not in self._lazy:
            self.__dict__.setdefault(key, value)

    def __getattr__(self, key: str) -> Any:
        # Called only for what is not stored. `_lazy` is missing while an object is unpickled or
        # copied.
        lazy = self.__dict__.get("_lazy", {})
        if key in lazy:
            return lazy[key]()
        known = [*(k for k in self.__dict__ if k != "_lazy"), *lazy]
        raise AttributeError(
            f"data set {self.__dict__.get('name')!r} has no metadata"
            f" {key!r}.{did_you_mean(key, known)} It has: {', '.join(sorted(known))}. Class names"
            " of a COCO file are known once the data set has been loaded."
        )

    def __repr__(self) -> str:
        return f"Metadata({', '.join(f'{k}={_shortened(v)}' for k, v in self.as_dict().items())})"


class MetadataCatalogTable:
    """Name -> `Metadata`, made when first asked for. There is one, `MetadataCatalog`."""

    def __init__(self) -> None:
        self._metadata: dict[str, Metadata] = {}

    def get(self, name: str) -> Metadata:
        """Return the metadata of a data set, empty if nobody has set any."""
        if not name:
            raise ValueError("metadata needs the name of a data set, got an empty one")
        return self._metadata.setdefault(name, Metadata(name))

    def list(self) -> Names:
        """Return all names, sorted."""
        return sorted(self._metadata)

    def remove(self, name: str) -> None:
        """Forget what is known about a data set, if anything is."""
        self._metadata.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._metadata

    def __iter__(self) -> Iterator[str]:
        return iter(self.list())

    def __len__(self) -> int:
        return len(self._metadata)

    def __repr__(self) -> str:
        return f"MetadataCatalog({', '.join(self.list())})"


DatasetCatalog = DatasetCatalogTable()
MetadataCatalog = MetadataCatalogTable()


def _same_loader(first: Any, second: Any) -> bool:
    """Whether two loaders do the same thing: the same function or code, with the same arguments
    bound.
    """
    if first is second:
        return True
    if isinstance(first, functools.partial) and isinstance(second, functools.partial):
        bound = (first.args, first.keywords) == (second.args, second.keywords)
        return bound and _same_loader(first.func, second.func)
    if isinstance(first, FunctionType) and isinstance(second, FunctionType):
        return _equal(_code_and_values(first), _code_and_values(second))
    return False


def _code_and_values(function: FunctionType) -> tuple[Any, ...]:
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return (
        function.__module__,
        function.__qualname__,
        function.__code__,
        function.__defaults__,
        cells,
    )


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_equal, first, second))
    try:
        return bool(first == second)
    except (TypeError, ValueError):  # arrays, say: nothing that a catalog could decide about
        return False


def _describe(loader: Any) -> str:
    if isinstance(loader, functools.partial):
        values = [*map(repr, loader.args), *(f"{k}={v!r}" for k, v in loader.keywords.items())]
        return _shortened_text(
            f"{getattr(loader.func, '__name__', loader.func)}({', '.join(values)})"
        )
    code = getattr(loader, "__code__", None)
    where = f", {code.co_filename}:{code.co_firstlineno}" if code is not None else ""
    return f"{getattr(loader, '__qualname__', repr(loader))}{where}"


def _shortened(value: Any) -> str:
    return _shortened_text(repr(value))


def _shortened_text(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
