"""The whole suite runs on all cores; examples in docstrings run in a folder of their own."""

import os
from pathlib import Path

import pytest

# Before torch is imported. Workers with a thread per core each would be slower than one of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_MOST_WORKERS = 8  # each holds torch and a few models, about 1 GB


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the number of workers: several for the whole suite, none for a part of it.

    For a file or a folder, starting the workers takes longer than what they save.
    """
    paths = {Path(arg.partition("::")[0]).resolve() for arg in config.args}
    cores = os.cpu_count() or 1
    if config.rootpath / "tests" not in paths or cores == 1:
        config.option.dist = "no"
        return 0
    return min(cores, _MOST_WORKERS)


@pytest.fixture(autouse=True)
def _examples_in_an_empty_folder(request: pytest.FixtureRequest) -> None:
    if isinstance(request.node, pytest.DoctestItem):
        tmp_path: Path = request.getfixturevalue("tmp_path")
        request.getfixturevalue("monkeypatch").chdir(tmp_path)
