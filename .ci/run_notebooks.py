"""Run the notebooks on generated data: `run_notebooks.py NOTEBOOK ...`, by default all of them.

Nothing is written back. A notebook may take a minute.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

# Threads that wait in a loop make a busy machine ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).resolve().parents[1]

for path in map(Path, sys.argv[1:] or sorted((ROOT / "notebooks").glob("*.ipynb"))):
    notebook = nbformat.read(path, as_version=4)
    if any(cell.get("outputs") for cell in notebook.cells):
        sys.exit(f"{path.name} is committed with outputs; clear them")
    start = time.time()
    NotebookClient(notebook, timeout=1200, kernel_name="python3").execute()
    print(f"{path.name}: {time.time() - start:.0f} s")
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "execute_result":
                print("   ", output.data.get("text/plain", "")[:300])
