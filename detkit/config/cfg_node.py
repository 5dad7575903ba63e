"""The tree of settings: attribute access, `_BASE_` files, and errors that say where a setting came from and what was
meant.

`CfgNode` is yacs's tree (a dict of dicts with attribute access, `freeze`, `clone`, `dump`) with its merging replaced:
yacs reports neither file nor line, and takes a value of the right type for a good one.
"""

import copy
import logging
import re
from ast import literal_eval
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yacs.config import CfgNode as _YacsNode

from detkit.config.yaml_loader import YamlFile, load_yaml
from detkit.utils.file_io import packaged_configs
from detkit.utils.near_miss import did_you_mean

logger = logging.getLogger(__name__)

BASE_KEY = "_BASE_"
PACKAGED_PREFIX = "detkit://"
# The paths inside these lists of mappings are relative to the file that says them.
_PATH_FIELDS = {"DATASETS.REGISTER": ("images", "annotations", "root", "split", "labels", "segments", "instances")}
EPOCHS = re.compile(r"(\d+\.?\d*|\.\d+)ep")
_SCALARS = (int, float, str, bool, type(None))
# Bases that name a base twice, which names another twice, ... stand for 2^n files.
_MAX_FILES = 100


class ConfigKeyError(KeyError):
    """An unknown key; unlike KeyError, its text prints as it is."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class KeySpec:
    """What a declared key means and which values it takes."""

    default: Any
    meaning: str
    choices: tuple[Any, ...] | None = None
    minimum: float | None = None
    # Whether the number may be given in passes over the training data, as text such as "2ep".
    in_epochs: bool = False
    # Why no code reads the key yet; empty for keys that are read.
    unread: str = ""

    def problem(self, value: Any) -> str:
        """What is wrong with a value of the right type, or an empty string."""
        if self.choices is not None and value not in self.choices:
            hint = (
                did_you_mean(value, [c for c in self.choices if isinstance(c, str)]) if isinstance(value, str) else ""
            )
            return f"must be one of {', '.join(map(repr, self.choices))}, got {value!r}.{hint}"
        if self.minimum is not None:
            numbers = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(n, int | float) and n < self.minimum for n in numbers):
                return f"must be at least {self.minimum:g}, got {value!r}"
        return ""


class KeyTable(dict[str, KeySpec]):
    """Full key -> what it means; shared by all copies of a tree, since nothing changes it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeyTable":
        return self


