"""The position of a run in its data: what comes after a resume is what would have come without the stop."""

import itertools
import random

import pytest
from torch.utils.data import Dataset

from detkit.data import build_batch_data_loader
from detkit.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detkit.utils import comm


class Pictures(Dataset):
    """Ten pictures, wide and tall ones mixed, each with a random number of its draw."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {
            "index": index,
            "width": 1 + index % 3,
            "height": 2,
            "augmentation": random.random(),
        }


def make(*, workers=0, grouping=True, batch_size=3, collate_fn=None, sampler=None, seed=7):
    return build_batch_data_loader(
        Pictures(),
        sampler or TrainingSampler(10, seed=seed),
        batch_size,
        aspect_ratio_grouping=grouping,
        num_workers=workers,
        collate_fn=collate_fn,
        seed=seed,
    )


def take(loader, count):
    return list(itertools.islice(iter(loader), count))


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("stop", [0, 1, 2, 5, 9])
def test_position_taken_over_gives_the_batches_that_were_to_come(grouping, stop):
    whole = take(make(grouping=grouping), 14)
    stopped = make(grouping=grouping)
    take(stopped, stop)
    resumed = make(grouping=grouping)
    resumed.load_state_dict(stopped.state_dict())
    assert take(resumed, 14 - stop) == whole[stop:]


def test_run_may_stop_again_and_again():
    whole, seen, state = take(make(), 12), [], None
    for _ in range(6):
        stream = make()
        if state is not None:
            stream.load_state_dict(state)
            assert stream.state_dict() == state
        seen += take(stream, 2)
        state = stream.state_dict()
    assert seen == whole


@pytest.mark.parametrize(("before", "after"), [(2, 0), (0, 2), (2, 1)])
def test_position_does_not_know_of_workers(before, after):
    whole = take(make(), 8)
    stopped = make(workers=before)
    take(stopped, 4)
    assert stopped.state_dict()["waiting"]
    resumed = make(workers=after)
    resumed.load_state_dict(stopped.state_dict())
    assert take(resumed, 4) == whole[4:]


@pytest.mark.parametrize(
    "sampler_of",
    [
        pytest.param(lambda seed: TrainingSampler(10, seed=seed), id="all"),
        pytest.param(
            lambda seed: RandomSubsetTrainingSampler(
                10, 0.5, seed_shuffle=seed, seed_subset=seed + 1
            ),
            id="subset",
        ),
        pytest.param(
            lambda seed: RepeatFactorTrainingSampler([1.5] * 10, seed=seed), id="repeated"
        ),
    ],
)
def test_drawn_seeds_are_taken_over(sampler_of):
    whole = take(make(sampler=sampler_of(7), seed=7), 9)
    stopped = make(sampler=sampler_of(7), seed=7)
    take(stopped, 4)
    resumed = make(sampler=sampler_of(99), seed=99)
    resumed.load_state_dict(stopped.state_dict())
    assert take(resumed, 5) == whole[4:]


def test_position_counts_before_collation():
    stream = make(collate_fn=len)
    assert take(stream, 3) == [3, 3, 3]
    assert stream.state_dict()["taken"] >= 9


def test_position_of_other_processes_is_refused_and_can_be_shared_out(monkeypatch):
    state = {
        "taken": 20,
        "waiting": [18],
        "world_size": 2,
        "seed": 7,
        "sampler": {"seed": 7},
        "skipped": {},
    }
    with pytest.raises(ValueError, match="position is one of 2 processes, this run has 1"):
        make().load_state_dict(state)
    stream = make()
    stream.move_to_share([state, {**state, "taken": 21, "waiting": []}])
    assert stream.state_dict() == {**state, "taken": 40, "waiting": [], "world_size": 1}


def test_two_processes_go_on_each_in_its_own_part(monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        whole = take(make(batch_size=4), 8)
        stopped = make(batch_size=4)
        take(stopped, 5)
        resumed = make(batch_size=4)
        resumed.load_state_dict(stopped.state_dict())
        assert take(resumed, 3) == whole[5:]
