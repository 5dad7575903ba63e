import pytest
from torch.utils.data import SequentialSampler

from detkit.data.samplers import GroupedBatchSampler


def test_batches_are_of_one_group_in_the_samplers_order():
    sampler = SequentialSampler(list(range(5)))
    batches = list(GroupedBatchSampler(sampler, [1, 0, 1, 0, 0], 2))
    assert batches == [[0, 2], [1, 3]]


def test_misuse_is_an_error():
    with pytest.raises(TypeError, match="must be a torch Sampler"):
        GroupedBatchSampler([0, 1], [0, 0], 1)
    with pytest.raises(TypeError, match="order of the groups"):
        len(GroupedBatchSampler(SequentialSampler([0]), [0], 1))
