import itertools

import pytest
from torch.utils.data import Dataset, IterableDataset

from detkit.data import build_batch_data_loader
from detkit.data.batch_loader import batch_size_per_process
from detkit.utils import comm


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
