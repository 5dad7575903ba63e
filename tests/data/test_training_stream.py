"""Training batches, and the position of a run in its data.

What comes after a resume is what would have come without the stop.
"""

import itertools
import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from detkit.data import build_batch_data_loader
from detkit.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detkit.data.training_stream import (
    AspectRatioGroupedDataset,
    BatchedDataset,
    batch_size_per_process,
)
from detkit.utils import comm

# --- groups ---


@pytest.mark.parametrize(
    ("drop_last", "expected"),
    [(True, [[0, 1], [2, 3]]), (False, [[0, 1], [2, 3], [4]])],
    ids=["drop", "keep"],
)
def test_batches_are_consecutive(drop_last, expected):
    assert list(BatchedDataset(range(5), 2, drop_last)) == expected


def test_batches_are_of_one_aspect():
    rng = np.random.default_rng(0)
    samples = [
        {"id": i, "width": int(w), "height": int(h)}
        for i, (w, h) in enumerate(rng.integers(1, 9, (60, 2)))
    ]
    batches = list(AspectRatioGroupedDataset(samples, 4))
    assert all(len({s["width"] > s["height"] for s in batch}) == 1 for batch in batches)
    assert {len(batch) for batch in batches} == {4}
    seen = [s["id"] for batch in batches for s in batch]
    assert len(seen) == len(set(seen)) >= 60 - 2 * 3
    for is_wide in (True, False):
        order = [
            s["id"] for batch in batches for s in batch if (s["width"] > s["height"]) == is_wide
        ]
        assert order == sorted(order)


def test_batch_given_out_is_not_changed_later():
    samples = [{"width": 2, "height": 1, "id": i} for i in range(4)]
    batches = list(AspectRatioGroupedDataset(samples, 2))
    assert [[s["id"] for s in batch] for batch in batches] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("make", [BatchedDataset, AspectRatioGroupedDataset])
def test_samples_taken_and_waiting_make_up_the_batches_so_far(make):
    rng = np.random.default_rng(1)
    samples = [
        {"id": i, "width": int(w), "height": int(h)}
        for i, (w, h) in enumerate(rng.integers(1, 9, (60, 2)))
    ]
    batches = make(samples, 4)
    given = []
    for batch in batches:
        given += [s["id"] for s in batch]
        assert sorted(given + batches.waiting) == list(range(batches.num_taken))
        assert batches.waiting == sorted(batches.waiting)
    assert given


# --- loaders of batches ---


class Numbers(Dataset):
    """Items that are wide and tall in turn."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {"index": index, "width": index % 2, "height": 1 - index % 2}


class Stream(IterableDataset):
    def __iter__(self):
        yield from ({"index": i, "width": 2, "height": 1} for i in range(5))


def indices(batches):
    return [[item["index"] for item in batch] for batch in batches]


def test_last_short_batch():
    for drop_last, expected in ((True, [2, 2]), (False, [2, 2, 1])):
        batches = build_batch_data_loader(Numbers(), range(5), 2, drop_last=drop_last)
        assert [len(batch) for batch in batches] == expected


def test_data_set_without_sampler_is_refused():
    with pytest.raises(ValueError, match="needs a sampler"):
        build_batch_data_loader(Numbers(), None, 2)


def test_stream_with_a_sampler_is_refused():
    with pytest.raises(ValueError, match="an IterableDataset none"):
        build_batch_data_loader(Stream(), range(5), 2)


def test_batches_come_in_the_order_of_the_sampler():
    assert indices(build_batch_data_loader(Numbers(), [3, 0, 5, 1], 2)) == [[3, 0], [5, 1]]
    assert indices(build_batch_data_loader(Stream(), None, 2, drop_last=False)) == [
        [0, 1],
        [2, 3],
        [4],
    ]


def test_grouped_batches_are_wide_or_tall():
    loader = build_batch_data_loader(Numbers(), [0, 1, 2, 3, 4, 5], 2, aspect_ratio_grouping=True)
    assert indices(itertools.islice(loader, 2)) == [[0, 2], [1, 3]]


@pytest.mark.parametrize(("batch_size", "workers", "ahead"), [(5, 2, 4), (4, 2, 3), (1, 2, 2)])
def test_workers_are_ahead_by_a_batch_and_a_little(batch_size, workers, ahead):
    loader = build_batch_data_loader(Numbers(), range(6), batch_size, num_workers=workers)
    assert loader.dataset.prefetch_factor == ahead


def test_arguments_of_torchs_loader_are_taken(monkeypatch):
    options = {"num_workers": 2, "prefetch_factor": 7, "persistent_workers": True}
    loader = build_batch_data_loader(Numbers(), range(6), 2, pin_memory=True, **options)
    assert loader.dataset.prefetch_factor == 7
    assert loader.dataset.pin_memory == torch.cuda.is_available()
    assert indices(loader) == [[0, 1], [2, 3], [4, 5]]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loader = build_batch_data_loader(Numbers(), range(6), 2, pin_memory=True, **options)
    assert loader.dataset.pin_memory
    with pytest.raises(ValueError, match="prefetch_factor must be at least 1, got 0"):
        build_batch_data_loader(Numbers(), range(6), 2, num_workers=2, prefetch_factor=0)
    # Without workers nothing is made ahead.
    loader = build_batch_data_loader(Numbers(), range(6), 2, prefetch_factor=7)
    assert loader.dataset.prefetch_factor is None


class Noise(IterableDataset):
    def __iter__(self):
        yield from (random.random() for _ in range(2))


def test_workers_of_all_processes_draw_their_own_numbers(monkeypatch):
    drawn = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        for batch in build_batch_data_loader(Noise(), None, 1, num_workers=2, seed=3):
            drawn += batch
    assert len(set(drawn)) == len(drawn) == 8


def test_batch_is_collated_at_the_end():
    loader = build_batch_data_loader(Numbers(), range(4), 2, collate_fn=len)
    assert list(loader) == [2, 2]


@pytest.mark.parametrize(("total", "processes"), [(0, 1), (2, 4), (6, 4), (-4, 2)])
def test_batch_that_the_processes_cannot_share_is_refused(monkeypatch, total, processes):
    monkeypatch.setattr(comm, "get_world_size", lambda: processes)
    with pytest.raises(ValueError, match=f"got {total} images for {processes} processes"):
        batch_size_per_process(total)


def test_processes_share_a_batch(monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 4)
    assert [batch_size_per_process(total) for total in (4, 8)] == [1, 2]


# --- positions ---


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


def test_position_of_other_processes_is_refused_and_can_be_shared_out():
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


def test_share_of_an_uneven_position_repeats_rather_than_omits(monkeypatch):
    state = {"waiting": [], "world_size": 3, "seed": 7, "sampler": {}, "skipped": {}}
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    stream = make(batch_size=4)
    stream.move_to_share([{**state, "taken": taken} for taken in (7, 6, 6)])
    assert stream.state_dict()["taken"] == 9  # of 19 draws that were taken


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