class CfgNode(_YacsNode):
    """A node of the settings tree.

    Example:
        >>> cfg = get_cfg()
        >>> cfg.merge_from_file("configs/COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
        >>> cfg.merge_from_list(["SOLVER.BASE_LR", "0.01"])
        >>> cfg.freeze()
    """

    def __init__(
        self, init_dict: dict[str, Any] | None = None, key_list: Any = None, new_allowed: bool = False
    ) -> None:
        super().__init__(init_dict, key_list, new_allowed)
        self.__dict__["_table"] = KeyTable()
        self.__dict__["_set_here"] = set()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self.__dict__["_set_here"].add(name)

    def set_key_table(self, table: KeyTable) -> None:
        """Attach what the declared keys mean, at the root, so that merging can check values."""
        self.__dict__["_table"] = table

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name.startswith("__"):  # copy and pickle ask for what is not there
            raise AttributeError(name)
        raise AttributeError(f"no config key {name!r} here.{did_you_mean(name, self)}")

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = False) -> None:
        """Take over the settings of a YAML file and of the files that it names in `_BASE_`.

        Args:
            cfg_filename: Path; `~` is the home folder, and `detkit://X` the file X that comes with detkit. `_BASE_`
                takes the same forms, or a path relative to the file that says it, or a list of such.
            allow_unsafe: Only there so that calls written for Detectron2 work. Nothing unsafe is ever loaded.

        Raises:
            FileNotFoundError: The file or one of its bases is not there.
            ValueError: Not YAML; a tag that would run code; bases in a circle; a value of the wrong type or out of
            range. ConfigKeyError: An unknown key.
        """
        if allow_unsafe:
            logger.warning("allow_unsafe=True has no effect: detkit reads YAML as data only")
        for file in _with_bases(_resolve(cfg_filename, Path.cwd()), ()):
            _anchor_paths(file)
            self._merge(file.tree, self, (), file)

    def merge_from_other_cfg(self, cfg_other: _YacsNode) -> None:
        """Take over the settings of another tree.

        Raises:
            ConfigKeyError: The other tree has a key that this one lacks.
            ValueError: A value has the wrong type or is out of range.
        """
        self._merge(cfg_other, self, (), None)

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        """Take over settings given as `[KEY, VALUE, KEY, VALUE, ...]`, as on a command line.

        A value given as text is read as a Python literal where it is one: `"(600, 800)"`, `"True"`, `"1e-3"`.

        Raises:
            ConfigKeyError: An unknown key.
            ValueError: An odd number of words, or a value of the wrong type or out of range.
        """
        if len(cfg_list) % 2:
            raise ValueError(f"settings come in pairs KEY VALUE, got {len(cfg_list)} words: {list(cfg_list)}")
        for full_key, value in zip(cfg_list[0::2], cfg_list[1::2], strict=True):
            # One nested mapping per pair runs through the same checks as a file.
            tree: Any = value
            for part in reversed(str(full_key).split(".")):
                tree = {part: tree}
            self._merge(tree, self, (), None)

    def _merge(self, tree: dict[str, Any], root: "CfgNode", path: tuple[str, ...], file: YamlFile | None) -> None:
        """Merge a plain tree into this node, which lies at `path` below `root`."""
        if self.is_frozen():
            raise AttributeError(
                "this config is frozen; merge into `cfg.clone()` after `defrost()`, or before `freeze()`"
            )
        for key, value in tree.items():
            full_key = ".".join((*path, key))
            where = f"{file.where(full_key)}: " if file is not None else ""
            if key not in self:
                if not self.is_new_allowed():
                    full_key = _full_chain(full_key, value)
                    where = f"{file.where(full_key)}: " if file is not None else ""
                    raise ConfigKeyError(_unknown_key(full_key, root, where))
                setattr(self, key, _new_value(value, full_key, where))
            elif isinstance(self[key], CfgNode):
                if not isinstance(value, dict):
                    members = ", ".join(list(self[key])[:4]) or "empty"
                    raise ValueError(f"{where}{full_key} is a group of keys ({members}...), got {value!r}")
                self[key]._merge(value, root, (*path, key), file)
            else:
                setattr(self, key, root._checked(full_key, value, self[key], where))

    def _checked(self, full_key: str, value: Any, present: Any, where: str) -> Any:
        table: KeyTable = self.__dict__["_table"]
        spec = table.get(full_key)
        if spec is not None and spec.in_epochs:
            if isinstance(value, str) and EPOCHS.fullmatch(value):
                return value
            present = spec.default  # it may be text at present
        value = _coerce(_decode(value, present), present, full_key, where)
        problem = spec.problem(value) if spec is not None else ""
        if problem:
            raise ValueError(f"{where}{full_key} {problem}")
        return value

    def keys_of_leaves(self, prefix: str = "") -> Iterator[str]:
        """Give the full key of every setting below this node."""
        for key, value in self.items():
            if isinstance(value, CfgNode):
                yield from value.keys_of_leaves(f"{prefix}{key}.")
            else:
                yield prefix + key

    def is_set(self, full_key: str) -> bool:
        """Whether a file, a command line or code has given this setting a value, be it that of the default.

        Raises:
            ConfigKeyError: An unknown key.
        """
        self.get_by_full_key(full_key)
        group, _, name = full_key.rpartition(".")
        node = self.get_by_full_key(group) if group else self
        return name in node.__dict__["_set_here"]

    def get_by_full_key(self, full_key: str) -> Any:
        """Give the setting at a dotted key such as `MODEL.RPN.NMS_THRESH`.

        Raises:
            ConfigKeyError: An unknown key.
        """
        node: Any = self
        for part in full_key.split("."):
            if not isinstance(node, CfgNode) or part not in node:
                raise ConfigKeyError(_unknown_key(full_key, self, ""))
            node = node[part]
        return node


def _full_chain(full_key: str, value: Any) -> str:
    """Go down to the setting itself where a group holds one only: `RPN.NMS_THRESH` says more than `RPN`."""
    while isinstance(value, dict) and len(value) == 1:
        key, value = next(iter(value.items()))
        full_key = f"{full_key}.{key}"
    return full_key


def _unknown_key(full_key: str, root: CfgNode, where: str) -> str:
    known = list(root.keys_of_leaves())
    groups = {key.rsplit(".", depth)[0] for key in known for depth in range(1, key.count(".") + 1)}
    return (
        f"{where}unknown config key {full_key}.{did_you_mean(full_key, [*known, *sorted(groups)])} "
        "Keys of your own parts go under MODEL.CUSTOM."
    )


