import itertools
import logging

import numpy as np
import pytest
from PIL import Image

from detkit.config import get_cfg
from detkit.data import build_detection_train_loader
from detkit.data.dataset_mapper import DatasetMapper
from detkit.utils.image_file import BadImageError


@pytest.fixture
def records(tmp_path):
    """Six images: two are whole, the others missing, empty, truncated and of another size."""
    records = []
    for number in range(6):
        path = tmp_path / f"{number}.jpg"
        Image.fromarray(np.full((16, 24, 3), number, dtype=np.uint8)).save(path)
        records.append(
            {
                "file_name": str(path),
                "image_id": number,
                "height": 16,
                "width": 24,
                "annotations": [],
            }
        )
    (tmp_path / "2.jpg").unlink()
    (tmp_path / "3.jpg").write_bytes(b"")
    (tmp_path / "4.jpg").write_bytes((tmp_path / "4.jpg").read_bytes()[:300])
    records[5]["height"] = 17
    return records


def loader(records, num_workers=0, **options):
    mapper = DatasetMapper(True, augmentations=[])
    return build_detection_train_loader(
        records, mapper=mapper, total_batch_size=2, num_workers=num_workers, seed=3, **options
    )


def ids(batches, count):
    return [[sample["image_id"] for sample in batch] for batch in itertools.islice(batches, count)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_skipped_counted_and_named(records, num_workers, caplog):
    with caplog.at_level(logging.WARNING):
        batches = ids(loader(records, num_workers, skip_bad_images=True), 10)
    assert sorted(itertools.chain.from_iterable(batches)) == [0] * 10 + [1] * 10
    messages = [r.message for r in caplog.records if "skipped" in r.message]
    assert len(messages) == 4  # each file once
    for name, reason in (
        ("2", "does not exist"),
        ("3", "is empty"),
        ("4", "damaged or truncated"),
        ("5", "16"),
    ):
        assert any(f"{name}.jpg" in message and reason in message for message in messages)
    assert "So far 4 images were skipped" in messages[-1]


def test_bad_images_end_the_run_unless_asked_otherwise(records):
    assert get_cfg().DATALOADER.ON_BAD_IMAGE == "raise"
    with pytest.raises((BadImageError, FileNotFoundError), match=r"\d\.jpg"):
        ids(loader(records), 10)


def test_position_of_a_run_counts_skipped_images(records):
    whole = ids(loader(records, skip_bad_images=True), 12)
    first = loader(records, skip_bad_images=True)
    batches = iter(first)
    begun = ids(batches, 5)
    second = loader(records, skip_bad_images=True)
    second.load_state_dict(first.state_dict())
    assert begun + ids(second, 7) == whole


def test_nothing_but_bad_images_end_the_run(records):
    with pytest.raises(
        BadImageError,
        match=r"1000 images in a row could not be read, the last one because .*2\.jpg",
    ):
        ids(loader(records[2:3], skip_bad_images=True), 1)


def test_only_bad_images_in_a_row_end_the_run(records, monkeypatch):
    monkeypatch.setattr("detkit.data.training_stream._MAX_SKIPPED_IN_A_ROW", 3)
    bad, good = records[2], records[0]
    for order, is_too_many in (([0, 0, 1, 1], False), ([0, 0, 0, 1], True)):
        loaded = loader([bad, good], sampler=order * 4, skip_bad_images=True)
        if is_too_many:
            with pytest.raises(BadImageError, match="3 images in a row"):
                ids(loaded, 1)
        else:
            assert len(ids(loaded, 4)) == 4


def test_counts_survive_a_resume(records, caplog):
    whole = loader(records, skip_bad_images=True)
    ids(whole, 12)
    first = loader(records, skip_bad_images=True)
    ids(first, 5)
    state = first.state_dict()
    assert 0 < sum(state["skipped"].values()) < sum(whole.skipped.values())
    second = loader(records, skip_bad_images=True)
    second.load_state_dict(state)
    caplog.clear()
    ids(second, 7)
    assert second.skipped == whole.skipped
    assert len([r for r in caplog.records if "skipped" in r.message]) == 4 - len(
        state["skipped"]
    )  # each file once


def test_counts_of_more_processes_come_together(records):
    states = []
    for length in (5, 8):
        stream = loader(records, skip_bad_images=True)
        ids(stream, length)
        states.append(stream.state_dict())
    alone = loader(records, skip_bad_images=True)
    alone.move_to_share(states)
    assert alone.skipped == {
        reason: sum(state["skipped"].get(reason, 0) for state in states)
        for reason in states[1]["skipped"]
    }
