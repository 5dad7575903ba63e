"""Safe loading of YAML configs, with the line of each key and the files in `_BASE_`.

Detectron2's RetinaNet config computes its anchor sizes with a Python expression under the tag
`!!python/object/apply:eval`, which `evaluate_arithmetic` evaluates. Other tags are an error.
"""

import ast
import functools
import logging
import operator
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from detkit.utils.errors import ConfigError, MissingFileError, UserError
from detkit.utils.file_io import packaged_configs
from detkit.utils.remote_files import relocated
from detkit.utils.text import did_you_mean

logger = logging.getLogger(__name__)

BASE_KEY = "_BASE_"
PACKAGED_PREFIX = "detkit://"

_EVAL_TAG = "tag:yaml.org,2002:python/object/apply:eval"
_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{kind}"
    for kind in ("null", "bool", "int", "float", "str", "seq", "map", "timestamp", "python/tuple")
}
# Other names of the same, in dumps of objects of Python.
_TAGS_OF_PYTHON = {"none": "null", "long": "int", "unicode": "str", "list": "seq", "dict": "map"}
_TAGS_OF_PYTHON |= {name: name for name in ("bool", "int", "float", "str")}
# Far above any real config, against small files that expand to huge trees: aliases of aliases
# ("billion laughs"), bases of bases (2^n files), and nested brackets (libyaml's composer recurses
# in C, where a stack overflow ends the process).
_MAX_BYTES = 2**22
_MAX_NODES = 100_000
_MAX_DEPTH = 64
_MAX_FILES = 100
_MAX_DIGITS = 64
# The same for arithmetic, against `9 ** 9 ** 9` and nested comprehensions.
_MAX_STEPS = 10_000
_MAX_NUMBER = 1e18
_MAX_EXPONENT = 64

# libyaml, if PyYAML is built with it: ten times faster, with the same grammar.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class YamlFile:
    """A parsed file: its tree of plain values, and the line, from 1, of each full key."""

    path: Path
    tree: dict[str, Any]
    lines: dict[str, int] = field(default_factory=dict)

    def where(self, full_key: str) -> str:
        """Return `file:line` of a key, or of its closest parent in the file."""
        while full_key and full_key not in self.lines:
            full_key = full_key.rpartition(".")[0]
        return f"{self.path}:{self.lines[full_key]}" if full_key else str(self.path)


def files_with_bases(
    name: str, path_fields: Mapping[str, Sequence[str]] | None = None
) -> list[YamlFile]:
    """Load a file and all of its bases, in the order in which they are merged.

    Args:
        name: A path, `detkit://NAME` or `~/...`; see `CfgNode.merge_from_file`.
        path_fields: Fields that are paths, by the full key of a list of mappings. Paths that exist
            beside the file become absolute; others are later searched in `$DETKIT_DATASETS`.

    Raises:
        MissingFileError: The file or one of its bases does not exist.
        ConfigError: A file is not YAML.
        ConfigError: The bases form a circle, or are more than 100 files.
    """
    files = _with_bases(_resolve(name, Path.cwd()), ())
    for file in files:
        for full_key, fields in (path_fields or {}).items():
            _make_absolute(file, full_key, fields)
    return files


