import io
import os
import pickle
import zipfile

import pytest
import torch

from detkit.checkpoint import CheckpointError, load_checkpoint_file
from detkit.checkpoint.declared_sizes import require_modest_memo, require_stored_zip, tensor_problem


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
        CheckpointError, match=r"bomb\.pkl is not a readable checkpoint: .* is numbered \d+"
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
