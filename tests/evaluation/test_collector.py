from dataclasses import dataclass

import numpy as np
import pytest

from detkit.evaluation.collector import ImageCollector
from detkit.utils import comm
from tests.processes import together


@dataclass
class Found:
    image_id: int | str
    arrays: dict

    def to_arrays(self):
        return self.arrays

    @classmethod
    def from_arrays(cls, image_id, arrays):
        return cls(image_id, arrays)


def found(image_id, **arrays):
    return Found(image_id, {name: np.array(array) for name, array in arrays.items()})


# By process. Some have no image, some images lack an array or have no rows.
SHARES = {
    "odd": [
        [
            found("d", boxes=np.ones((2, 4), np.float32)),
            found("a", boxes=np.zeros((0, 4), np.float32)),
        ],
        [found("c", boxes=np.full((1, 4), 3, np.float32), masks=np.arange(5, dtype=np.uint8))],
        [],
    ],
    "nothing": [[], [], []],
    "only empty arrays": [
        [],
        [found("b", boxes=np.zeros((0, 4)))],
        [found("a", boxes=np.zeros((0, 4)))],
    ],
    "images without anything": [[found("b")], [found("a")], []],
    "a name in the last process only": [[], [found("b")], [found("a", is_right=[True, False])]],
}


SPECIAL = {
    # Of the images that come twice, c is the first in the data set.
    "twice": [[found("d"), found("a")], [found("c")], [found("d"), found("c")]],
    "shapes": [
        [found("a", points=np.zeros((0, 7)))],
        [found("b", points=[[1, 1]]), found("c", points=np.zeros((0, 2)))],
        [found("d", points=[])],
    ],
}


def gather_all():
    """What this process gets of each share."""
    gathered = {}
    for name, share in {**SHARES, **SPECIAL}.items():
        collector = ImageCollector(Found, "data", ["a", "b", "c", "d"])
        for item in share[comm.get_rank()]:
            collector.add(item)
        try:
            gathered[name] = collector.gather(distributed=True)
        except ValueError as error:
            gathered[name] = str(error)
        comm.synchronize()
    return gathered


@pytest.fixture(scope="module")
def of_three_processes(tmp_path_factory):
    return together(gather_all, folder=tmp_path_factory.mktemp("together"), world_size=3)


@pytest.mark.parametrize("name", SHARES)
def test_main_process_gets_what_all_have_in_order_of_the_data_set(of_three_processes, name):
    main, *others = of_three_processes
    assert [gathered[name] for gathered in others] == [None, None]
    expected = sorted(
        (item for share in SHARES[name] for item in share), key=lambda item: item.image_id
    )
    assert [item.image_id for item in main[name]] == [item.image_id for item in expected]
    for item, other in zip(main[name], expected, strict=True):
        assert item.arrays.keys() == other.arrays.keys()
        for key, array in item.arrays.items():
            np.testing.assert_array_equal(array, other.arrays[key], strict=True)


def test_arrays_without_rows_may_have_any_shape(of_three_processes):
    by_image = {item.image_id: item.arrays["points"] for item in of_three_processes[0]["shapes"]}
    assert by_image["b"].tolist() == [[1, 1]]
    assert [by_image[image_id].shape for image_id in "acd"] == [(0, 2)] * 3


def test_image_predicted_by_two_processes_is_an_error_in_all(of_three_processes):
    message = "image 'c' of data set 'data' was predicted twice: either the test loader gives an image more than once"
    assert all(gathered["twice"].startswith(message) for gathered in of_three_processes)


def test_each_process_may_keep_its_own(monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    collector = ImageCollector(Found, "data", ["a", "b"])
    collector.add(found("b"))
    collector.add(found("a"))
    assert [item.image_id for item in collector.gather(distributed=False)] == ["a", "b"]


def test_image_that_comes_twice_or_from_elsewhere_is_an_error():
    collector = ImageCollector(Found, "data", [1])
    collector.add(found(1))
    with pytest.raises(
        ValueError, match="image 1 of data set 'data' was predicted twice.*a sampler that pads"
    ):
        collector.add(found(1))
    with pytest.raises(ValueError, match="image 2 was predicted, but is not in data set 'data'"):
        collector.add(found(2))


def test_collector_counts_and_forgets():
    collector = ImageCollector(Found, "data", [1])
    collector.add(found(1))
    assert len(collector) == 1
    collector.reset()
    assert len(collector) == 0
