"""Print the command in the README's N-th fenced bash block: `readme_command.py 1`."""

import re
import sys
from pathlib import Path

readme = Path(__file__).resolve().parents[1] / "README.md"
blocks = re.findall(
    r"^```bash\n(.*?)^```", readme.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)
command = blocks[int(sys.argv[1]) - 1].strip()
if "\n" in command:
    sys.exit(f"block {sys.argv[1]} of the README must hold one command line, has:\n{command}")
print(command)
