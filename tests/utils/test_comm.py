"""Single-process behaviour, and the real thing with two processes."""

import numpy as np
import pytest
import torch

from detkit.utils import comm
from detkit.utils.comm import create_local_process_group, get_local_process_group
from tests.processes import together


def test_one_process_talks_to_itself():
    assert (comm.get_world_size(), comm.get_rank(), comm.get_local_rank()) == (1, 0, 0)
    assert comm.is_main_process()
    assert comm.all_gather("x") == ["x"]
    assert comm.gather({"a": 1}) == [{"a": 1}]
    assert comm.reduce_dict({"a": torch.tensor(2.0)}) == {"a": torch.tensor(2.0)}
    assert comm.sum_to_main(torch.tensor([1, 2])).tolist() == [1, 2]
    assert comm.concatenate_in_main({"a": np.arange(3)})["a"].tolist() == [0, 1, 2]
    assert comm.all_reduce_max_int(3) == 3
    assert comm.all_reduce_max(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert 0 <= comm.shared_random_seed() < 2**31
    comm.synchronize()


def test_local_rank_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"local rank must lie in \[0, 2\), got 2"):
        comm.set_local(2, 2)


def _each_function():
    rank = comm.get_rank()
    torch.manual_seed(rank)
    values = {"a": torch.tensor(float(rank)), "b": torch.tensor(10.0 * rank)}
    values = dict(reversed(values.items())) if rank else values
    arrays = (
        {"rows": np.full((2 * rank, 3), rank), "main": np.eye(2) > 0}
        if rank == 0
        else {"rows": np.ones((2, 3), int)}
    )
    results = {
        "all": comm.all_gather(rank),
        "gathered": comm.gather(rank, dst=1),
        "total": comm.sum_to_main(torch.tensor([1, rank])).tolist(),
        "all_reduce_max_int": comm.all_reduce_max_int(rank),
        "all_reduce_max": comm.all_reduce_max(torch.tensor([1.0, rank])).tolist(),
        "seed": comm.shared_random_seed(),
        "mean": {k: v.item() for k, v in comm.reduce_dict(values).items()},
        "sum": {k: v.item() for k, v in comm.reduce_dict(values, average=False).items()},
        "arrays": comm.concatenate_in_main(arrays),
    }
    with pytest.raises(
        ValueError,
        match=r"arrays 'x' differ between processes: by rank \{0: \('<f4', \(1,\)\), 1: ",
    ):
        comm.concatenate_in_main({"x": np.zeros(1, "f4" if rank == 0 else "f8")})
    return results


def test_two_processes(tmp_path):
    first, second = together(_each_function, folder=tmp_path)
    assert first["all"] == second["all"] == [0, 1]
    assert (first["gathered"], second["gathered"]) == ([], [0, 1])
    assert (first["total"], second["total"]) == ([2, 1], [1, 1])
    assert first["all_reduce_max_int"] == second["all_reduce_max_int"] == 1
    assert first["all_reduce_max"] == second["all_reduce_max"] == [1.0, 1.0]
    assert first["seed"] == second["seed"]
    assert first["mean"] == {"a": 0.5, "b": 5.0}
    assert first["sum"] == {"a": 1.0, "b": 10.0}
    assert second["arrays"] is None
    np.testing.assert_array_equal(first["arrays"]["rows"], np.ones((2, 3), int), strict=True)
    np.testing.assert_array_equal(first["arrays"]["main"], np.eye(2) > 0, strict=True)


def test_single_process_has_no_local_group():
    create_local_process_group(1)
    assert get_local_process_group() is None
    with pytest.raises(ValueError, match="no multiple of 2"):
        create_local_process_group(2)
