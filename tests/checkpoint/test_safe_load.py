import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from detkit.checkpoint import CheckpointError, UnsafeCheckpointError, load_checkpoint_file
from detkit.checkpoint.array_unpickler import require_modest_memo
from detkit.checkpoint.safe_load import require_stored_zip, tensor_problem

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


class Calls:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def assert_weights(got):
    assert set(got["model"]) == set(WEIGHTS)
    assert all(torch.equal(got["model"][name], WEIGHTS[name]) for name in WEIGHTS)


def as_arrays(weights):
    return {name: value.numpy() for name, value in weights.items()}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("key", ["model", "state_dict", None])
def test_torch_files_load(tmp_path, zipped, key):
    path = tmp_path / "w.pth"
    content = WEIGHTS if key is None else {key: OrderedDict(WEIGHTS), "iteration": 7}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    got = load_checkpoint_file(str(path))
    assert_weights(got)
    assert got.get("iteration") == (None if key is None else 7)


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("name", ["model_final.pkl", "renamed.pth"])
def test_zoo_pickles_load_whatever_their_name(tmp_path, protocol, name):
    path = tmp_path / name
    path.write_bytes(
        pickle.dumps({"model": as_arrays(WEIGHTS), "__author__": "Detectron2"}, protocol)
    )
    got = load_checkpoint_file(str(path))
    assert_weights(got)
    assert got["__author__"] == "Detectron2"


def test_bare_dict_of_arrays_is_weights(tmp_path):
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(as_arrays(WEIGHTS)))
    assert_weights(load_checkpoint_file(str(path)))


def test_blobs_of_detectron_are_weights(tmp_path):
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps({"blobs": as_arrays(WEIGHTS), "cfg": "text"}))
    assert_weights(load_checkpoint_file(str(path)))


def test_versions_of_modules_survive(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"model": nn.BatchNorm2d(2).state_dict()}, path)
    assert load_checkpoint_file(str(path))["model"]._metadata[""] == {"version": 2}


def test_safetensors_load_where_the_package_is(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "w.safetensors"
    safetensors.save_file(WEIGHTS, path)
    assert_weights(load_checkpoint_file(str(path)))


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_truncated_safetensors_are_named(tmp_path, share):
    whole = pytest.importorskip("safetensors.torch").save({"a": torch.ones(50)})
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors is truncated or not a checkpoint"):
        load_checkpoint_file(str(path))


def test_missing_safetensors_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    with pytest.raises(
        ImportError, match=r"w\.safetensors needs the package safetensors: pip install safetensors"
    ):
        load_checkpoint_file(str(path))


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize(
    ("make", "asked_for"),
    [
        pytest.param(lambda f: Calls(os.system, f"touch {f}"), "system", id="os.system"),
        pytest.param(lambda f: Calls(eval, f"open({f!r}, 'w')"), "eval", id="eval"),
        pytest.param(lambda f: Calls(os.mkdir, f), "mkdir", id="mkdir"),
        pytest.param(lambda f: Path(f), "Path", id="harmless-class"),
        pytest.param(lambda f: nn.ReLU(), "torch.nn.modules.activation.ReLU", id="whole-module"),
    ],
)
def test_code_is_refused_named_and_not_run(tmp_path, kind, make, asked_for):
    marker, path = tmp_path / "ran", tmp_path / "hostile.pth"
    content = {"model": WEIGHTS if kind != "pickle" else as_arrays(WEIGHTS), "x": make(str(marker))}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(
        UnsafeCheckpointError, match=rf"hostile\.pth asks for .*{asked_for}"
    ) as error:
        load_checkpoint_file(str(path))
    assert "Nothing of it was run" in str(error.value)
    assert "weights_only" not in str(error.value)
    assert not marker.exists()


def torch_bytes(tmp_path):
    torch.save({"model": {"a": torch.ones(5000)}}, tmp_path / "whole")
    return (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b"<html>404</html>", "not a checkpoint: .* web page", id="web-page"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull", id="git-lfs"),
        pytest.param(b"\x89PNG\r\n\x1a\n", "not a checkpoint: it starts with", id="picture"),
        pytest.param(
            b"PK\x03\x04 and then nothing", "truncated or not a checkpoint", id="zip-header-only"
        ),
        pytest.param(
            b"\x80\x04garbage", "not a readable checkpoint|truncated or not", id="pickle-garbage"
        ),
        pytest.param(
            b"\x80\x04]\x94h\x00a.",
            "truncated or not a checkpoint: RecursionError",
            id="endless-list",
        ),
        pytest.param(pickle.dumps([1, 2]), "it holds a list, not a dict", id="list"),
        pytest.param(pickle.dumps({}), "no weights, and no 'model'", id="empty-dict"),
        pytest.param(
            pickle.dumps({"epoch": 3, "lr": 0.1}),
            "no weights, .* 'epoch', 'lr'",
            id="no-weights",
        ),
        pytest.param(pickle.dumps({"model": {}}), "holds no weights", id="empty-weights"),
        pytest.param(
            pickle.dumps({"model": {"a": "b"}}), "'a' is a str, not a tensor", id="text-weights"
        ),
        pytest.param(
            pickle.dumps({"model": {3: np.ones(1)}}), "3 is a Tensor", id="number-for-a-name"
        ),
    ],
)
def test_files_that_are_no_checkpoint_are_named(tmp_path, content, message):
    path = tmp_path / "bad.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"(?s)bad\.pth.*({message})"):
        load_checkpoint_file(str(path))


