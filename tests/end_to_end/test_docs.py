"""What README.md and docs/ say of this repository's own files."""

import re
from pathlib import Path

import pytest

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
