import sys

import pytest
import torch

from detkit.checkpoint import load_checkpoint_file, save_weights_file

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
