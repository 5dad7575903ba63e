"""Data sets around data sets: memory, errors that name the file, seeds."""

import pickle
import random
import tracemalloc
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from detkit.data.samplers import Draw
from detkit.data.wrappers import (
    DatasetFromList,
    MapDataset,
    MapIterableDataset,
    SampleError,
    SeededDataset,
    ToIterableDataset,
    set_default_dataset_from_list_serialize_method,
)
from detkit.utils.image import BadImageError

RECORDS = [
    {"file_name": f"{i}.jpg", "image_id": i, "annotations": [{"bbox": [i, 0, 1, 1]}]}
    for i in range(5)
]


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(5)


# --- lists ---


@pytest.mark.parametrize("serialize", [True, False])
def test_items_come_out_as_they_went_in(serialize):
    dataset = DatasetFromList(RECORDS, serialize=serialize)
    assert len(dataset) == 5
    assert [dataset[i] for i in range(5)] == RECORDS
    assert [dataset[i] for i in range(-5, 0)] == RECORDS


@pytest.mark.parametrize("serialize", [True, False])
def test_changing_an_item_does_not_change_the_list(serialize):
    dataset = DatasetFromList(RECORDS, serialize=serialize)
    dataset[2]["annotations"].clear()
    assert len(dataset[2]["annotations"]) == 1
    assert len(RECORDS[2]["annotations"]) == 1


def test_index_beyond_the_list_is_refused():
    for index in (5, -6):
        with pytest.raises(IndexError):
            DatasetFromList(RECORDS)[index]


def test_empty_list():
    assert len(DatasetFromList([])) == 0


def test_serialised_list_is_one_tensor_however_many_items():
    dataset = DatasetFromList(RECORDS * 100)
    tensors = [value for value in vars(dataset._items).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == len(vars(dataset._items)) == 2
    assert sum(t.numel() for t in tensors) >= sum(len(pickle.dumps(r, -1)) for r in RECORDS) * 100


# --- mapping ---


def test_serialised_list_is_built_in_the_memory_that_it_keeps():
    items = [bytes(1000)] * 3000
    tracemalloc.start()
    try:
        dataset = DatasetFromList(items)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(dataset) == 3000
    # The buffer grows by an eighth at a time.
    assert 3e6 < kept < 3.6e6
    assert peak < 1.2 * kept


def test_map_applies_the_function():
    assert [MapDataset([1, 2, 3], lambda x: 2 * x)[i] for i in range(3)] == [2, 4, 6]
    assert list(MapIterableDataset(Stream(), lambda x: 2 * x)) == [0, 2, 4, 6, 8]


def test_failure_names_the_file():
    def broken_mapper(record):
        raise KeyError("bbox")

    with pytest.raises(
        SampleError, match=r"broken_mapper failed on 3\.jpg \(image_id 3\): KeyError: 'bbox'"
    ):
        MapDataset(RECORDS, broken_mapper)[3]


def test_failure_of_a_mapper_object_names_its_class():
    class Mapper:
        def __call__(self, record):
            raise ValueError("no")

    with pytest.raises(SampleError, match=r"Mapper failed on an item of type int: ValueError: no"):
        MapDataset([1], Mapper())[0]


def test_error_that_names_the_file_already_passes():
    def read(record):
        raise BadImageError(f"image file {record['file_name']} is empty (0 bytes)")

    with pytest.raises(BadImageError, match=r"^image file 0\.jpg is empty"):
        MapDataset(RECORDS, read)[0]


def test_next_image_takes_the_place_of_one_without_a_sample(caplog):
    mapped = MapDataset([1, 2, 3, 4], lambda x: None if x in (1, 4) else 10 * x)
    assert [mapped[i] for i in range(4)] == [20, 20, 30, 20]
    assert list(MapDataset(Stream(), lambda x: x or None)) == [x for x in Stream() if x]
    assert caplog.text.count("returned None for an item of type int, which is left out") == 1


def test_mapper_that_leaves_everything_out_is_an_error():
    with pytest.raises(SampleError, match=r"returned None for 5 items in a row, from item 1 on"):
        MapDataset(RECORDS, lambda r: None)[1]


def test_images_that_are_evaluated_cannot_be_left_out():
    with pytest.raises(SampleError, match=r"returned None for 1\.jpg .*cannot be left out"):
        MapDataset(RECORDS, lambda r: None, takes_none=False)[1]


@pytest.mark.parametrize("kind", [list, Stream])
def test_local_function_goes_to_another_process(kind):
    data, factor = (Stream() if kind is Stream else [0, 1, 2]), 2
    mapped = MapDataset(data, lambda x: [factor * x])
    again = pickle.loads(pickle.dumps(mapped))
    assert list(again) == list(mapped) if kind is Stream else again[2] == [4]


def test_workers_take_chunks_of_indices():
    def seen_by(worker_id):
        data = ToIterableDataset(list(range(10)), range(10), shard_chunk_size=2)
        info = SimpleNamespace(id=worker_id, num_workers=2)
        with mock.patch("detkit.data.wrappers.get_worker_info", return_value=info):
            return list(data)

    assert [seen_by(0), seen_by(1)] == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7]]