def _with_bases(path: Path, below: tuple[Path, ...]) -> list[YamlFile]:
    if path in below:
        circle = " -> ".join(str(p) for p in (*below[below.index(path) :], path))
        raise ConfigError(f"{BASE_KEY} forms a circle: {circle}")
    if len(below) >= _MAX_FILES:
        raise ConfigError(f"{below[0]} has a chain of more than {_MAX_FILES} files in {BASE_KEY}")
    try:
        file = load_yaml(path)
    except FileNotFoundError as error:
        named_in = ""
        if below:
            beside = {file.name for file in path.parent.glob("*.yaml")} - {below[-1].name}
            named_in = f", named as {BASE_KEY} in {below[-1]}.{did_you_mean(path.name, beside)}"
        raise MissingFileError(f"{error}{named_in}") from error
    bases = file.tree.pop(BASE_KEY, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(
            f"{file.where(BASE_KEY)}: {BASE_KEY} must be a path or a list of paths, got {bases!r}"
        )
    # Depth first, in the order of the list: later bases override earlier ones, and the file all.
    merged: list[YamlFile] = []
    for base in bases:
        merged += _with_bases(_resolve(base, path.parent), (*below, path))
        if len(merged) >= _MAX_FILES:
            raise ConfigError(f"{path} includes more than {_MAX_FILES} files through {BASE_KEY}")
    return [*merged, file]


def _resolve(name: str, folder: Path) -> Path:
    if str(name).startswith(PACKAGED_PREFIX):
        return packaged_configs() / str(name)[len(PACKAGED_PREFIX) :]
    try:
        path = folder / Path(name).expanduser()
        # Scripts for Detectron2 look here, by `detectron2.__file__` or `pkg_resources`.
        zoo = Path(__file__).resolve().parents[1] / "model_zoo" / "configs"
        if path.is_relative_to(zoo):
            return packaged_configs() / path.relative_to(zoo)
        # Not the file's own link: bases are searched beside the link, as in Detectron2.
        return path.parent.resolve() / path.name
    except (OSError, RuntimeError, ValueError) as error:
        # A circle of links, an unknown user after `~`, or a null byte.
        raise MissingFileError(f"no config file {name!r}: {error}") from error


def _make_absolute(file: YamlFile, full_key: str, fields: Sequence[str]) -> None:
    entries: Any = file.tree
    for part in full_key.split("."):
        entries = entries.get(part) if isinstance(entries, dict) else None
    for entry in entries if isinstance(entries, list) else []:
        for name in fields:
            value = entry.get(name) if isinstance(entry, dict) else None
            if not isinstance(value, str) or (name == "split" and not value.endswith(".txt")):
                continue  # a split without .txt is a name, even if a folder has that name too
            entry[name] = relocated(value, functools.partial(_beside, file.path.parent))


def _beside(folder: Path, path: str) -> str:
    """Return a path that exists below a folder as absolute, and others as they are."""
    beside = folder / Path(path).expanduser()
    try:
        return str(beside.resolve()) if beside.exists() else path
    except (OSError, ValueError):
        return path  # an invalid path, such as a name too long, is reported when it is opened


def load_yaml(path: Path) -> YamlFile:
    """Load a YAML file whose top level is a mapping; an empty file is an empty mapping.

    Raises:
        MissingFileError: The file does not exist or cannot be opened.
        ConfigError: The file is not YAML, too large or too deeply nested.
        ConfigError: A tag is refused, or a key is not a string.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            # A pipe would wait for ever for somebody who writes to it.
            raise MissingFileError(f"no config file {path}: it is a folder, a pipe or a device")
        with path.open("rb") as opened:
            data = opened.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ConfigError(f"{path} is larger than {_MAX_BYTES // 2**20} MiB: not a config")
        text = data.decode("utf-8-sig")  # some Windows editors write a byte order mark
    except UserError:
        raise
    except FileNotFoundError as error:
        raise MissingFileError(f"no config file {path}") from error
    except OSError as error:  # no permission, or a name that is too long
        raise MissingFileError(f"cannot open config file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a YAML text file: {error}") from error
    return parse_yaml(text, path)


def parse_yaml(text: str, path: Path) -> YamlFile:
    """Parse what a YAML file, or a checkpoint, holds; `path` is for messages. Errors as above."""
    try:
        _require_modest(text, path)
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        if mark is not None and "nesting depth" in str(error):
            # libyaml's scanner has its own limit, and reads ahead of the events.
            raise _nested_too_deep(path, mark) from error
        raise ConfigError(f"{path} is not valid YAML: {yaml_fault(error, text)}") from error
    file = YamlFile(path, {})
    if root is None:
        return file
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path} must hold a mapping of config keys at its top level")
    file.tree = _Builder(file).mapping(root, "")
    return file


def _require_modest(text: str, path: Path) -> None:
    """Raise a ConfigError if a file is too deep or too large, without building its tree."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_Loader)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            raise _nested_too_deep(path, event.start_mark)
        if count > 2 * _MAX_NODES:  # a collection has two events, start and end
            raise ConfigError(
                f"{path}:{event.start_mark.line + 1}: more than {_MAX_NODES} values: not a config"
            )


def yaml_fault(error: Exception, text: str) -> str:
    """Return in one line what a parser of YAML says about a text, and where."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    number = error.problem_mark.line
    fault = f"line {number + 1}: {error.problem}"
    if error.context_mark is not None and error.context_mark.line != number:
        fault += f", {error.context} that begins in line {error.context_mark.line + 1}"
    line = text.split("\n")[number : number + 1]
    if line and "\t" in line[0][: error.problem_mark.column + 1]:
        fault += ". Tabs do not indent in YAML: use spaces"
    return fault


def _nested_too_deep(path: Path, mark: Any) -> ConfigError:
    return ConfigError(f"{path}:{mark.line + 1}: nested more than {_MAX_DEPTH} deep: not a config")


class _Builder:
    """Converts composed YAML nodes to plain values, and counts them."""

    def __init__(self, file: YamlFile) -> None:
        self._file = file
        self._count = 0
        self._open: set[int] = set()
        self._scalars = yaml.constructor.SafeConstructor()

    def mapping(self, node: yaml.MappingNode, prefix: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in self._pairs(node, prefix):
            line = key_node.start_mark.line + 1
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                raise ConfigError(
                    f"{self._file.path}:{line}: a config key must be a string, got {key!r}"
                )
            self._file.lines[prefix + key] = line
            result[key] = self.value(value_node, prefix + key)
        return result

    def _pairs(self, node: yaml.MappingNode, prefix: str) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        """Yield the keys and values that a mapping merges in by `<<`, and then its own."""
        own: dict[str, yaml.Node] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                sources = [value_node]
                if isinstance(value_node, yaml.SequenceNode):
                    sources = value_node.value[::-1]  # the first of them counts
                for source in sources:
                    if not isinstance(source, yaml.MappingNode):
                        raise ConfigError(
                            f"{self._file.path}:{key_node.start_mark.line + 1}: << takes a mapping"
                            " or a list of mappings"
                        )
                    with self._entered(source, prefix + "<<"):
                        yield from self._pairs(source, prefix)
            elif isinstance(key_node, yaml.ScalarNode):
                # The last of two counts, as in PyYAML, which says nothing.
                earlier = own.setdefault(key_node.value, key_node)
                if earlier is not key_node:
                    logger.warning(
                        "%s:%d: %s is set twice: what stands in line %d is not used",
                        self._file.path,
                        key_node.start_mark.line + 1,
                        prefix + key_node.value,
                        earlier.start_mark.line + 1,
                    )
        yield from (pair for pair in node.value if pair[0].tag != "tag:yaml.org,2002:merge")

    def value(self, node: yaml.Node, full_key: str) -> Any:
        where = f"{self._file.path}:{node.start_mark.line + 1}"
        if node.tag == _EVAL_TAG:
            return _evaluate_tag(node, where)
        kind = _TAGS_OF_PYTHON.get(node.tag.removeprefix("tag:yaml.org,2002:python/"))
        node.tag = f"tag:yaml.org,2002:{kind}" if kind else node.tag
        if node.tag not in _PLAIN_TAGS:
            raise ConfigError(
                f"{where}: tag {_short(node.tag)!r} at {full_key} is refused: configs run no code"
            )
        if isinstance(node, yaml.ScalarNode):
            _require_plain_number(node, f"{where}: {full_key}")
            try:
                return self._scalars.construct_object(node)
            except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError,
                    ArithmeticError) as error:  # fmt: skip
                # PyYAML parses the text after a tag such as !!bool or !!timestamp without checks.
                raise ConfigError(
                    f"{where}: {full_key} has an unreadable value {node.value!r}: {error}"
                ) from error
        with self._entered(node, full_key):
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, full_key + ".")
            return [self.value(item, full_key) for item in node.value]

    @contextmanager
    def _entered(self, node: yaml.Node, full_key: str) -> Iterator[None]:
        """Count the values in a node, and refuse one that contains itself."""
        where = f"{self._file.path}:{node.start_mark.line + 1}"
        # Counted again: an alias was one event in `_require_modest`, and is a whole tree here.
        self._count += 1 + len(node.value)
        if self._count > _MAX_NODES:
            raise ConfigError(
                f"{where}: more than {_MAX_NODES} values through aliases: not a config"
            )
        if id(node) in self._open:
            raise ConfigError(f"{where}: {full_key} contains itself through an alias")
        self._open.add(id(node))
        try:
            yield
        finally:
            self._open.remove(id(node))


def _require_plain_number(node: yaml.ScalarNode, where: str) -> None:
    """Raise a ConfigError for a number that YAML 1.1 reads as another one than most people."""
    text = node.value
    if node.tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
        return
    if len(text) > _MAX_DIGITS:
        raise ConfigError(
            f"{where} must be a number of at most {_MAX_DIGITS} characters, got {text:.20}..."
        )
    is_octal = node.tag.endswith(":int") and re.fullmatch(r"[-+]?0[0-9_]+", text)
    if ":" in text or is_octal:
        raise ConfigError(
            f"{where} is {text}, which YAML 1.1 reads in base {8 if is_octal else 60}: write a"
            f" decimal number, or '{text}' in quotes if it is a text"
        )


def _short(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")


def _evaluate_tag(node: yaml.Node, where: str) -> Any:
    items = node.value if isinstance(node, yaml.SequenceNode) else []
    if len(items) != 1 or not isinstance(items[0], yaml.ScalarNode):
        raise ConfigError(f"{where}: {_short(_EVAL_TAG)} takes a list of one expression")
    try:
        return evaluate_arithmetic(items[0].value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "int": int,
    "float": float,
    "round": lambda number: round(number),  # to digits it is a power of ten, of any size
    "range": range,
    "list": list,
    "tuple": tuple,
}


def evaluate_arithmetic(expression: str) -> Any:
    """Evaluate numbers, `+ - * / // % **`, lists, tuples, and list comprehensions over them.

    The functions int, float, round, range, list and tuple may be called.

    Example:
        >>> from detkit.config.yaml_loader import evaluate_arithmetic
        >>> evaluate_arithmetic("[[x, x * 2**(1.0/2)] for x in [32, 64]]")
        [[32, 45.254833995939045], [64, 90.50966799187809]]
        >>> evaluate_arithmetic("[int(x * 0.1 * 640) for x in range(5, 8)]")
        [320, 384, 448]

    Raises:
        ConfigError: The expression holds anything else: another call, an attribute, a string.
        ConfigError: It takes too many steps, or a number becomes too large.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{expression!r:.80} is not an arithmetic expression: {error}") from error
    try:
        return _Arithmetic(expression).visit(tree.body, {})
    except RecursionError as error:
        raise ConfigError(f"{expression!r:.80} is nested too deep") from error


class _Arithmetic:
    """Evaluates a syntax tree, and accepts a few node types only."""

    def __init__(self, expression: str) -> None:
        self._expression = expression
        self._steps = 0

    def _step(self) -> None:
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise ConfigError(f"{self._expression!r:.80} takes more than {_MAX_STEPS} steps")

    def _copy(self, value: Any) -> Any:
        # Not the value itself: `[[x, x] for x in ...]` would double its size in a single step.
        self._step()
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item) for item in value)
        return value

    def visit(self, node: ast.expr, names: dict[str, Any]) -> Any:
        self._step()
        # An allowlist: any other syntax, also of later versions of Python, is refused.
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return number
            case ast.Name(id=name) if name in names:
                return self._copy(names[name])
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
                return self._apply(op, self.visit(operand, names))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return self._apply(op, self.visit(left, names), self.visit(right, names))
            case ast.List(elts=items):
                return [self.visit(item, names) for item in items]
            case ast.Tuple(elts=items):
                return tuple(self.visit(item, names) for item in items)
            case ast.ListComp(
                elt=item,
                generators=[ast.comprehension(target=ast.Name(id=name), iter=values, ifs=[])],
            ):
                sequence = self.visit(values, names)
                if not isinstance(sequence, list | tuple):
                    raise ConfigError(
                        f"{ast.unparse(values)!r} in {self._expression!r} is not a list"
                    )
                return [self.visit(item, {**names, name: value}) for value in sequence]
            case ast.Call(func=ast.Name(id=name), args=[_, *_] as items, keywords=[]) if (
                name in _FUNCTIONS
            ):
                return self._call(name, [self.visit(item, names) for item in items])
        raise ConfigError(
            f"{ast.unparse(node)!r} in {self._expression!r} is refused: only arithmetic is allowed"
        )

    def _call(self, name: str, arguments: list[Any]) -> Any:
        try:
            result = _FUNCTIONS[name](*arguments)
            # Before it becomes a list, which may be one of any length.
            if isinstance(result, range) and len(result) > _MAX_STEPS:
                raise ConfigError(f"{self._expression!r:.80} takes more than {_MAX_STEPS} steps")
        except (TypeError, ValueError, ArithmeticError) as error:
            raise ConfigError(f"{self._expression!r:.80}: {name}: {error}") from error
        return self._copy(list(result) if isinstance(result, range) else result)

    def _apply(self, op: ast.AST, *operands: Any) -> float:
        # Numbers only: `[0] * 10**9` would take gigabytes in one step.
        if not all(isinstance(x, int | float) and abs(x) <= _MAX_NUMBER for x in operands):
            raise ConfigError(
                f"{self._expression!r}: {type(op).__name__} needs numbers up to {_MAX_NUMBER:g},"
                f" got {operands}"
            )
        if isinstance(op, ast.Pow) and abs(operands[1]) > _MAX_EXPONENT:
            raise ConfigError(
                f"{self._expression!r}: exponents must be at most {_MAX_EXPONENT}, got"
                f" {operands[1]}"
            )
        try:
            result = _OPERATORS[type(op)](*operands)
        except ArithmeticError as error:
            raise ConfigError(f"{self._expression!r}: {error}") from error
        if isinstance(result, complex):
            raise ConfigError(f"{self._expression!r} takes a root of a negative number")
        return result
