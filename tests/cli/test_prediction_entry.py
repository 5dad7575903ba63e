import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from detkit.cli.prediction_entry import describe_output, write_maps
from detkit.structures import Boxes, Instances, rle_to_bitmask
from detkit.utils.colormap import rgb2id

METADATA = SimpleNamespace(thing_classes=["cat", "dog"], stuff_classes=["things", "sky"])


def instances(**fields):
    return Instances(
        (40, 60),
        pred_boxes=Boxes(torch.tensor([[10.0, 5, 30, 25.5], [0, 0, 60, 40]])),
        scores=torch.tensor([0.98765432, 0.5]),
        pred_classes=torch.tensor([1, 7]),
        **fields,
    )


def test_entry_holds_names_scores_and_boxes_as_coco_has_them() -> None:
    assert describe_output({"instances": instances()}, METADATA) == {
        "instances": [
            {"category": "dog", "category_id": 1, "score": 0.9877, "bbox": [10, 5, 20, 20.5]},
            {"category": "7", "category_id": 7, "score": 0.5, "bbox": [0, 0, 60, 40]},
        ]
    }


def test_masks_come_back_from_their_run_lengths() -> None:
    masks = torch.rand(2, 40, 60) > 0.5
    described = describe_output({"instances": instances(pred_masks=masks)}, METADATA)
    found = json.loads(json.dumps(described))["instances"]
    for entry, mask in zip(found, masks.numpy(), strict=True):
        assert np.array_equal(rle_to_bitmask(entry["segmentation"]), mask)


def test_keypoints_are_a_flat_list() -> None:
    keypoints = torch.tensor([[[1.0, 2, 0.5], [3, 4, 0.25]], [[5, 6, 1], [7, 8, 0]]])
    found = describe_output({"instances": instances(pred_keypoints=keypoints)}, METADATA)[
        "instances"
    ]
    assert [entry["keypoints"] for entry in found] == [[1, 2, 0.5, 3, 4, 0.25], [5, 6, 1, 7, 8, 0]]


def test_nothing_found_is_an_empty_list() -> None:
    nothing = instances(pred_masks=torch.zeros(2, 40, 60), pred_keypoints=torch.zeros(2, 3, 3))[:0]
    assert describe_output({"instances": nothing}, METADATA) == {"instances": []}


SEGMENTS = [
    {"id": 1, "isthing": True, "score": 0.912345, "category_id": 1, "instance_id": 0},
    {"id": 300, "isthing": False, "category_id": 1, "area": 12},
]


def test_segments_are_named_as_things_or_stuff() -> None:
    described = describe_output({"panoptic_seg": (torch.zeros(4, 6).int(), SEGMENTS)}, METADATA)
    assert described["segments"] == [
        {
            "category": "dog",
            "id": 1,
            "isthing": True,
            "score": 0.9123,
            "category_id": 1,
            "instance_id": 0,
        },
        {"category": "sky", "id": 300, "isthing": False, "category_id": 1, "area": 12},
    ]


def test_segment_ids_come_back_from_their_colours(tmp_path) -> None:
    ids = torch.tensor([[0, 1], [300, 70000]], dtype=torch.int32)
    files = write_maps({"panoptic_seg": (ids, SEGMENTS)}, tmp_path, "a.jpg")
    assert files == {"panoptic": "panoptic/a.jpg.png"}
    assert rgb2id(np.asarray(Image.open(tmp_path / files["panoptic"]))).tolist() == ids.tolist()


@pytest.mark.parametrize("num_classes", [3, 300])
def test_classes_of_pixels_come_back_however_many(tmp_path, num_classes: int) -> None:
    labels = torch.tensor([[0, 1], [num_classes - 1, 2]])
    scores = torch.nn.functional.one_hot(labels, num_classes).permute(2, 0, 1)
    files = write_maps({"sem_seg": scores}, tmp_path, "a.jpg")
    assert np.asarray(Image.open(tmp_path / files["sem_seg"])).tolist() == labels.tolist()


def test_instances_alone_write_no_map(tmp_path) -> None:
    assert write_maps({"instances": instances()}, tmp_path, "a.jpg") == {}
    assert list(tmp_path.iterdir()) == []
