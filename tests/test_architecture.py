"""The floors of the house: a package imports packages of lower floors only, and there are no circles."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "detkit"
FLOORS = {
    "utils": 0,
    "config": 1,
    "structures": 1,
    "checkpoint": 1,
    "layers": 2,
    "solver": 2,
    "visualization": 2,
    "data": 3,
    "modeling": 4,
    "evaluation": 4,
    "engine": 5,
    "model_zoo": 5,
    "export": 5,
    "cli": 6,
    "as_detectron2": 7,
}


def imported_modules(path: Path) -> set[str]:
    """Full names that a file imports from detkit, anywhere in it: modules, or names in modules."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("detkit.")}


def modules() -> dict[str, Path]:
    """Every module of detkit by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def graph() -> dict[str, set[str]]:
    """Module -> the detkit modules it imports. Importing a name from a package counts as importing the package."""
    edges = defaultdict(set)
    for name, path in MODULES.items():
        for imported in imported_modules(path):
            target = imported if imported in MODULES else imported.rpartition(".")[0]
            # A package's __init__ imports its files; a file that imports a name from its own package closes a circle.
            if target in MODULES and target not in (name, "detkit"):
                edges[name].add(target)
    return edges


GRAPH = graph()


def test_every_package_has_a_floor():
    packages = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert packages <= set(FLOORS), f"packages without a floor: {packages - set(FLOORS)}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_the_floors_only(module):
    parts = module.split(".")
    if len(parts) < 2 or parts[1] not in FLOORS:
        assert parts[1:] in ([], ["__main__"]), f"{module} lies in no package"
        return
    for target in GRAPH[module]:
        package = target.split(".")[1]
        if package != parts[1]:
            assert FLOORS[package] < FLOORS[parts[1]], (
                f"{module} imports {target}: not a lower floor"
            )


def test_utils_are_leaves():
    # Leaves that the other leaves share.
    allowed = {
        "detkit.utils.errors",
        "detkit.utils.text",
        "detkit.utils.file_io",
        "detkit.utils.download",
        "detkit.utils.image_file",
        "detkit.utils.logger",
        "detkit.utils.remote_files",
    }
    for module, targets in GRAPH.items():
        if module.startswith("detkit.utils."):
            assert targets <= allowed, f"{module} imports {targets - allowed}"


def test_imports_have_no_circles():
    # A package's __init__ imports its files, and these may not import it back: they name the file they need.
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module in done:
            return
        for target in sorted(GRAPH[module]):
            visit(target, (*trail, module))
        done.add(module)

    for module in MODULES:
        visit(module, ())


def test_checker_sees_an_import_inside_a_function(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "def f():\n    from detkit.engine.launch import launch\n    import detkit.cli.train\n"
    )
    assert imported_modules(file) == {"detkit.engine.launch.launch", "detkit.cli.train"}


@pytest.mark.parametrize(
    "module", [m for m in sorted(MODULES) if MODULES[m].name == "__init__.py" and m != "detkit"]
)
def test_packages_list_their_names_literally(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    imported = {
        alias.asname or alias.name
        for n in tree.body
        if isinstance(n, ast.ImportFrom)
        for alias in n.names
    }
    exported = [n for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"]  # type: ignore[attr-defined]
    assert "*" not in imported, f"{module} has a star import"
    if imported:
        names = ast.literal_eval(exported[0].value)
        assert names == sorted(set(names)) or set(names) <= imported | {"hooks", "transforms"}, (
            f"{module}: __all__ {names}"
        )
