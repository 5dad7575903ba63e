import enum
import os
import sys
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from detkit.checkpoint import load_checkpoint_file, save_checkpoint_file, save_weights_file
from detkit.checkpoint.safe_save import atomic_write

MODEL = {"w": torch.ones(2)}


class Color(enum.Enum):
    RED = "red"


def round_trip(tmp_path, **extra):
    path = str(tmp_path / "c.pth")
    save_checkpoint_file({"model": MODEL, **extra}, path)
    return load_checkpoint_file(path)


@pytest.mark.parametrize(
    ("value", "want"),
    [
        pytest.param(np.float64(1.5), 1.5, id="numpy-float"),
        pytest.param(np.int64(3), 3, id="numpy-int"),
        pytest.param(np.bool_(True), True, id="numpy-bool"),
        pytest.param(float("nan"), pytest.approx(float("nan"), nan_ok=True), id="nan"),
        pytest.param(True, True, id="bool"),
        pytest.param(defaultdict(int, {"a": 1}), {"a": 1}, id="defaultdict"),
        pytest.param(OrderedDict(b=1), {"b": 1}, id="ordered-dict"),
        pytest.param(Counter("aa"), {"a": 2}, id="counter"),
        pytest.param([1, ("a", None), {2}], [1, ("a", None), {2}], id="containers"),
        pytest.param(Path("a") / "b", os.path.join("a", "b"), id="path"),
        pytest.param(Color.RED, "red", id="enum"),
        pytest.param(torch.float16, torch.float16, id="dtype"),
    ],
)
def test_values_come_back(tmp_path, value, want):
    got = round_trip(tmp_path, x=value)["x"]
    assert got == want
    assert type(got) is type(want) or isinstance(want, type(pytest.approx(1.0)))


def test_arrays_become_tensors(tmp_path):
    assert torch.equal(round_trip(tmp_path, x=np.arange(3))["x"], torch.arange(3))


def test_parameters_become_tensors(tmp_path):
    assert type(round_trip(tmp_path, x=nn.Parameter(torch.ones(1)))["x"]) is torch.Tensor


def test_memory_format_comes_back(tmp_path):
    weight = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert round_trip(tmp_path, x=weight)["x"].is_contiguous(memory_format=torch.channels_last)


def test_part_of_a_large_tensor_is_saved_without_the_rest(tmp_path):
    round_trip(tmp_path, x=torch.zeros(1_000_000)[:2])
    assert (tmp_path / "c.pth").stat().st_size < 10_000


def test_value_that_could_not_be_loaded_is_refused_with_its_place(tmp_path):
    with pytest.raises(
        TypeError, match=r"checkpoint\['trainer'\]\['hooks'\]\[1\] is a builtins\.object"
    ):
        round_trip(tmp_path, trainer={"hooks": [1, object()]})
    assert os.listdir(tmp_path) == []


def test_failing_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "c.pth"
    path.write_bytes(b"old")

    def fail_half_way():
        with atomic_write(str(path)) as file:
            file.write(b"half of the n")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail_half_way()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["c.pth"]


def test_full_disk_leaves_the_old_file_and_is_told_as_such(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "c.pth"
    save_checkpoint_file({"model": MODEL}, str(path))
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"could not be written: File too large; those written before"
        ) as error:
            save_checkpoint_file({"model": {"w": torch.zeros(100_000)}}, str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.pth"]


def test_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda d: calls.append("fsync") or fsync(d))
    monkeypatch.setattr(Path, "replace", lambda a, b: calls.append("rename") or replace(a, b))
    with atomic_write(str(tmp_path / "f")) as file:
        file.write(b"x")
    assert calls[:2] == ["fsync", "rename"]


# --- weights alone ---


WHOLE = torch.arange(24.0).reshape(4, 6)
WEIGHTS = {
    "conv.weight": torch.arange(16.0)
    .reshape(1, 4, 2, 2)
    .contiguous(memory_format=torch.channels_last),
    "rows.weight": WHOLE[1:3],
    "columns.weight": WHOLE[:, :2],
    "count": torch.tensor(7),
}


@pytest.mark.parametrize("ending", ["pth", "pkl", "safetensors"])
def test_weights_and_metadata_come_back(tmp_path, ending):
    if ending == "safetensors":
        pytest.importorskip("safetensors")
    path = str(tmp_path / f"w.{ending}")
    save_weights_file(WEIGHTS, path, {"thing_classes": ["cat", "dog"]})
    got = load_checkpoint_file(path)
    assert set(got["model"]) == set(WEIGHTS)
    assert all(torch.equal(got["model"][name], value) for name, value in WEIGHTS.items())
    assert got["metadata"] == {"thing_classes": ["cat", "dog"]}
    assert [p.name for p in tmp_path.iterdir()] == [f"w.{ending}"]


@pytest.mark.parametrize("name", ["w.pt", "w", "w.pth.zip"])
def test_other_endings_are_refused(tmp_path, name):
    with pytest.raises(
        ValueError, match=rf"{name} must end with one of \.pth, \.safetensors, \.pkl"
    ):
        save_weights_file(WEIGHTS, str(tmp_path / name))


def test_missing_package_is_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="needs the package safetensors: pip install safetensors"):
        save_weights_file(WEIGHTS, str(tmp_path / "w.safetensors"))
    assert list(tmp_path.iterdir()) == []
