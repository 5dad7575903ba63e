"""`CfgNode`: the tree of settings, with checked values and errors that name file, line and key.

It extends yacs's tree (nested dicts with attribute access, `freeze`, `clone`, `dump`) and replaces
its merging, which reports neither file nor line and accepts any value of the right type.
"""

import copy
import logging
import math
import operator
import re
from ast import literal_eval
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from yacs.config import CfgNode as _YacsNode

from detkit.config.compat import LATEST_VERSION, upgrade_files
from detkit.config.yaml_loader import YamlFile, files_with_bases, parse_yaml
from detkit.utils.errors import ConfigError, UnknownNameError
from detkit.utils.text import did_you_mean

logger = logging.getLogger(__name__)

EPOCHS = re.compile(r"(\d+\.?\d*|\.\d+)ep")
"""A number of passes over the training data, such as `2ep`."""
SHARE = re.compile(r"(\d+\.?\d*|\.\d+)%")
"""A part of the run, such as `0.5%`."""

_SCALARS = (int, float, str, bool, type(None))
# A list whose quotes the shell has taken: [console,json].
_WORDS = re.compile(r"[\[(]\s*([A-Za-z_][\w./:-]*(?:\s*,\s*[A-Za-z_][\w./:-]*)*)\s*,?\s*[\])]")
_MAX_LITERAL = 2**17  # characters, as of a word of a Linux command line; Python's parser is slow
_TYPE_NAMES = {list: "a list", tuple: "a list", str: "a string", int: "an int"}


class ConfigKeyError(UnknownNameError, AssertionError):
    """An unknown config key; yacs raises an AssertionError for one of a list."""


class KeyRead(NamedTuple):
    """A setting, or a group of settings, that code has read."""

    full_key: str
    value: Any


# While not None, all nodes append their reads to it. Nodes report reads themselves, as a recording
# view of the tree could stay in the objects that are built from it.
_reads: ContextVar[list[tuple["CfgNode", str]] | None] = ContextVar("reads", default=None)


_is_strict: ContextVar[bool] = ContextVar("is_strict", default=False)


@contextmanager
def strict_values() -> Iterator[None]:
    """Refuse values that only code of a project can have a meaning for, where there is no code.

    Outside of the block they are merged with a warning, as Detectron2 merges them without one, if
    the key is one of Detectron2's.
    """
    token = _is_strict.set(True)
    try:
        yield
    finally:
        _is_strict.reset(token)


@contextmanager
def recorded_reads(reads: list[KeyRead]) -> Iterator[None]:
    """Append to `reads` the settings that the block reads by attribute from any tree, in order.

    A nested recording keeps its reads from the outer one.
    """
    seen: list[tuple[CfgNode, str]] = []
    token = _reads.set(seen)
    try:
        yield
    finally:
        _reads.reset(token)
        # A node does not know its own key, but its group was read before it.
        prefixes: dict[int, str] = {}
        for node, name in seen:
            full_key = prefixes.get(id(node), "") + name
            value = node.get(name)
            if isinstance(value, CfgNode):
                prefixes[id(value)] = full_key + "."
            reads.append(KeyRead(full_key, value))


@dataclass(frozen=True)
class KeySpec:
    """Declaration of a key: its default, meaning and legal values.

    Args:
        default: Default value, which also defines the type.
        meaning: Description for users, in a sentence or two.
        choices: The legal values; None allows any.
        minimum: Smallest legal number, also in a list.
        in_epochs: Whether the number may be given in epochs, as `2ep`.
        in_shares: Whether it may also be a share of the run, as `0.5%`.
        needs: (key, value, ...): only read if that key has one of the values; (key,): only read if
            that key is neither empty nor False.
        unless: (key, value, ...): not read if that key has one of the values.
        path_fields: In a list of mappings, the fields that are paths relative to the YAML file.
        resolve: Gives the value to set in the place of one that is merged; None keeps it.
        only_default_trainer: Whether only `DefaultTrainer` reads it, not tools/plain_train_net.py.
        unread: Why no code reads the key; empty for keys that are read.
    """

    default: Any
    meaning: str
    choices: tuple[Any, ...] | None = None
    minimum: float | None = None
    in_epochs: bool = False
    in_shares: bool = False
    needs: tuple[Any, ...] = ()
    unless: tuple[Any, ...] = ()
    path_fields: tuple[str, ...] = ()
    resolve: Callable[[Any], Any] | None = None
    only_default_trainer: bool = False
    unread: str = ""

    def problem(self, value: Any) -> str:
        """Return what is wrong with a value of the right type, or an empty string."""
        if self.choices is not None and value not in self.choices:
            hint = ""
            if isinstance(value, str):
                hint = did_you_mean(value, [c for c in self.choices if isinstance(c, str)])
            return f"must be one of {', '.join(map(repr, self.choices))}, got {value!r}.{hint}"
        if self.minimum is not None and any(n < self.minimum for n in _numbers(value)):
            return f"must be at least {self.minimum:g}, got {value!r}"
        return ""

    @property
    def is_detectron2s(self) -> bool:
        """Whether Detectron2 has the key, too, and takes any value of the right type for it."""
        return not (self.meaning.startswith("detkit:") or self.unread)


