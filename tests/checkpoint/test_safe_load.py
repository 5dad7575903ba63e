import io
import os
import pickle
import re
import resource
import struct
import time
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from detkit.checkpoint import CheckpointError, UnsafeCheckpointError, load_checkpoint_file
from detkit.checkpoint.array_unpickler import load_array_pickle, require_modest_pickle
from detkit.checkpoint.safe_load import require_modest_torch, tensor_problem

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
            "not a readable checkpoint: .*nested more than 64 deep",
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
    with pytest.raises(FileNotFoundError, match="which is a folder$"):
        load_checkpoint_file(str(tmp_path))
    for name in ("model_final.pth", "model_best.pth"):
        (tmp_path / name).touch()
    message = r"which is a folder: name a file, of model_best\.pth, model_final\.pth$"
    with pytest.raises(FileNotFoundError, match=message):
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
    require_modest_torch(file)
    assert file.tell() == 0


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_pickle_writes_passes(protocol):
    shared = ["text" * 100, b"bytes" * 100]
    file = io.BytesIO(
        pickle.dumps([shared, [{"a": shared, i: (i,)} for i in range(300)]], protocol)
    )
    require_modest_pickle(file)
    assert file.tell() == len(file.getvalue())


@pytest.mark.parametrize(
    "opcode", [b"r\xff\xff\xff\x7f", b"q\xff", b"p2000000000\n"], ids=["long", "short", "text"]
)
def test_pickle_of_nine_bytes_takes_no_gigabytes(opcode):
    # Python's unpickler in C has an array for all numbers below that of an object.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert load_array_pickle(io.BytesIO(b"\x80\x02}" + opcode + b".")) == {}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


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


# --- objects that take more than their file suggests ---


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def nested_lists(levels):
    return b"]q\0" + b"0](h\0h\0eq\0" * levels


def filled_after_use(levels):
    """Lists of which each holds the next one twice, filled from the outermost to the innermost."""
    made = b"".join(b"]q" + bytes([i]) + b"0" for i in range(levels + 1))
    filled = b"".join(b"h%ch%cah%ca0" % (i, i + 1, i + 1) for i in range(levels))
    return made + filled + b"h\0"


def int_keys(count):
    modulus = (1 << 61) - 1  # of Python's hash of integers
    return b"".join(b"\x8a\x0c" + (k * modulus).to_bytes(12, "little") + b"N" for k in range(count))


def pairs_of_equal_hash(count):
    """Return tuples (a, b) of equal hash: b is chosen by the inverse of Python's xxHash."""
    mask, prime = (1 << 64) - 1, 14029467366897019727
    rotated = lambda x, n: (x << n | x >> (64 - n)) & mask  # noqa: E731
    inverse = pow(11400714785074694791, -1, 1 << 64)
    out, wanted = [], 12345
    a = 0
    while len(out) < count:
        a += 1
        state = rotated((2870177450012600261 + a * prime) & mask, 31) * 11400714785074694791 & mask
        lane = rotated(wanted * inverse & mask, 33)
        b = (lane - state) * pow(prime, -1, 1 << 64) & mask
        if b < (1 << 61) - 1:
            out.append((a, b))
    assert len({hash(pair) for pair in out}) == 1
    return out


def pair_keys(count):
    return b"".join(pickle.dumps(pair, 2)[2:-1] + b"N" for pair in pairs_of_equal_hash(count))


def dtype_of(code):
    return b"cnumpy\ndtype\n(" + text(code) + b"\x89\x88tR"


def scalar_pair_keys(count):
    """The same tuples of NumPy scalars, whose values only show when they are built."""
    scalar = b"cnumpy.core.multiarray\nscalar\n(" + dtype_of("i8") + b"C\x08%btR"
    pairs = [
        scalar % struct.pack("<q", a) + scalar % struct.pack("<q", b)
        for a, b in pairs_of_equal_hash(count)
    ]
    return b"".join(pair + b"\x86N" for pair in pairs)


def array_of_shape(shape):
    dtype = dtype_of("f4")
    made = b"cnumpy.core.numeric\n_frombuffer\n(C\x04abcd" + dtype + shape + text("C") + b"tR"
    return b"}" + text("w") + made + b"s"


def of_class(subtype):
    return b"cnumpy.core.multiarray\n_reconstruct\n(" + subtype + b"K\0tR"


