"""The tree of settings: attribute access, `_BASE_` files, and errors that say where a setting came from and what was
meant.

`CfgNode` is yacs's tree (a dict of dicts with attribute access, `freeze`, `clone`, `dump`) with its
merging replaced: yacs reports neither file nor line, and takes a value of the right type for a good
one.
"""

import copy
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

from yacs.config import CfgNode as _YacsNode

from detkit.config.base_files import files_with_bases
from detkit.config.setting_types import coerce, decode, require_plain
from detkit.config.yaml_loader import YamlFile
from detkit.utils.errors import ConfigError, UnknownNameError
from detkit.utils.near_miss import did_you_mean

logger = logging.getLogger(__name__)

EPOCHS = re.compile(r"(\d+\.?\d*|\.\d+)ep")


class ConfigKeyError(UnknownNameError):
    """An unknown config key."""


class KeyRead(NamedTuple):
    """A setting, or a group of them, that code has read."""

    full_key: str
    value: Any


# The list to which every node reports what is read from it, while one is listening. The nodes
# report, instead of a view of the tree that records: what is built keeps no view when it is over.
_reads: ContextVar[list[tuple["CfgNode", str]] | None] = ContextVar("reads", default=None)


@contextmanager
def recorded_reads(reads: list[KeyRead]) -> Iterator[None]:
    """Append to `reads` what the code inside reads from any tree by attribute, in that order.

    A recording inside another one has its reads to itself.
    """
    seen: list[tuple[CfgNode, str]] = []
    token = _reads.set(seen)
    try:
        yield
    finally:
        _reads.reset(token)
        # A node does not know its own key. Whoever reads a leaf has read its group before.
        prefixes: dict[int, str] = {}
        for node, name in seen:
            full_key = prefixes.get(id(node), "") + name
            value = node.get(name)
            if isinstance(value, CfgNode):
                prefixes[id(value)] = full_key + "."
            reads.append(KeyRead(full_key, value))


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
                did_you_mean(value, [c for c in self.choices if isinstance(c, str)])
                if isinstance(value, str)
                else ""
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
        self,
        init_dict: dict[str, Any] | None = None,
        key_list: Any = None,
        new_allowed: bool = False,
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
            seen = _reads.get()
            if seen is not None:
                seen.append((self, name))
            return self[name]
        if name.startswith("__"):  # copy and pickle ask for what is not there
            raise AttributeError(name)
        raise AttributeError(f"no config key {name!r} here.{did_you_mean(name, self)}")

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = False) -> None:
        """Take over the settings of a YAML file and of the files that it names in `_BASE_`.

        Args:
            cfg_filename: Path; `~` is the home folder, and `detkit://X` the file X that comes with
                detkit. `_BASE_` takes the same forms, or a path relative to the file that says it,
                or a list of such.
            allow_unsafe: Only there so that calls written for Detectron2 work. Nothing unsafe is
                ever loaded.

        Raises:
            FileNotFoundError: The file or one of its bases is not there.
            ConfigError: Not YAML; a tag that would run code; bases in a circle; a value of the wrong
                type or out of range.
            ConfigKeyError: An unknown key.
        """
        if allow_unsafe:
            logger.warning("allow_unsafe=True has no effect: detkit reads YAML as data only")
        for file in files_with_bases(cfg_filename):
            self._merge(file.tree, self, (), file)

    def merge_from_other_cfg(self, cfg_other: _YacsNode) -> None:
        """Take over the settings of another tree.

        Raises:
            ConfigKeyError: The other tree has a key that this one lacks.
            ConfigError: A value has the wrong type or is out of range.
        """
        self._merge(cfg_other, self, (), None)

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        """Take over settings given as `[KEY, VALUE, KEY, VALUE, ...]`, as on a command line.

        A value given as text is read as a Python literal where it is one: `"(600, 800)"`, `"True"`,
        `"1e-3"`.

        Raises:
            ConfigKeyError: An unknown key.
            ConfigError: An odd number of words, or a value of the wrong type or out of range.
        """
        if len(cfg_list) % 2:
            raise ConfigError(
                f"settings come in pairs KEY VALUE, got {len(cfg_list)} words: {list(cfg_list)}"
            )
        for full_key, value in zip(cfg_list[0::2], cfg_list[1::2], strict=True):
            # One nested mapping per pair runs through the same checks as a file.
            tree: Any = value
            for part in reversed(str(full_key).split(".")):
                tree = {part: tree}
            self._merge(tree, self, (), None)

    def _merge(
        self, tree: dict[str, Any], root: "CfgNode", path: tuple[str, ...], file: YamlFile | None
    ) -> None:
        """Merge a plain tree into this node, which lies at `path` below `root`."""
        if self.is_frozen():
            raise AttributeError(
                "this config is frozen; merge into `cfg.clone()` after `defrost()`, or before"
                " `freeze()`"
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
                    raise ConfigError(
                        f"{where}{full_key} is a group of keys ({members}...), got {value!r}"
                    )
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
        value = coerce(decode(value, present), present, full_key, where)
        problem = spec.problem(value) if spec is not None else ""
        if problem:
            raise ConfigError(f"{where}{full_key} {problem}")
        return value

    @contextmanager
    def edited(self) -> Iterator["CfgNode"]:
        """Yield an unfrozen copy to change; on exit it is frozen if this tree is.

        Example:
            >>> cfg = get_cfg()
            >>> with cfg.edited() as longer:
            ...     longer.SOLVER.MAX_ITER *= 2
        """
        copied = self.clone()
        copied.defrost()
        yield copied
        if self.is_frozen():
            copied.freeze()

    def keys_of_leaves(self, prefix: str = "") -> Iterator[str]:
        """Return the full key of every setting below this node."""
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
        """Return the setting at a dotted key such as `MODEL.RPN.NMS_THRESH`.

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
    """Go down to the setting itself where a group holds one only: `RPN.NMS_THRESH` says more than
    `RPN`.
    """
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


def _new_value(value: Any, full_key: str, where: str) -> Any:
    """A value for a key that did not exist: below MODEL.CUSTOM, say."""
    if isinstance(value, dict):
        node = CfgNode(new_allowed=True)
        for key, item in value.items():
            node[key] = _new_value(item, f"{full_key}.{key}", where)
        return node
    value = decode(value, None)
    require_plain(value, full_key, where)
    return copy.deepcopy(value)
