"""Samplers: what they visit, how often, in which order, and how processes share the work."""

import itertools
from collections import Counter

import pytest
import torch

from detkit.data.samplers import (
    InferenceSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)


def take(sampler, count):
    return list(itertools.islice(iter(sampler), count))


def records(classes_per_image):
    return [{"annotations": [{"category_id": c} for c in classes]} for classes in classes_per_image]


# --- training ---


def test_each_epoch_visits_every_image_once_in_a_new_order():
    drawn = take(TrainingSampler(10, seed=0), 30)
    epochs = [drawn[:10], drawn[10:20], drawn[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_is_that_of_the_seed():
    assert take(TrainingSampler(10, seed=1), 30) == take(TrainingSampler(10, seed=1), 30)
    assert take(TrainingSampler(10, seed=1), 30) != take(TrainingSampler(10, seed=2), 30)


def test_order_does_not_touch_the_global_generator():
    state = torch.get_rng_state()
    take(TrainingSampler(10, seed=1), 30)
    assert torch.equal(torch.get_rng_state(), state)


def test_first_epoch_is_torchs_permutation_as_in_detectron2():
    expected = torch.randperm(10, generator=torch.Generator().manual_seed(5)).tolist()
    assert take(TrainingSampler(10, seed=5), 10) == expected


def test_without_shuffle_images_come_in_order():
    assert take(TrainingSampler(3, shuffle=False, seed=0), 7) == [0, 1, 2, 0, 1, 2, 0]


def test_processes_share_one_stream(as_rank):
    whole = take(TrainingSampler(7, seed=3), 30)
    parts = []
    for rank in range(3):
        as_rank(rank, 3)
        parts.append(take(TrainingSampler(7, seed=3), 10))
    assert [index for together in zip(*parts, strict=True) for index in together] == whole


def test_subset_is_drawn_once():
    sampler = RandomSubsetTrainingSampler(100, 0.2, seed_shuffle=0, seed_subset=1)
    drawn = take(sampler, 60)
    assert len(set(drawn)) == 20
    assert set(Counter(drawn).values()) == {3}
    assert drawn[:20] != drawn[20:40]
    other = take(RandomSubsetTrainingSampler(100, 0.2, seed_shuffle=5, seed_subset=1), 20)
    assert set(other) == set(drawn)


def test_subset_of_few_images_keeps_one():
    assert (
        len(set(take(RandomSubsetTrainingSampler(3, 0.01, seed_shuffle=0, seed_subset=0), 5))) == 1
    )


@pytest.mark.parametrize(("ratio", "count"), [(0.19, 1), (0.2, 2), (0.29, 2), (1.0, 10)])
def test_size_of_a_subset_is_rounded_down(ratio, count):
    sampler = RandomSubsetTrainingSampler(10, ratio, seed_shuffle=0, seed_subset=0)
    assert sampler.num_images == len(set(take(sampler, 30))) == count


@pytest.mark.parametrize("ratio", [0.0, 1.5, -1.0])
def test_subset_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match=r"DATALOADER.RANDOM_SUBSET_RATIO\) must lie in \(0, 1\]"):
        RandomSubsetTrainingSampler(10, ratio)


def test_training_on_nothing_is_refused():
    for make in (
        lambda: TrainingSampler(0, seed=0),
        lambda: RepeatFactorTrainingSampler([], seed=0),
    ):
        with pytest.raises(ValueError, match="at least one image"):
            make()


# --- repeat factors ---


def test_repeat_factors_by_hand():
    # Class 0 in 4 of 4 images, class 1 in 1 of 4; the threshold is 0.5.
    dicts = records([[0], [0, 0], [0], [0, 1]])
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(dicts, 0.5)
    assert torch.allclose(factors, torch.tensor([1.0, 1.0, 1.0, (0.5 / 0.25) ** 0.5]))
    linear = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        dicts, 0.5, sqrt=False
    )
    assert linear.tolist() == [1, 1, 1, 2]


def test_class_counts_once_for_an_image_however_many_objects_it_has():
    dicts = records([[0, 0, 0], [], [], []])
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        dicts, 1.0, sqrt=False
    )
    assert factors.tolist() == [4, 1, 1, 1]


def test_whole_factor_is_never_rounded_up(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda size, generator: torch.zeros(size))
    sampler = RepeatFactorTrainingSampler([1.0, 2.0, 1.5], shuffle=False, seed=0)
    assert take(sampler, 5) == [0, 1, 1, 2, 2]


def test_image_without_objects_is_not_repeated():
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        [*records([[], [0]]), {}], 1.0
    )
    assert factors[0] == factors[2] == 1.0
    assert factors[1] > 1


def test_images_appear_as_often_as_their_factor_says():
    factors = torch.tensor([1.0, 1.5, 2.0, 3.25])
    sampler = RepeatFactorTrainingSampler(factors, seed=0)
    drawn = Counter(take(sampler, 20000))
    frequency = torch.tensor([drawn[i] for i in range(4)]) / 20000
    assert torch.allclose(frequency, factors / factors.sum(), atol=0.01)


def test_repeat_factor_below_one_is_refused():
    with pytest.raises(ValueError, match="repeat factor of at least 1"):
        RepeatFactorTrainingSampler([1.0, 0.5], seed=0)


# --- inference ---


@pytest.mark.parametrize("size", [0, 1, 5, 8, 11])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_parts_are_contiguous_even_and_complete(as_rank, size, world_size):
    parts = []
    for rank in range(world_size):
        as_rank(rank, world_size)
        sampler = InferenceSampler(size)
        parts.append(list(sampler))
        assert len(sampler) == len(parts[-1])
    assert list(itertools.chain.from_iterable(parts)) == list(range(size))
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1


def test_subclasses_for_detectron2_find_its_names(as_rank):
    as_rank(1, 2)
    inference = InferenceSampler(5)
    subset = RandomSubsetTrainingSampler(10, 0.35, seed_shuffle=0, seed_subset=0)
    assert (inference._size, inference._rank, inference._world_size) == (5, 1, 2)
    assert list(inference._local_indices) == [3, 4]
    assert subset._size_subset == len(subset._indexes_subset) == 3
    repeating = RepeatFactorTrainingSampler([1.0, 2.25], seed=0)
    assert repeating._int_part.tolist() == [1.0, 2.0]
    assert repeating._frac_part.tolist() == [0.0, 0.25]
