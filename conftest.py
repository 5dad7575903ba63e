"""How the tests run: on all cores, one torch thread per worker, and examples in a folder of their own."""

import os
from pathlib import Path

import pytest

# Before torch is imported. Each of several workers with a thread per core would be slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_MOST_WORKERS = 8  # each holds torch and a few models, about 1 GB


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Use several workers for folders only: for a few files, starting them takes longer than the tests."""
    args = [arg.partition("::")[0] for arg in config.args]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if not any(Path(arg).is_dir() for arg in args) or cores in (None, 1):
        config.option.dist = "no"
        return 0
    return min(cores, _MOST_WORKERS)


@pytest.fixture(autouse=True)
def _examples_in_an_empty_folder(request: pytest.FixtureRequest) -> None:
    """Run the examples of docstrings where they may write files."""
    if isinstance(request.node, pytest.DoctestItem):
        tmp_path: Path = request.getfixturevalue("tmp_path")
        request.getfixturevalue("monkeypatch").chdir(tmp_path)