def fail_on_the_last(record):
    if record["image_id"] == 4:
        raise RuntimeError("cannot augment")
    return record["image_id"]


def test_failure_in_a_worker_process_names_the_file():
    loader = DataLoader(
        MapDataset(DatasetFromList(RECORDS), fail_on_the_last), num_workers=1, batch_size=None
    )
    with pytest.raises(
        SampleError, match=r"fail_on_the_last failed on 4\.jpg \(image_id 4\): RuntimeError: cannot"
    ):
        list(loader)


def test_items_may_be_held_in_another_form():
    assert DatasetFromList([1, 2], serialize=lambda items: [10 * x for x in items])[1] == 20
    with set_default_dataset_from_list_serialize_method(tuple):
        assert DatasetFromList([RECORDS])[0] is RECORDS
    assert DatasetFromList([RECORDS])[0] is not RECORDS


def test_mapped_stream_is_a_stream():
    mapped = MapDataset(Stream(), lambda x: [x])
    assert isinstance(mapped, MapIterableDataset)
    assert list(mapped) == [[x] for x in Stream()]


def test_mapped_data_set_is_pickled():
    assert pickle.loads(pickle.dumps(MapDataset([1, 2], str)))[1] == "2"


# --- seeds ---


class Noise:
    """Draws from all three generators."""

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), torch.rand(1).item()


def test_sample_depends_on_seed_and_number_alone():
    dataset = SeededDataset(Noise(), seed=3)
    first = dataset[Draw(0, 7)]
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    assert dataset[Draw(0, 7)] == first
    values = {dataset[Draw(0, number)][1:] for number in range(50)} | {
        SeededDataset(Noise(), 4)[Draw(0, 7)][1:]
    }
    assert len(values) == 51


@pytest.mark.parametrize(
    ("seed", "number", "drawn"),
    [
        (3, 7, (0.6903324757857193, 0.4079321181393666, 0.4306233525276184)),
        (0, 0, (0.2584797560128377, 0.5752662672138324, 0.2681640386581421)),
        (2**40 + 1, 123456, (0.7836835769120187, 0.5614789397541374, 0.7386083602905273)),
    ],
)
def test_random_numbers_of_a_draw_stay_those_of_older_versions(seed, number, drawn):
    # Otherwise a run that an older version began would not resume bit for bit.
    assert SeededDataset(Noise(), seed)[Draw(0, number)] == (0, *drawn)


def test_generators_are_put_back():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    SeededDataset(Noise(), seed=0)[Draw(0, 0)]
    assert states() == before


def test_generators_are_put_back_after_an_error():
    class Fails:
        def __getitem__(self, index):
            torch.rand(1)
            raise ValueError("no")

    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="no"):
        SeededDataset(Fails(), seed=0)[Draw(0, 0)]
    assert torch.equal(torch.get_rng_state(), before)


def test_neighbouring_draws_are_uncorrelated():
    dataset = SeededDataset(Noise(), seed=0)
    drawn = np.array([dataset[Draw(0, number)][2] for number in range(2000)])
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.06
    assert abs(drawn.mean() - 0.5) < 0.02


# --- streams ---


def test_workers_share_the_stream():
    dataset = ToIterableDataset(list(range(100, 110)), range(10))
    assert list(dataset) == list(range(100, 110))
    loader = DataLoader(dataset, batch_size=None, num_workers=2)
    assert sorted(loader) == list(range(100, 110))


def test_stream_of_a_stream_is_refused():
    with pytest.raises(TypeError, match="IterableDataset already"):
        ToIterableDataset(Stream(), range(3))
