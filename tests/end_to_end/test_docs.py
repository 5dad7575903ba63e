"""What README.md and docs/ say of this repository's own files."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from detkit import model_zoo
from detkit.cli.command import COMMANDS
from detkit.cli.parsers import PARSERS
from detkit.config import get_cfg

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_first_two_bash_blocks_of_the_readme_are_one_command_each() -> None:
    install, test = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)[:2]
    assert install.count("\n") == test.count("\n") == 1
    assert install.startswith("pip install . && ")
    assert "python -m pytest" in test


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    # Written while the site is built.
    generated: set[str] = set()
    broken = [
        link
        for link in links
        if "://" not in link and link not in generated and not (page.parent / link).exists()
    ]
    assert broken == []


def test_each_fault_in_the_tables_has_a_test_that_is_there() -> None:
    lines = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").splitlines()
    tables = "\n".join(lines).split("| fault | what happens | held by |\n|---|---|---|\n")[1:]
    rows = [row for table in tables for row in table.partition("\n\n")[0].splitlines()]
    assert len(rows) > 25
    for row in rows:
        named = re.findall(r"`(tests/[^`]*)`", row.rsplit("|", 2)[1])
        assert named, row
        assert [name for name in named if not (ROOT / name).exists()] == []


YAML_BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(
        re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.M)
    )
]


@pytest.mark.parametrize("block", YAML_BLOCKS)
def test_yaml_of_the_documentation_is_a_config(block: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(block)
    get_cfg().merge_from_file(str(tmp_path / "config.yaml"))


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """What MkDocs runs to generate pages."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _keys(tree: dict, prefix: str = "") -> list[str]:
    return [
        name
        for key, value in tree.items()
        for name in (
            _keys(value, f"{prefix}{key}.") if value and isinstance(value, dict) else [prefix + key]
        )
    ]


def test_page_of_commands_has_the_help_of_each(hooks: ModuleType) -> None:
    page = hooks._commands()
    assert re.findall(r"^## detkit (\S+)$", page, re.MULTILINE) == [
        c for c in COMMANDS if c in PARSERS
    ]
    assert "usage: detkit config show" in page


def test_config_reference_has_every_key_once(hooks: ModuleType) -> None:
    listed = re.findall(r"<dt id='([^']+)'", hooks._config_keys())
    assert sorted(listed) == sorted(_keys(get_cfg()))


def test_condition_of_a_key_is_told(hooks: ModuleType) -> None:
    page = hooks._config_keys()
    entry = page[page.index("<dt id='SOLVER.NESTEROV'") :].partition("</dd>")[0]
    assert "Has an effect only with" in entry
    assert "SOLVER.OPTIMIZER" in entry


def test_model_zoo_has_every_config_but_common_parts(hooks: ModuleType) -> None:
    page = hooks._model_zoo()
    configs = [Path(name) for name in model_zoo.list_configs()]
    models = [path for path in configs if not path.name.startswith("Base-")]
    assert len(models) > 90
    for path in models:
        assert f"/configs/{path.with_suffix('.yaml').as_posix()})" in page
