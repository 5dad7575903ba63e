"""What README.md says of this repository's own files."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_each_fault_in_the_tables_has_a_test_that_is_there() -> None:
    section = README.partition("\n## When something goes wrong\n")[2].partition("\n## ")[0]
    rows = [
        line
        for line in section.splitlines()
        if line.startswith("| ") and not line.startswith("| fault ")
    ]
    assert len(rows) > 25
    for row in rows:
        named = re.findall(r"`(tests/[^`]*)`", row.rsplit("|", 2)[1])
        assert named, row
        assert [name for name in named if not (ROOT / name).exists()] == []
