"""Numbers of draws, and going on from one of them."""

import itertools

import pytest

from detkit.data.samplers import Draw, NumberedSampler, TrainingSampler


def take(sampler, count):
    return list(itertools.islice(iter(sampler), count))


def test_draws_are_numbered_over_all_processes(as_rank):
    numbers = []
    for rank in range(2):
        as_rank(rank, 2)
        draws = take(NumberedSampler(TrainingSampler(5, seed=0)), 6)
        numbers += [draw.number for draw in draws]
    assert sorted(numbers) == list(range(12))


def test_start_goes_on_where_another_run_stopped():
    whole = take(NumberedSampler(TrainingSampler(5, seed=0)), 12)
    assert take(NumberedSampler(TrainingSampler(5, seed=0), start=7), 5) == whole[7:]
    assert whole[0] == Draw(index=whole[0].index, number=0)


@pytest.mark.parametrize("waiting", [[2, 5], [0, 6]])
def test_draws_that_wait_come_first(waiting):
    whole = take(NumberedSampler(TrainingSampler(5, seed=0)), 12)
    expected = [*(whole[k] for k in waiting), *whole[7:10]]
    assert take(NumberedSampler(TrainingSampler(5, seed=0), 7, waiting), 5) == expected


@pytest.mark.parametrize("waiting", [[7], [-1], [3, 3], [4, 2]])
def test_draws_that_cannot_wait_are_refused(waiting):
    with pytest.raises(ValueError, match=r"must be different ones in \[0, 7\), in order"):
        NumberedSampler([], 7, waiting)


def test_negative_start_is_refused():
    with pytest.raises(ValueError, match="cannot be negative, got -1"):
        NumberedSampler([], start=-1)
