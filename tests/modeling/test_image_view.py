"""Tests of detkit.modeling.image_view."""

import pytest
import torch

from detkit.config import get_cfg
from detkit.data.transforms import ResizeShortestEdge
from detkit.modeling import DatasetMapperTTA
from detkit.modeling.image_view import View
from detkit.structures import Boxes, Instances
from tests.helpers import random_boxes

BOX = [4.0, 8.0, 20.0, 24.0]


def picture(**fields):
    """40 x 60, with a bright patch in BOX."""
    image = torch.zeros(1, 40, 60, dtype=torch.uint8)
    image[:, 8:24, 4:20] = 200
    return {"image": image, **fields}


@pytest.mark.parametrize("is_mirrored", [False, True])
def test_boxes_come_back_from_a_view(is_mirrored):
    view, boxes = View((80, 50), is_mirrored), random_boxes(5, 90.0)
    seen = view.boxes_into(boxes, (100, 200))
    torch.testing.assert_close(view.boxes_out(seen, (100, 200)), boxes)
    torch.testing.assert_close(seen[:, 1::2], boxes[:, 1::2] * 0.8)


def test_view_shows_a_box_where_it_says():
    image = picture()["image"]
    for view in (View((80, 120), False), View((80, 120), True), View((40, 60), True)):
        x1, y1, x2, y2 = view.boxes_into(torch.tensor([BOX]), (40, 60))[0].round().long().tolist()
        seen = view.image(image)
        assert seen.dtype == torch.uint8
        assert seen.shape == (1, *view.size)
        assert seen[0, y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].min() > 100
        outside = seen.clone()
        outside[0, y1 - 1 : y2 + 1, x1 - 1 : x2 + 1] = 0
        assert outside.max() < 20


@pytest.mark.parametrize(
    ("height", "width"), [(480, 640), (640, 480), (500, 500), (100, 3000), (37, 1001)]
)
@pytest.mark.parametrize(("min_size", "max_size"), [(400, 4000), (800, 1333), (601, 700)])
def test_sizes_are_those_of_the_data_loader(height, width, min_size, max_size):
    mapper = DatasetMapperTTA(min_sizes=[min_size], max_size=max_size, flip=False)
    ((seen, view),) = mapper({"image": torch.zeros(1, height, width, dtype=torch.uint8)})
    assert view.size == ResizeShortestEdge.get_output_shape(height, width, min_size, max_size)
    assert seen["image"].shape[1:] == view.size


def test_every_size_is_seen_plain_and_mirrored():
    mapper = DatasetMapperTTA(min_sizes=[40, 80], max_size=1000, flip=True)
    views = [view for _, view in mapper(picture())]
    assert views == [View(size, m) for size in ((40, 60), (80, 120)) for m in (False, True)]


def test_proposals_are_seen_in_every_view():
    proposals = Instances((40, 60), proposal_boxes=Boxes([BOX]), objectness_logits=torch.zeros(1))
    mapper = DatasetMapperTTA(min_sizes=[80], max_size=1000, flip=True)
    plain, mirrored = (x["proposals"] for x, _ in mapper(picture(proposals=proposals)))
    assert plain.proposal_boxes.tensor.tolist() == [[8.0, 16.0, 40.0, 48.0]]
    assert mirrored.proposal_boxes.tensor.tolist() == [[80.0, 16.0, 112.0, 48.0]]
    assert mirrored.objectness_logits.tolist() == [0.0]


def test_no_size_is_an_error():
    with pytest.raises(ValueError, match="TEST.AUG.MIN_SIZES needs at least one size"):
        DatasetMapperTTA(min_sizes=[], max_size=100, flip=True)


def test_settings_come_from_the_config():
    cfg = get_cfg()
    cfg.merge_from_list(
        ["TEST.AUG.MIN_SIZES", [40, 50], "TEST.AUG.MAX_SIZE", 60, "TEST.AUG.FLIP", False]
    )
    views = [view for _, view in DatasetMapperTTA(cfg)(picture())]
    assert views == [View((40, 60), False)] * 2
