import gc
import os
import platform
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from detkit.utils.env import (
    TORCH_VERSION,
    assert_fx_safe,
    collect_env_info,
    garbage_collection_off,
    is_fx_tracing,
    random_state,
    resolve_device,
    reuse_freed_memory,
    seed_all_rng,
    set_random_state,
    setup_custom_environment,
    setup_environment,
    torch_version,
)
from detkit.utils.errors import ConfigError


def test_seed_repeats_every_generator():
    def draws():
        seed_all_rng(7)
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    assert draws() == draws()


def test_no_seed_draws_one_and_gives_it():
    assert 0 <= seed_all_rng(None) < 2**32


def test_seed_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"must lie in \[0, 2\*\*32\), got -2"):
        seed_all_rng(-2)


@pytest.mark.parametrize(
    "num_normal", [0, 1]
)  # of normal numbers, two are drawn at once, and one is kept
def test_state_repeats_every_generator(num_normal):
    def draws():
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.randn(),
            torch.randn(3).tolist(),
        )

    for _ in range(num_normal):
        random.gauss(0, 1), np.random.randn()
    state = random_state()
    expected = draws()
    set_random_state(state)
    assert draws() == expected


def test_auto_gives_a_device_that_works():
    assert torch.zeros(1, device=resolve_device("auto")).sum() == 0


@pytest.mark.parametrize("name", ["gpu", "cuda:x", ""])
def test_unknown_device_is_refused(name):
    with pytest.raises(ValueError, match="MODEL.DEVICE must be auto, cpu, cuda, cuda:N or mps"):
        resolve_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_missing_cuda_says_what_to_set():
    with pytest.raises(ValueError, match="sees no CUDA device. Set MODEL.DEVICE to cpu or auto"):
        resolve_device("cuda")


@pytest.mark.parametrize(
    ("text", "version"), [("2.6.0", (2, 6)), ("2.15.0a0+git1", (2, 15)), ("3.0.1+cu130", (3, 0))]
)
def test_version_is_read_from_any_build(monkeypatch, text, version):
    monkeypatch.setattr(torch, "__version__", text)
    assert torch_version() == version


_COUNT_FAULTS = """
import resource, torch
from detkit.utils.env import reuse_freed_memory
assert reuse_freed_memory() is {expected}
torch.ones(24 << 20)  # freed at once: there is room for what follows, which glibc by itself would map anew
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(16 << 20)  # 64 MB, 16,384 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults_of_a_large_tensor(expected: bool, **environment: str) -> int:
    program = _COUNT_FAULTS.format(expected=expected)
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRE"))
    }
    # In a process of its own: the setting is for good.
    done = subprocess.run(
        [sys.executable, "-c", program], env=kept | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again_without_a_page_fault():
    assert _faults_of_a_large_tensor(True) < 100


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_allocator_that_the_user_tuned_is_left_alone():
    assert _faults_of_a_large_tensor(False, MALLOC_TRIM_THRESHOLD_="131072") > 1000


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert reuse_freed_memory() is False


_GROW = """
import torch
from detkit.utils.env import return_freed_memory, reuse_freed_memory
reuse_freed_memory()
kept = []
for _ in range(8):
    block = torch.ones(24 << 18)  # 24 MB
    del block
    kept.append(torch.ones(1 << 10))  # in the place of the block: the next one does not fit
    return_freed_memory()
    resident = int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
    print(resident)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_freed_memory_is_returned():
    done = subprocess.run([sys.executable, "-c", _GROW], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sizes = [int(line) for line in done.stdout.split()]
    assert sizes[-1] < sizes[0] + 24


# --- versions ---


def test_table_names_what_a_bug_report_needs(monkeypatch):
    monkeypatch.setenv("DETKIT_DATASETS", "/somewhere")
    table = collect_env_info()
    for word in (
        "platform",
        "python",
        "torch",
        "torchvision",
        "pycocotools",
        "CUDA",
        "/somewhere",
    ):
        assert word in table


@pytest.mark.parametrize("was_on", [True, False])
def test_garbage_collection_is_afterwards_as_before(was_on):
    @garbage_collection_off()
    def fail():
        raise KeyError(gc.isenabled())

    try:
        if not was_on:
            gc.disable()
        with pytest.raises(KeyError, match="False"):
            fail()
        assert gc.isenabled() is was_on
    finally:
        gc.enable()


def test_module_that_sets_up_the_environment_is_run(tmp_path, monkeypatch):
    file = tmp_path / "own.py"
    file.write_text("import os\ndef setup_environment():\n    os.environ['FROM_OWN'] = '1'")
    monkeypatch.setenv("DETECTRON2_ENV_MODULE", str(file))
    monkeypatch.setenv("FROM_OWN", "0")
    setup_environment()
    assert os.environ["FROM_OWN"] == "1"
    file.write_text("")
    with pytest.raises(ConfigError, match="has no function setup_environment"):
        setup_custom_environment(str(file))


def test_version_of_torch_and_tracing():
    assert TORCH_VERSION >= (2, 6)
    assert not is_fx_tracing()
    with pytest.raises(AssertionError, match="must hold"):
        assert_fx_safe(False, "must hold")