def _without_numpy(value: Any) -> Any:
    """Return a value with Python's numbers and lists in the place of NumPy's, which are no YAML."""
    if type(value) in (list, tuple):
        items = [_without_numpy(item) for item in value]
        # Else the list itself, to which a script may yet append.
        return value if all(map(operator.is_, items, value)) else type(value)(items)
    # Not by its classes: the command line starts without NumPy.
    return value.tolist() if type(value).__module__ == "numpy" else value


def _unbounded(value: Any) -> str:
    """Return what is wrong with a number that no key takes, or an empty string."""
    for number in _numbers(value):
        is_float = isinstance(number, float)
        if not (math.isfinite(number) if is_float else number.bit_length() < 64):
            return f"must be {'a finite number' if is_float else 'below 2**63'}, got {value!r}"
    return ""


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)


class KeyTable(dict[str, KeySpec]):
    """The specs by full key; not changed once all are declared: all copies of a tree share it."""

    def declare(self, name: str, default: Any, meaning: str, **spec: Any) -> None:
        """Declare a key. `spec`: see `KeySpec`."""
        if name in self:
            raise ValueError(f"config key {name} is declared twice")
        self[name] = KeySpec(default, meaning, **spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeyTable":
        return self


class CfgNode(_YacsNode):
    """A node of the settings tree.

    Example:
        >>> from detkit.config import get_cfg
        >>> cfg = get_cfg()
        >>> cfg.merge_from_file("detkit://COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
        >>> cfg.merge_from_list(["SOLVER.BASE_LR", "0.01"])
        >>> cfg.freeze()
        >>> cfg.SOLVER.BASE_LR, cfg.MODEL.BACKBONE.NAME
        (0.01, 'build_resnet_fpn_backbone')
    """

    def __init__(
        self,
        init_dict: dict[str, Any] | None = None,
        key_list: Any = None,
        new_allowed: bool = False,
    ) -> None:
        super().__init__(init_dict, key_list, new_allowed)
        # In `__dict__`, as in yacs, because attributes are settings.
        self.__dict__["_table"] = KeyTable()
        self.__dict__["_set_here"] = set()
        # Of keys and groups that only detkit has, in a group that Detectron2 has too.
        self.__dict__["_own_defaults"] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, _YacsNode) and not isinstance(value, CfgNode):
            # A project may take its nodes from yacs or fvcore; their kind cannot be merged into.
            value = CfgNode(value, new_allowed=value.is_new_allowed())
        value = _without_numpy(value)
        present = self.get(name)
        if isinstance(value, CfgNode) and isinstance(present, CfgNode):
            # `cfg.INPUT.CROP = CN({...})` in scripts for Detectron2 has Detectron2's keys alone.
            own = value.__dict__["_own_defaults"] = present.__dict__["_own_defaults"]
            for key, default in own.items():
                value.setdefault(key, copy.deepcopy(default))
        super().__setattr__(name, value)
        self.__dict__["_set_here"].add(name)

    def set_key_table(self, table: KeyTable) -> None:
        """Set the specs by which merging into this root checks values."""
        self.__dict__["_table"] = table
        groups = {key.rpartition(".")[0] for key, spec in table.items() if spec.is_detectron2s}
        for key, spec in table.items():
            group, _, name = key.rpartition(".")
            while group and group not in groups:  # as TEST.AMP, which is detkit's in whole
                group, _, name = group.rpartition(".")
            if group and not spec.is_detectron2s:
                node = self.get_by_full_key(group)
                node.__dict__["_own_defaults"][name] = copy.deepcopy(node[name])

    def __getattr__(self, name: str) -> Any:
        if name in self:
            seen = _reads.get()
            if seen is not None:
                seen.append((self, name))
            return self[name]
        if name.startswith("__"):  # copy and pickle probe for methods
            raise AttributeError(name)
        raise AttributeError(f"no config key {name!r} here.{did_you_mean(name, self)}")

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = False) -> None:
        """Merge the settings of a YAML file, after those of the files in its `_BASE_`.

        Args:
            cfg_filename: Path; `~` is the home folder, and `detkit://X` the file X in detkit's
                configs. `_BASE_` has the same form, or is relative to its file, or a list of these.
                Keys of versions 0 and 1 are renamed to those of version 2, with a warning.
            allow_unsafe: Has no effect; accepted for compatibility with Detectron2.

        Raises:
            MissingFileError: The file or one of its bases does not exist.
            ConfigError: The file is not YAML, or has a tag that runs code.
            ConfigError: Its bases form a circle.
            ConfigError: A value has the wrong type or is out of range.
            ConfigKeyError: A key is unknown.
        """
        if allow_unsafe:
            logger.warning("allow_unsafe=True has no effect: detkit reads YAML as data only")
        table: KeyTable = self.__dict__["_table"]
        path_fields = {key: spec.path_fields for key, spec in table.items() if spec.path_fields}
        files = files_with_bases(cfg_filename, path_fields)
        if self.get("VERSION") == LATEST_VERSION:
            upgrade_files(files, self["MODEL"]["META_ARCHITECTURE"])
        overridden: set[str] = set()
        for file in reversed(files):
            # Bases may have placeholders, such as `NUM_CLASSES: ???`.
            _drop_leaves(file.tree, overridden, "")
        for file in files:
            self._merge(file.tree, self, (), file)

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """Return the settings of a YAML file and its bases as nested dicts, without checks.

        Arguments and errors are those of `merge_from_file`.
        """
        merged: dict[str, Any] = {}
        for file in files_with_bases(filename):
            _update_tree(merged, file.tree)
        return merged

    def merge_from_text(self, text: str, source: str) -> None:
        """Merge settings given as YAML, such as those that a checkpoint holds; none have bases.

        Args:
            text: Errors as of `merge_from_file`.
            source: The file that holds the text, for messages.
        """
        file = parse_yaml(text, Path(source))
        self._merge(file.tree, self, (), file)

    def merge_from_other_cfg(self, cfg_other: _YacsNode) -> None:
        """Merge the settings of another tree.

        Raises:
            ConfigKeyError: The other tree has a key that this one lacks.
            ConfigError: A value has the wrong type or is out of range.
        """
        self._merge(cfg_other, self, (), None)

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        """Merge settings given as `[KEY, VALUE, KEY, VALUE, ...]`, as on a command line.

        A string is read as a Python literal where it is one: `"(600, 800)"`, `"True"`, `"1e-3"`.

        Raises:
            ConfigKeyError: A key is unknown.
            ConfigError: The number of words is odd.
            ConfigError: A value has the wrong type or is out of range.
        """
        if len(cfg_list) % 2:
            raise ConfigError(
                f"settings come in pairs KEY VALUE, got {len(cfg_list)} words: {list(cfg_list)}"
            )
        for full_key, value in zip(cfg_list[0::2], cfg_list[1::2], strict=True):
            # As a nested mapping, a pair is checked like a file.
            tree: Any = value
            for part in reversed(str(full_key).split(".")):
                tree = {part: tree}
            self._merge(tree, self, (), None)

    def _merge(
        self, tree: dict[str, Any], root: "CfgNode", path: tuple[str, ...], file: YamlFile | None
    ) -> None:
        """Merge a plain tree into this node, which is at `path` below `root`."""
        if self.is_frozen():
            raise AttributeError(
                "this config is frozen: call `defrost()` first, or use `with cfg.edited()`"
            )
        for key, value in tree.items():
            full_key = ".".join((*path, key))
            where = f"{file.where(full_key)}: " if file is not None else ""
            if key not in self:
                if root.key_is_deprecated(full_key):
                    continue
                if root.key_is_renamed(full_key):
                    root.raise_key_rename_error(full_key)
                if not self.is_new_allowed():
                    # Follow groups of a single key: `RPN.NMS_THRESH` is a better hint than `RPN`.
                    while isinstance(value, dict) and len(value) == 1:
                        key, value = next(iter(value.items()))
                        full_key = f"{full_key}.{key}"
                    where = f"{file.where(full_key)}: " if file is not None else ""
                    raise ConfigKeyError(_unknown_key(full_key, root, where))
                setattr(self, key, _new_value(value, full_key, where))
            elif isinstance(self[key], CfgNode):
                if not isinstance(value, dict):
                    members = ", ".join(list(self[key])[:4]) or "empty"
                    raise ConfigError(
                        f"{where}{full_key} is a group of keys ({members}...), got {value!r}"
                    )
                self[key]._merge(value, root, (*path, key), file)
            else:
                setattr(self, key, root._checked(full_key, value, self[key], where))

    def _checked(self, full_key: str, value: Any, present: Any, where: str) -> Any:
        spec: KeySpec | None = self.__dict__["_table"].get(full_key)
        if spec is not None and spec.in_epochs:
            if isinstance(value, str) and EPOCHS.fullmatch(value):
                return value
            if isinstance(value, str) and spec.in_shares and SHARE.fullmatch(value):
                return value
            present = spec.default  # the present value may be in epochs, a string
        value = coerce(decode(value, present), present, f"{where}{full_key}")
        if spec is None:
            return value
        if spec.resolve is not None:
            value = spec.resolve(value)
        problem = _unbounded(value) or spec.problem(value)
        if not problem:
            return value
        may_have_meaning = spec.choices is not None and self._is_extended()
        if not _is_strict.get():
            may_have_meaning |= spec.is_detectron2s
        if _unbounded(value) or not may_have_meaning:
            raise ConfigError(f"{where}{full_key} {problem}")
        # Schedules, samplers, losses of a project, which may add keys for them or not. What reads
        # the value checks it again.
        logger.warning("%s%s %s; it is left to code of yours", where, full_key, problem)
        return value

    def _is_extended(self) -> bool:
        """Return whether code has added keys to the tree, as projects of Detectron2 do."""
        table: KeyTable = self.__dict__["_table"]
        open_groups = tuple(f"{key}." for key, spec in table.items() if spec.default == {})
        return any(
            key not in table and not key.startswith(open_groups) for key in self.keys_of_leaves()
        )

    @contextmanager
    def edited(self) -> Iterator["CfgNode"]:
        """Yield an unfrozen copy, which is frozen at the end of the block if this tree is.

        Example:
            >>> from detkit.config import get_cfg
            >>> cfg = get_cfg()
            >>> with cfg.edited() as longer:
            ...     longer.SOLVER.MAX_ITER *= 2
            >>> cfg.SOLVER.MAX_ITER, longer.SOLVER.MAX_ITER
            (40000, 80000)
        """
        copied = self.clone()
        copied.defrost()
        yield copied
        if self.is_frozen():
            copied.freeze()

    def keys_of_leaves(self, prefix: str = "") -> Iterator[str]:
        """Yield the full key of every setting below this node."""
        for key, value in self.items():
            if isinstance(value, CfgNode):
                yield from value.keys_of_leaves(f"{prefix}{key}.")
            else:
                yield prefix + key

    def is_set(self, full_key: str) -> bool:
        """Return whether a file, the command line or code has set a key, even to its default.

        Raises:
            ConfigKeyError: The key is unknown.
        """
        self.get_by_full_key(full_key)  # raises for an unknown key
        group, _, name = full_key.rpartition(".")
        node = self.get_by_full_key(group) if group else self
        return name in node.__dict__["_set_here"]

    def get_by_full_key(self, full_key: str) -> Any:
        """Return the setting at a dotted key such as `MODEL.RPN.NMS_THRESH`.

        Raises:
            ConfigKeyError: The key is unknown.
        """
        node: Any = self
        for part in full_key.split("."):
            if not isinstance(node, CfgNode) or part not in node:
                raise ConfigKeyError(_unknown_key(full_key, self, ""))
            node = node[part]
        return node


