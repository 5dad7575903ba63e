"""Precomputed proposals: read without running anything, sorted, moved with the image."""

import pickle

import numpy as np
import pytest
import torch

from detkit.data import transforms as T
from detkit.data.proposals import load_proposals_into_dataset, transformed_proposals
from detkit.structures import BoxMode

RECORDS = [{"file_name": f"{i}.jpg", "image_id": i, "height": 24, "width": 32} for i in (3, 5)]
BOXES = [np.array([[0, 0, 4, 4], [2, 2, 40, 20]], np.float32), np.zeros((0, 4), np.float32)]
LOGITS = [np.array([0.5, 2.0], np.float32), np.zeros(0, np.float32)]
CONTENT = {
    "ids": [3, 5],
    "boxes": BOXES,
    "objectness_logits": LOGITS,
    "bbox_mode": BoxMode.XYXY_ABS.value,
}


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "proposals.pkl"
        path.write_bytes(pickle.dumps(content))
        return str(path)

    return write


def without(key):
    return {k: v for k, v in CONTENT.items() if k != key}


def test_proposals_come_in_falling_order(write):
    first, second = load_proposals_into_dataset(RECORDS, write(CONTENT))
    assert first["proposal_boxes"].tolist() == [[2, 2, 40, 20], [0, 0, 4, 4]]
    assert first["proposal_objectness_logits"].tolist() == [2.0, 0.5]
    assert second["proposal_boxes"].shape == (0, 4)
    assert "proposal_boxes" not in RECORDS[0]


def test_names_and_order_of_detectron_are_understood(write):
    old = {"indexes": ["5", "3"], "boxes": BOXES[::-1], "scores": LOGITS[::-1]}
    first, _ = load_proposals_into_dataset(RECORDS, write(old))
    assert first["proposal_boxes"].tolist() == [[2, 2, 40, 20], [0, 0, 4, 4]]
    assert first["proposal_bbox_mode"] == BoxMode.XYXY_ABS


def test_proposals_move_with_the_image_and_are_limited_to_it(write):
    record, _ = load_proposals_into_dataset(RECORDS, write(CONTENT))
    transforms = T.TransformList([T.ResizeTransform(24, 32, 48, 64), T.HFlipTransform(64)])
    proposals = transformed_proposals(record, (48, 64), transforms, topk=10)
    assert proposals.proposal_boxes.tensor.tolist() == [[0, 4, 60, 40], [56, 0, 64, 8]]
    assert torch.equal(proposals.objectness_logits, torch.tensor([2.0, 0.5]))
    assert len(transformed_proposals(record, (48, 64), transforms, topk=1)) == 1


def test_empty_proposals_go_before_the_best_are_taken(write):
    record, _ = load_proposals_into_dataset(RECORDS, write(CONTENT))
    crop = T.CropTransform(0, 0, 2, 2)
    proposals = transformed_proposals(record, (2, 2), crop, topk=1)
    assert proposals.proposal_boxes.tensor.tolist() == [[0, 0, 2, 2]]


def test_image_without_proposals_is_named(write):
    with pytest.raises(
        ValueError,
        match=r"proposals.pkl has no proposals for 1 of 2 images, first for image id 5 \(5.jpg",
    ):
        load_proposals_into_dataset(RECORDS, write({**CONTENT, "ids": [3, 4]}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            without("boxes"), "lacks boxes; it has ids, objectness_logits, bbox_mode", id="key"
        ),
        pytest.param([1], "must hold a dict, holds a list", id="list"),
        pytest.param(
            {**CONTENT, "ids": [3]}, "an entry per image of each, has .*'ids': 1", id="lengths"
        ),
        pytest.param(
            {**CONTENT, "boxes": [BOXES[1], BOXES[1]]},
            r"image id 3, has \(0, 4\) and \(2,\)",
            id="shapes",
        ),
        pytest.param({**CONTENT, "bbox_mode": float("inf")}, "a wrong bbox_mode", id="mode"),
        pytest.param(
            {**CONTENT, "x": print}, "asks for builtins.print; it may hold arrays", id="function"
        ),
    ],
)
def test_files_that_are_none_of_proposals_are_refused(write, content, message):
    with pytest.raises(ValueError, match=message):
        load_proposals_into_dataset(RECORDS, write(content))


def test_broken_and_absent_files_are_named(tmp_path):
    (tmp_path / "broken.pkl").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken.pkl is not a pickle of arrays"):
        load_proposals_into_dataset(RECORDS, str(tmp_path / "broken.pkl"))
    with pytest.raises(
        FileNotFoundError, match=r"absent.pkl \(DATASETS.PROPOSAL_FILES_\*\) does not exist"
    ):
        load_proposals_into_dataset(RECORDS, str(tmp_path / "absent.pkl"))


def test_record_without_proposals_says_which_key_to_set():
    with pytest.raises(
        ValueError, match=r"LOAD_PROPOSALS .*3.jpg has no proposal_boxes.*PROPOSAL_FILES_TRAIN"
    ):
        transformed_proposals(RECORDS[0], (24, 32), T.NoOpTransform(), 5)