@pytest.mark.parametrize("share", [0.001, 0.3, 0.7, 0.999])
def test_truncated_files_are_named(tmp_path, share):
    whole, path = torch_bytes(tmp_path), tmp_path / "cut.pth"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"cut\.pth is (truncated|not a)"):
        load_checkpoint_file(str(path))


def test_zip_of_something_else_is_named(tmp_path):
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "hello")
    with pytest.raises(CheckpointError, match=r"photos\.zip is truncated or not a checkpoint"):
        load_checkpoint_file(str(path))


@pytest.mark.filterwarnings("ignore")  # newer versions of torch deprecate torch.jit
def test_torchscript_is_refused(tmp_path):
    path = tmp_path / "script.pth"
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(path))
    with pytest.raises(CheckpointError, match=r"script\.pth is truncated or not a checkpoint"):
        load_checkpoint_file(str(path))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*none\.pth"):
        load_checkpoint_file(str(tmp_path / "none.pth"))


def test_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="which is a folder"):
        load_checkpoint_file(str(tmp_path))


def test_address_that_cannot_be_fetched_is_named(monkeypatch):
    def fail(path):
        raise OSError("no route to host")

    monkeypatch.setattr("detkit.checkpoint.safe_load.PathManager.get_local_path", fail)
    with pytest.raises(
        OSError, match=r"could not fetch https://x\.org/w\.pkl: no route to host.*give its path"
    ):
        load_checkpoint_file("https://x.org/w.pkl")


def test_zoo_addresses_go_through_the_path_manager(monkeypatch, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(WEIGHTS, path)
    asked = []
    monkeypatch.setattr(
        "detkit.checkpoint.safe_load.PathManager.get_local_path",
        lambda p: asked.append(p) or str(path),
    )
    assert_weights(load_checkpoint_file("detectron2://a/w.pth"))
    assert asked == ["detectron2://a/w.pth"]


# --- claims about sizes ---


def compressed(path):
    torch.save({"model": {"a": torch.zeros(2**20)}}, path)
    with (
        zipfile.ZipFile(path) as whole,
        zipfile.ZipFile(path.with_name("bomb.pth"), "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in whole.infolist():
            bomb.writestr(member, whole.read(member), zipfile.ZIP_DEFLATED)
    return path.with_name("bomb.pth")


def test_zip_bomb_is_refused(tmp_path):
    path = compressed(tmp_path / "whole.pth")
    assert os.path.getsize(path) < 2**16  # of 4 MiB
    with pytest.raises(
        CheckpointError,
        match=r"bomb\.pth is .*zip of \d+ bytes whose members claim 4\d{6}: comp.* bomb",
    ):
        load_checkpoint_file(str(path))


def test_what_torch_writes_passes():
    file = io.BytesIO()
    torch.save({"model": {"a": torch.zeros(100)}}, file)
    require_stored_zip(file)
    assert file.tell() == 0


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_pickle_writes_passes(protocol):
    shared = ["text" * 100, b"bytes" * 100]
    file = io.BytesIO(
        pickle.dumps([shared, [{"a": shared, i: (i,)} for i in range(300)]], protocol)
    )
    require_modest_memo(file)
    assert file.tell() == 0


@pytest.mark.parametrize(
    "opcode", [b"r\xff\xff\xff\x7f", b"q\xff", b"p2000000000\n"], ids=["long", "short", "text"]
)
def test_pickle_of_nine_bytes_that_asks_for_gigabytes_is_refused(tmp_path, opcode):
    path = tmp_path / "bomb.pkl"
    path.write_bytes(b"\x80\x02}" + opcode + b".")
    with pytest.raises(
        CheckpointError, match=r"bomb\.pkl is not a readable checkpoint: .*uses memo index \d+"
    ):
        load_checkpoint_file(str(path))


@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(
            lambda: torch.zeros(1).expand(10**6, 10**6),
            r"\(1000000, 1000000\), 4\d+ bytes, of which 4",
            id="a",
        ),
        pytest.param(lambda: torch.zeros(10**6, 10**6, device="meta"), "is on meta", id="meta"),
        pytest.param(
            lambda: torch.sparse_coo_tensor(
                torch.zeros(2, 1).long(), torch.ones(1), (10**9, 10**9)
            ),
            "sparse",
            id="sparse",
        ),
    ],
)
def test_tensor_of_which_nothing_is_stored_is_refused(tmp_path, make, message):
    path = tmp_path / "bomb.pth"
    torch.save({"model": {"a.weight": make()}}, path)
    with pytest.raises(
        CheckpointError,
        match=rf"bomb\.pth is not a checkpoint: 'a\.weight' is a tensor of .*{message}",
    ):
        load_checkpoint_file(str(path))


def test_views_and_small_repetitions_pass():
    assert not tensor_problem(torch.zeros(4, 6)[1:, ::2])
    assert not tensor_problem(torch.zeros(1).expand(1000))
    assert not tensor_problem(torch.zeros(0, 5))
