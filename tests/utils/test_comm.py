"""Single-process behaviour, and the real thing with two processes."""

import pytest
import torch
import torch.multiprocessing as mp

from detkit.utils import comm


def test_one_process_talks_to_itself():
    assert (comm.get_world_size(), comm.get_rank(), comm.get_local_rank()) == (1, 0, 0)
    assert comm.is_main_process()
    assert comm.all_gather("x") == ["x"]
    assert comm.gather({"a": 1}) == [{"a": 1}]
    assert comm.reduce_dict({"a": torch.tensor(2.0)}) == {"a": torch.tensor(2.0)}
    assert comm.sum_to_main(torch.tensor([1, 2])).tolist() == [1, 2]
    assert 0 <= comm.shared_random_seed() < 2**31
    comm.synchronize()


def test_local_rank_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"local rank must lie in \[0, 2\), got 2"):
        comm.set_local(2, 2)


def _two_processes(rank, init_file, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    values = {"a": torch.tensor(float(rank)), "b": torch.tensor(10.0 * rank)}
    values = dict(reversed(values.items())) if rank else values
    results[rank] = {
        "all": comm.all_gather(rank),
        "gathered": comm.gather(rank, dst=1),
        "total": comm.sum_to_main(torch.tensor([1, rank])).tolist(),
        "seed": comm.shared_random_seed(),
        "mean": {k: v.item() for k, v in comm.reduce_dict(values).items()},
        "sum": {k: v.item() for k, v in comm.reduce_dict(values, average=False).items()},
    }
    comm.synchronize()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_two_processes, (str(tmp_path / "init"), results), nprocs=2)
        first, second = results[0], results[1]
    assert first["all"] == second["all"] == [0, 1]
    assert (first["gathered"], second["gathered"]) == ([], [0, 1])
    assert (first["total"], second["total"]) == ([2, 1], [1, 1])
    assert first["seed"] == second["seed"]
    assert first["mean"] == {"a": 0.5, "b": 5.0}
    assert first["sum"] == {"a": 1.0, "b": 10.0}