HOSTILE = [
    pytest.param(b"}N" + b"\x85" * 300_000 + b"Ns", "nested more than 64 deep", id="deep-key"),
    pytest.param(b"N" + b"\x85" * 300_000, "nested more than 64 deep", id="deep-tuple"),
    pytest.param(b"]" * 10**5 + b"a" * (10**5 - 1), "more than 64 deep", id="deep-list"),
    pytest.param(b"}N" + b"q\0h\0\x86" * 60 + b"Ns", "millions of times", id="doubled-key"),
    pytest.param(b"}" + text("w") + nested_lists(60) + b"s", "millions of times", id="doubled-list"),
    pytest.param(of_class(nested_lists(60)), "millions of times", id="doubled-list-in-message"),
    pytest.param(filled_after_use(40), "millions of times", id="doubled-from-outside"),
    pytest.param(b"}" + text("x" * 10**6) + b"q\0" + b"0(" + b"h\0" * 10**4 + b"lNs",
                 "millions of times", id="long-text-shared"),
    pytest.param(b"}(" + int_keys(20_000) + b"u", "equal hash", id="integers-of-equal-hash"),
    pytest.param(b"c__builtin__\nset\n((" + int_keys(9_000) + b"ltR", "equal hash", id="in-a-set"),
    pytest.param(b"}(" + pair_keys(2_000) + b"u", "equal hash", id="tuples-of-equal-hash"),
    pytest.param(array_of_shape(b"(" + b"\x8b" + struct.pack("<I", 10**6) + b"\x7f" * 10**6
                                + b"q\0" + b"h\0" * 1999 + b"t"), "more than 256 bits", id="shape-of-huge-sizes"),
    pytest.param(array_of_shape(b"(" + (b"\x8a\x08" + b"\x7f" * 8) * 10**5 + b"t"),
                 "a tuple of sizes", id="shape-of-many-sizes"),
    pytest.param(b"t", "pop", id="empty-stack"),
    pytest.param(b"}(" + scalar_pair_keys(300) + b"u", "equal hash", id="numpy-scalars-of-equal-hash"),
    pytest.param(b"}(" + b"N" * 100 + b"tNs", "tuple as a key", id="long-key"),
]  # fmt: skip


def pickle_in_zip(path, data):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
@pytest.mark.parametrize(("body", "message"), HOSTILE)
def test_small_files_that_would_take_for_ever_are_refused(tmp_path, kind, body, message):
    path, data = tmp_path / "hostile.pth", b"\x80\x02" + body + b"."
    if kind == "zip":
        pickle_in_zip(path, data)
    else:
        torch.save({"model": WEIGHTS}, path, _use_new_zipfile_serialization=False)
        whole = path.read_bytes()
        content = whole.index(b"}q\0X\5\0\0\0modelq\1") - 2
        path.write_bytes(data if kind == "pickle" else whole[:content] + data)
    start = time.process_time()
    with pytest.raises(CheckpointError) as error:
        load_checkpoint_file(str(path))
    assert time.process_time() - start < 5
    assert len(str(error.value)) < 1000
    if kind == "pickle" or "sizes" not in message:
        assert re.search(message, str(error.value))


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(b"cbuiltins\nbytearray\n\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85R", id="bytearray"),
        pytest.param(b"c_codecs\nencode\n" + text("x" * 9) + text("punycode") + b"\x86R", id="slow-encoding"),
        pytest.param(b"ctorch\nFloatTensor\n\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85R", id="tensor-of-a-size"),
        pytest.param(b"ctorch._tensor\n_rebuild_from_type_v2\n(cbuiltins\nbytearray\nctorch\nTensor\n\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85NtR", id="through-another-function"),
    ],
)  # fmt: skip
def test_calls_that_torch_allows_and_that_take_memory_or_time_are_refused(tmp_path, call):
    path = tmp_path / "w.pth"
    pickle_in_zip(path, b"\x80\x02}" + text("w") + call + b"s.")
    with pytest.raises(
        UnsafeCheckpointError, match=r"asks for (a call of|bytes of|_codecs.encode)"
    ):
        load_checkpoint_file(str(path))


def test_unusual_but_sound_objects_of_torch_are_read(tmp_path):
    path = tmp_path / "w.pth"
    rest = {
        "scheduler": Counter({30: 1}), "set": {"a", 3}, "size": torch.Size([2]), "dtypes": {torch.float16: 1},
        "bytes": b"\xff", "bytearray": bytearray(b"\xff"), "complex": 1j, "device": torch.device("cpu"),
        "pairs": {("a", i): i for i in range(100)}, "random": (3, tuple(range(625)), None),
        "parameter": nn.Parameter(torch.ones(2)), "bfloat16": torch.ones(2, dtype=torch.bfloat16),
    }  # fmt: skip
    for zipped in (True, False):
        torch.save({"model": WEIGHTS, **rest}, path, _use_new_zipfile_serialization=zipped)
        got = load_checkpoint_file(str(path))
        assert all(type(got[name]) is type(rest[name]) for name in rest)


