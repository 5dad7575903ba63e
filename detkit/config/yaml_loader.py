"""YAML as data: nothing in a file can run code, and every key remembers its line.

Detectron2's RetinaNet file computes its anchor sizes with a Python expression under the tag
`!!python/object/apply:eval`. That one tag is understood, through `evaluate_arithmetic`; every other
tag is refused.
"""

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_EVAL_TAG = "tag:yaml.org,2002:python/object/apply:eval"
_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{kind}"
    for kind in ("null", "bool", "int", "float", "str", "seq", "map", "timestamp")
}
# Aliases let a short file stand for a huge tree ("billion laughs"). No config comes near this many
# values.
_MAX_NODES = 100_000
# libyaml's composer recurses in C, where a deep file would end the process; ours recurses in
# Python.
_MAX_DEPTH = 64
_MAX_BYTES = 2**22
_MAX_STEPS = 10_000
_MAX_NUMBER = 1e18

# libyaml where it is built in: ten times faster, the same grammar.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class YamlFile:
    """A parsed file: its tree of plain values, and the line (from 1) of every full key in it."""

    path: Path
    tree: dict[str, Any]
    lines: dict[str, int] = field(default_factory=dict)

    def where(self, full_key: str) -> str:
        """`file:line` of a key, or of the closest parent that the file names."""
        while full_key and full_key not in self.lines:
            full_key = full_key.rpartition(".")[0]
        return f"{self.path}:{self.lines[full_key]}" if full_key else str(self.path)


def load_yaml(path: Path) -> YamlFile:
    """Read a YAML file whose top level is a mapping (an empty file counts as an empty one).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not YAML, too large or too deeply nested, has a tag that is refused, a key
            twice, or a key that is no string.
    """
    try:
        text = _read_text(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(f"no config file {path}") from error
    except OSError as error:  # too long a name, no right to read it
        raise FileNotFoundError(f"cannot open config file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a YAML text file: {error}") from error
    try:
        _require_modest(text, path)
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    file = YamlFile(path, {})
    if root is None:
        return file
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path} must hold a mapping of config keys at its top level")
    file.tree = _Builder(file).mapping(root, "")
    return file


def _read_text(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"{path} is larger than {_MAX_BYTES // 2**20} MiB: this is no config")
    return data.decode("utf-8-sig")


def _require_modest(text: str, path: Path) -> None:
    """Look at the stream of events, which takes no memory, before a tree is built of it."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_Loader)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH or count > 2 * _MAX_NODES:
            too = (
                f"nested more than {_MAX_DEPTH} deep"
                if depth > _MAX_DEPTH
                else f"more than {_MAX_NODES} values"
            )
            raise ValueError(f"{path}:{event.start_mark.line + 1}: {too}: this is no config")


class _Builder:
    """Turns composed YAML nodes into plain values, counting them."""

    def __init__(self, file: YamlFile) -> None:
        self._file = file
        self._count = 0
        self._open: set[int] = set()
        self._scalars = yaml.constructor.SafeConstructor()

    def mapping(self, node: yaml.MappingNode, prefix: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                raise ValueError(
                    f"{self._file.path}:{line}: a config key must be a string, got {key!r}"
                )
            full_key = prefix + key
            if key in result:
                raise ValueError(
                    f"{self._file.path}:{line}: {full_key} is set twice, first in line"
                    f" {self._file.lines[full_key]}"
                )
            self._file.lines.setdefault(full_key, line)
            result[key] = self.value(value_node, full_key)
        return result

    def value(self, node: yaml.Node, full_key: str) -> Any:
        where = f"{self._file.path}:{node.start_mark.line + 1}"
        self._count += 1
        if self._count > _MAX_NODES:
            raise ValueError(
                f"{where}: more than {_MAX_NODES} values once aliases are followed: this is no"
                " config"
            )
        if node.tag == _EVAL_TAG:
            return _evaluate_tag(node, where)
        if node.tag not in _PLAIN_TAGS:
            raise ValueError(
                f"{where}: tag {_short(node.tag)!r} at {full_key} is refused: YAML is data, and"
                " runs nothing"
            )
        if isinstance(node, yaml.ScalarNode):
            try:
                return self._scalars.construct_object(node)
            except (
                yaml.YAMLError,
                ValueError,
                LookupError,
                AttributeError,
                TypeError,
                ArithmeticError,
            ) as error:
                # PyYAML takes apart what a tag such as !!bool or !!timestamp stands before, without
                # a look at it.
                raise ValueError(
                    f"{where}: {full_key} has an unreadable value {node.value!r}: {error}"
                ) from error
        if id(node) in self._open:
            raise ValueError(f"{where}: {full_key} contains itself through an alias")
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, full_key + ".")
            return [self.value(item, full_key) for item in node.value]
        finally:
            self._open.remove(id(node))


def _short(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")


def _evaluate_tag(node: yaml.Node, where: str) -> Any:
    items = node.value if isinstance(node, yaml.SequenceNode) else []
    if len(items) != 1 or not isinstance(items[0], yaml.ScalarNode):
        raise ValueError(f"{where}: {_short(_EVAL_TAG)} takes a list of one expression")
    try:
        return evaluate_arithmetic(items[0].value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


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


def evaluate_arithmetic(expression: str) -> Any:
    """Evaluate numbers, `+ - * / // % **`, lists, tuples and list comprehensions over them; nothing else.

    Example:
        >>> evaluate_arithmetic("[[x, x * 2**(1.0/2)] for x in [32, 64]]")
        [[32, 45.254833995939045], [64, 90.50966799187809]]

    Raises:
        ValueError: The expression holds anything else (a call, an attribute, a string), or grows
            too large.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression!r} is not an arithmetic expression: {error}") from error
    return _Arithmetic(expression).visit(tree.body, {})


class _Arithmetic:
    """A walk over the syntax tree that knows a handful of node types and refuses the rest."""

    def __init__(self, expression: str) -> None:
        self._expression = expression
        self._steps = 0

    def visit(self, node: ast.expr, names: dict[str, Any]) -> Any:
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise ValueError(f"{self._expression!r} takes more than {_MAX_STEPS} steps")
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return number
            case ast.Name(id=name) if name in names:
                return names[name]
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
                return [
                    self.visit(item, {**names, name: value})
                    for value in self._sequence(values, names)
                ]
        raise ValueError(
            f"{ast.unparse(node)!r} in {self._expression!r} is refused: only arithmetic over"
            " numbers is understood"
        )

    def _sequence(self, node: ast.expr, names: dict[str, Any]) -> list[Any] | tuple[Any, ...]:
        values = self.visit(node, names)
        if not isinstance(values, list | tuple):
            raise ValueError(
                f"{ast.unparse(node)!r} in {self._expression!r} is no list to loop over"
            )
        return values

    def _apply(self, op: ast.AST, *operands: Any) -> float:
        if not all(isinstance(x, int | float) and abs(x) <= _MAX_NUMBER for x in operands):
            raise ValueError(
                f"{self._expression!r}: {type(op).__name__} needs numbers up to {_MAX_NUMBER:g},"
                f" got {operands}"
            )
        if isinstance(op, ast.Pow) and abs(operands[1]) > 64:
            raise ValueError(
                f"{self._expression!r}: an exponent beyond 64 is refused, got {operands[1]}"
            )
        try:
            result = _OPERATORS[type(op)](*operands)
        except ArithmeticError as error:
            raise ValueError(f"{self._expression!r}: {error}") from error
        if isinstance(result, complex):
            raise ValueError(f"{self._expression!r}: a root of a negative number")
        return result