def _with_bases(path: Path, below: tuple[Path, ...]) -> list[YamlFile]:
    """A file after all of its bases, in the order in which they are merged."""
    if path in below:
        circle = " -> ".join(str(p) for p in (*below[below.index(path) :], path))
        raise ValueError(f"{BASE_KEY} goes in a circle: {circle}")
    if len(below) >= _MAX_FILES:
        raise ValueError(f"{below[0]} has more than {_MAX_FILES} files below each other as {BASE_KEY}")
    try:
        file = load_yaml(path)
    except FileNotFoundError as error:
        said_in = f", named as {BASE_KEY} in {below[-1]}" if below else ""
        raise FileNotFoundError(f"{error}{said_in}") from error
    bases = file.tree.pop(BASE_KEY, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"{file.where(BASE_KEY)}: {BASE_KEY} must be a path or a list of paths, got {bases!r}")
    merged: list[YamlFile] = []
    for base in bases:
        merged += _with_bases(_resolve(base, path.parent), (*below, path))
        if len(merged) >= _MAX_FILES:
            raise ValueError(f"{path} stands for more than {_MAX_FILES} files once {BASE_KEY} is followed")
    return [*merged, file]


def _resolve(name: str, folder: Path) -> Path:
    if str(name).startswith(PACKAGED_PREFIX):
        return packaged_configs() / str(name)[len(PACKAGED_PREFIX) :]
    try:
        return (folder / Path(name).expanduser()).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, no such user, a null byte
        raise FileNotFoundError(f"no config file {name!r}: {error}") from error


def _anchor_paths(file: YamlFile) -> None:
    """Make absolute the paths that exist beside the file; the others are looked for under `$DETKIT_DATASETS` later."""
    for full_key, fields in _PATH_FIELDS.items():
        entries: Any = file.tree
        for part in full_key.split("."):
            entries = entries.get(part, []) if isinstance(entries, dict) else []
        for entry in entries if isinstance(entries, list) else []:
            for name in fields:
                value = entry.get(name) if isinstance(entry, dict) else None
                if not isinstance(value, str) or (name == "split" and not value.endswith(".txt")):
                    continue  # a split is a file, or a bare name that a folder may happen to share
                beside = file.path.parent / Path(value).expanduser()
                if _exists(beside):
                    entry[name] = str(beside.resolve())


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long a name, say: whoever uses the path tells
        return False


def _decode(value: Any, present: Any) -> Any:
    """Read text as a Python literal, unless the setting is itself text and the literal is something else."""
    if not isinstance(value, str):
        return value
    try:
        decoded = literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return value
    return value if isinstance(present, str) and not isinstance(decoded, str | type(None)) else decoded


def _coerce(value: Any, present: Any, full_key: str, where: str) -> Any:
    """Give the value in the type of the present one, or explain what was expected."""
    if isinstance(value, list | tuple) and isinstance(present, list | tuple):
        _require_plain(value, full_key, where)
        return _as_nested(value, present)
    if isinstance(present, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is type(present) or (present is None and isinstance(value, _SCALARS)) or value is None:
        return value
    expected = {list: "a list", tuple: "a list", str: "text"}.get(type(present), f"a {type(present).__name__}")
    hint = f" Write [{value!r}]." if isinstance(present, list | tuple) and isinstance(value, str | int | float) else ""
    raise ValueError(
        f"{where}{full_key} must be {expected}, such as {present!r}; got {value!r}, of type "
        f"{type(value).__name__}.{hint}"
    )


def _as_nested(value: Any, present: Any) -> Any:
    """Copy nested lists, as tuples where the present value has tuples: a dump turns them all into lists."""
    if not isinstance(value, list | tuple):
        return copy.deepcopy(value)
    inner = present[0] if isinstance(present, list | tuple) and present else None
    kind = type(present) if isinstance(present, list | tuple) else type(value)
    return kind(_as_nested(item, inner) for item in value)


def _new_value(value: Any, full_key: str, where: str) -> Any:
    """A value for a key that did not exist: below MODEL.CUSTOM, say."""
    if isinstance(value, dict):
        node = CfgNode(new_allowed=True)
        for key, item in value.items():
            node[key] = _new_value(item, f"{full_key}.{key}", where)
        return node
    value = _decode(value, None)
    _require_plain(value, full_key, where)
    return copy.deepcopy(value)


def _require_plain(value: Any, full_key: str, where: str) -> None:
    """Raise unless a value is made of numbers, text, None, lists and mappings, all the way down."""
    if isinstance(value, list | tuple):
        for item in value:
            _require_plain(item, full_key, where)
    elif isinstance(value, dict):
        for item in value.values():
            _require_plain(item, full_key, where)
    elif not isinstance(value, _SCALARS):
        raise ValueError(
            f"{where}{full_key} holds {value!r}, of type {type(value).__name__}; settings are plain values"
        )