def test_storages_larger_than_the_file_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"model": {"w": torch.zeros(10)}}, path, _use_new_zipfile_serialization=False)
    claim = b"\x8a\x05" + (10**9).to_bytes(5, "little") + b"N"
    path.write_bytes(path.read_bytes().replace(b"K\x0aN", claim))
    with pytest.raises(CheckpointError, match=r"1000000000 numbers in \d+ bytes"):
        load_checkpoint_file(str(path))


def test_shared_weights_and_optimizer_states_are_read(tmp_path):
    weight = torch.ones(500)
    model = nn.ParameterDict({f"p{i}": nn.Parameter(torch.ones(2)) for i in range(100)})
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    content = {"model": {f"w{i}": weight for i in range(50)}, "optimizer": optimizer.state_dict()}
    for zipped in (True, False):
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        got = load_checkpoint_file(str(tmp_path / "w.pth"))
        assert got["model"]["w49"].sum() == 500
        assert got["optimizer"]["state"][99]["exp_avg"].shape == (2,)


def test_zip_whose_second_directory_only_torch_sees_is_refused(tmp_path):
    path = compressed(tmp_path / "whole.pth")
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start, members = archive.start_dir, archive.infolist()
    end = data.rindex(b"PK\5\6")
    # Python finds the directory right before the end record: one of empty, stored members.
    harmless = b"".join(
        struct.pack(
            "<IHHHHHHIIIHHHHHII", 0x02014B50, 20, 20, 0, 0, 0, 0, 0, 0, 0,
            len(m.filename), 0, 0, 0, 0, 0, m.header_offset,
        ) + m.filename.encode()
        for m in members
    )  # fmt: skip
    record = struct.pack(
        "<IHHHHIIH", 0x06054B50, 0, 0, len(members), len(members), len(harmless), start, 0
    )
    padding = b"\0" * (end - start - len(harmless))
    path.write_bytes(data[:end] + padding + harmless + record)
    with pytest.raises(CheckpointError, match=r"bomb\.pth is .*two directories"):
        load_checkpoint_file(str(path))


CLASSES = {"thing_classes": ["a", "b"]}


@pytest.mark.parametrize(
    ("metadata", "kept"),
    [
        pytest.param(["a"], {}, id="list"),
        pytest.param("a", {}, id="text"),
        pytest.param({**CLASSES, 5: 1}, CLASSES, id="number as key"),
        pytest.param({"thing_classes": [1, 2]}, {}, id="numbers as names"),
        pytest.param({"thing_classes": "ab"}, {}, id="text as names"),
        pytest.param({"thing_classes": {"a": 1}}, {}, id="table as names"),
        pytest.param({"thing_classes": torch.zeros(2)}, {}, id="tensor as names"),
        pytest.param({**CLASSES, "thing_colors": [[1e9, -5, float("nan")]]}, CLASSES, id="colour"),
        pytest.param({**CLASSES, "thing_colors": "xy"}, CLASSES, id="text as colours"),
        pytest.param({**CLASSES, "keypoint_names": 5}, CLASSES, id="number as keypoints"),
        pytest.param(
            {**CLASSES, "keypoint_connection_rules": [["a", "b", 5]]}, CLASSES, id="rules"
        ),
    ],
)
def test_metadata_of_other_kinds_are_left_out_with_a_warning(tmp_path, metadata, kept, caplog):
    torch.save({"model": WEIGHTS, "metadata": metadata}, tmp_path / "w.pth")
    assert load_checkpoint_file(str(tmp_path / "w.pth"))["metadata"] == kept
    assert "w.pth" in caplog.text
    assert "left out" in caplog.text


def test_metadata_are_taken_whole(tmp_path):
    metadata = {
        "dataset": "x",
        **CLASSES,
        "thing_colors": [(255, 0, 9), [0, 0, 0]],
        "ignore_label": 255,
        "keypoint_names": ["n", "m"],
        "keypoint_flip_map": [],
        "keypoint_connection_rules": [("n", "m", (1, 2, 3))],
    }
    torch.save({"model": WEIGHTS, "metadata": metadata}, tmp_path / "w.pth")
    assert load_checkpoint_file(str(tmp_path / "w.pth"))["metadata"] == metadata


def test_long_names_do_not_fill_messages(tmp_path):
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps({"a" * 10**6: 1}))
    with pytest.raises(CheckpointError) as error:
        load_checkpoint_file(str(path))
    assert len(str(error.value)) < 300