def _unknown_key(full_key: str, root: CfgNode, where: str) -> str:
    known = list(root.keys_of_leaves())
    if full_key in known:
        nested = ": {".join(full_key.split("."))
        return (
            f"{where}{full_key} is a key of a group in a YAML file:"
            f" {nested}: ...{'}' * full_key.count('.')}"
        )
    # With groups: `MODELL` is close to `MODEL`, and not to any full key.
    groups = {key.rsplit(".", depth)[0] for key in known for depth in range(1, key.count(".") + 1)}
    return (
        f"{where}unknown config key {full_key}.{did_you_mean(full_key, [*known, *sorted(groups)])} "
        "Put keys of your own under MODEL.CUSTOM."
    )


def _update_tree(tree: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _update_tree(tree[key], value)
        else:
            tree[key] = value


def _drop_leaves(tree: dict[str, Any], known: set[str], prefix: str) -> None:
    """Take the known leaves out of a tree, and add the others to those that are known."""
    for key, value in list(tree.items()):
        if isinstance(value, dict):
            _drop_leaves(value, known, f"{prefix}{key}.")
        elif prefix + key in known:
            del tree[key]
        else:
            known.add(prefix + key)


def _new_value(value: Any, full_key: str, where: str) -> Any:
    """Return the value of an undeclared key, such as one below MODEL.CUSTOM."""
    if isinstance(value, dict):
        node = CfgNode(new_allowed=True)
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{where}{full_key} must have texts as keys, got {key!r}")
            node[key] = _new_value(item, f"{full_key}.{key}", where)
        return node
    decoded = decode(value, None)
    if isinstance(decoded, dict):
        return _new_value(decoded, full_key, where)
    _require_plain(decoded, f"{where}{full_key}")
    return copy.deepcopy(decoded)


def decode(value: Any, present: Any) -> Any:
    """Return the Python literal in a string, unless the setting itself is a string."""
    if not isinstance(value, str) or len(value) > _MAX_LITERAL:
        return value
    try:
        decoded = literal_eval(value)
        str(decoded)  # a ValueError for an integer of thousands of digits, also in a list
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        # Deeply nested brackets exhaust the parser: MemoryError or RecursionError.
        words = _WORDS.fullmatch(value) if isinstance(present, list | tuple) else None
        if words is not None:
            return [word.strip() for word in words[1].split(",")]
        return value  # text, such as a name or a path
    if isinstance(present, str) and not isinstance(decoded, str | None):
        return value  # text that looks like a number, such as the name "50"
    return decoded


def coerce(value: Any, present: Any, key: str) -> Any:
    """Return a value in the type of the present one.

    Args:
        value: Value from a file or from `decode`.
        present: The value that it replaces.
        key: Place and key, for messages.

    Raises:
        ConfigError: The value has another type, or contains other objects than plain values.
    """
    if isinstance(value, list | tuple) and isinstance(present, list | tuple):
        _require_plain(value, key)
        return _as_nested(value, present)
    # YAML reads `1` as an int. The reverse, 1.5 for an int, would lose the fraction: an error.
    if isinstance(present, float) and isinstance(value, int) and not isinstance(value, bool):
        if value.bit_length() > 1023:
            raise ConfigError(f"{key} must be a number below 1e308, got {value!s:.20}...")
        return float(value)
    # Not isinstance, for which True is an int. None is accepted for any key, as in yacs.
    if value is None or type(value) is type(present):
        return value
    if present is None and isinstance(value, _SCALARS):
        return value
    expected = _TYPE_NAMES.get(type(present), f"a {type(present).__name__}")
    hint = ""
    if isinstance(present, list | tuple) and isinstance(value, str | int | float):
        items = value.split(",") if isinstance(value, str) else [value]
        hint = f" Write {items!r}."
    raise ConfigError(
        f"{key} must be {expected}, such as {present!r}; got {value!r}, of type"
        f" {type(value).__name__}.{hint}"
    )


def _as_nested(value: Any, present: Any) -> Any:
    """Copy nested lists, with tuples where the present value has them."""
    # YAML has lists only.
    if not isinstance(value, list | tuple):
        return copy.deepcopy(value)
    inner = present[0] if isinstance(present, list | tuple) and present else None
    kind = type(present) if isinstance(present, list | tuple) else type(value)
    return kind(_as_nested(item, inner) for item in value)


def _require_plain(value: Any, key: str) -> None:
    """Raise a ConfigError unless a value consists of numbers, strings, None, lists and dicts."""
    if isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            _require_plain(item, key)
    elif not isinstance(value, _SCALARS):
        raise ConfigError(
            f"{key} must be a plain value, got {value!r}, of type {type(value).__name__}"
        )
