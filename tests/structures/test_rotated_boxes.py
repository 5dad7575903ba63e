import math
import pickle

import pytest
import torch

from detkit.structures import (
    Boxes,
    BoxMode,
    Instances,
    RotatedBoxes,
    overlapping_rotated_boxes,
    pairwise_iou_rotated,
    rotated_box_corners,
    rotated_boxes_around,
)
from detkit.structures import pairwise_iou as pairwise_iou_for_matching
from detkit.structures.rotated_boxes import pairwise_iou
from tests.helpers import (
    DEVICES,
    iou_of_two_rotated_boxes,
    random_boxes,
    random_rotated_boxes,
    slow_pairwise_iou,
)


def as_rotated(boxes: torch.Tensor, angle: float = 0.0) -> torch.Tensor:
    """Return (N, 4) XYXY boxes as XYWHA."""
    xywh = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    rotated = BoxMode.convert(xywh, BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS)
    rotated[:, 4] = angle
    return rotated


def test_nothing_gives_no_boxes():
    for boxes in (RotatedBoxes([]), RotatedBoxes.cat([])):
        assert boxes.tensor.shape == (0, 5)
        assert boxes.area().shape == boxes.nonempty().shape == (0,)
        boxes.clip((10, 10))
        boxes.scale(2, 3)
        boxes.normalize_angles()
        assert boxes.upright().tensor.shape == (0, 4)


def test_other_shapes_are_an_error():
    with pytest.raises(ValueError, match=r"boxes need coordinates of shape \(N, 5\): got \(2, 4\)"):
        RotatedBoxes(torch.zeros(2, 4))


def test_upright_boxes_cannot_be_joined_with_rotated_ones():
    with pytest.raises(TypeError, match=r"RotatedBoxes.cat takes RotatedBoxes: item 0 is Boxes"):
        RotatedBoxes.cat([Boxes([[0, 0, 1, 1]])])


def test_selected_copied_and_joined_boxes_stay_rotated():
    boxes = RotatedBoxes(random_rotated_boxes(4))
    first, rest = boxes[0], boxes[torch.tensor([False, True, True, True])]
    joined = RotatedBoxes.cat([first, rest])
    for same in (joined, boxes.clone(), boxes.to("cpu"), pickle.loads(pickle.dumps(boxes))):
        assert type(same) is RotatedBoxes
        assert torch.equal(same.tensor, boxes.tensor)
    instances = Instances((9, 9), gt_boxes=boxes)
    assert torch.equal(Instances.cat([instances[:1], instances[1:]]).gt_boxes.tensor, boxes.tensor)


def test_normalized_angles_have_the_same_direction():
    tensor = random_rotated_boxes(50)
    tensor[:, 4] *= 5
    tensor[:2, 4] = torch.tensor([180.0, -180.0])
    boxes = RotatedBoxes(tensor)
    before = tensor.clone()
    boxes.normalize_angles()
    angles = boxes.tensor[:, 4]
    assert (angles >= -180).all()
    assert (angles < 180).all()
    torch.testing.assert_close(boxes.tensor[:, :4], before[:, :4])
    for function in (torch.cos, torch.sin):
        torch.testing.assert_close(
            function(torch.deg2rad(angles)),
            function(torch.deg2rad(before[:, 4])),
            atol=1e-4,
            rtol=0,
        )


@pytest.mark.parametrize("angle", [0.0, 1.0, -0.5, 360.0])
def test_clip_cuts_nearly_upright_boxes_as_upright_ones(angle):
    corners = random_boxes(30, size=200) - 50
    boxes, upright = RotatedBoxes(as_rotated(corners, angle)), Boxes(corners)
    boxes.clip((80, 100))
    upright.clip((80, 100))
    torch.testing.assert_close(boxes.area(), upright.area(), atol=1e-2, rtol=1e-5)
    torch.testing.assert_close(boxes.get_centers(), upright.get_centers())


def test_clip_leaves_turned_boxes_alone():
    tensor = random_rotated_boxes(40)
    boxes = RotatedBoxes(tensor.clone())
    boxes.clip((20, 30), clip_angle_threshold=45.0)
    changed = (boxes.tensor[:, :4] != tensor[:, :4]).any(dim=1)
    assert 0 < changed.sum() < 40
    assert (boxes.tensor[changed, 4].abs() <= 45).all()
    assert (boxes.area() <= RotatedBoxes(tensor).area()).all()


@pytest.mark.parametrize("method", ["normalize_angles", "clip", "scale"])
def test_what_works_in_place_changes_the_tensor_it_was_made_from(method):
    tensor = torch.tensor([[5.0, 5, 40, 20, 361]])
    boxes = RotatedBoxes(tensor)
    getattr(boxes, method)(*{"normalize_angles": (), "clip": [(20, 30)], "scale": (2, 3)}[method])
    assert boxes.tensor is tensor
    assert tensor[0, 4] != 361


def test_sides_at_or_below_the_threshold_are_empty():
    boxes = RotatedBoxes([[0, 0, 3, 2, 50], [0, 0, 0, 2, 50], [0, 0, 2, -1, 0]])
    assert boxes.nonempty().tolist() == [True, False, False]
    assert boxes.nonempty(2).tolist() == [False, False, False]


def test_inside_by_the_corners():
    # The half diagonal of the square is 7.07.
    boxes = RotatedBoxes([[7, 7, 10, 10, 45], [7.2, 7.2, 10, 10, 45], [7, 7, 10, 10, 0]])
    assert boxes.inside_box((20, 20)).tolist() == [False, True, True]
    assert boxes.inside_box((20, 20), boundary_threshold=1).tolist() == [True, True, True]


@pytest.mark.parametrize(
    ("box", "corners"),
    [
        pytest.param([2, 1, 4, 2, 0], [[0, 0], [4, 0], [4, 2], [0, 2]], id="upright"),
        # Counter-clockwise in the image: the side on top turns to the left.
        pytest.param([0, 0, 4, 2, 90], [[-1, 2], [-1, -2], [1, -2], [1, 2]], id="turned by 90"),
    ],
)
def test_corners_by_hand(box, corners):
    found = rotated_box_corners(torch.tensor([box], dtype=torch.float32))
    torch.testing.assert_close(found[0], torch.tensor(corners, dtype=torch.float32))


def test_boxes_around_their_corners_are_the_same():
    boxes = random_rotated_boxes(50).double()
    order = torch.stack([torch.randperm(4) for _ in range(50)])
    corners = rotated_box_corners(boxes).take_along_dim(order[..., None], dim=1)
    found = rotated_boxes_around(corners)
    assert (found[:, 2] >= found[:, 3]).all()
    assert ((found[:, 4] >= -90) & (found[:, 4] < 90)).all()
    torch.testing.assert_close(pairwise_iou_rotated(found, boxes).diag(), torch.ones(50).double())


@pytest.mark.parametrize(
    ("points", "area"),
    [
        pytest.param([[0, 0], [4, 1], [4, 3], [0, 4]], 16.0, id="trapezium"),
        pytest.param([[0, 0], [4, 0], [1, 1], [0, 4]], 16.0, id="dented"),
        pytest.param([[0, 0], [0, 0], [3, 4], [3, 4]], 0.0, id="line"),
        pytest.param([[5, 5]] * 4, 0.0, id="point"),
    ],
)
def test_box_around_other_quadrilaterals_holds_them(points, area):
    points = torch.tensor([points]).double()
    (box,) = rotated_boxes_around(points)
    assert (box[2] * box[3]).item() == pytest.approx(area, abs=1e-9)
    away = points[0] - box[:2]
    angle = torch.deg2rad(box[4])
    along = away @ torch.stack([angle.cos(), -angle.sin()])
    across = away @ torch.stack([angle.sin(), angle.cos()])
    assert (along.abs() <= box[2] / 2 + 1e-9).all()
    assert (across.abs() <= box[3] / 2 + 1e-9).all()


def test_upright_box_is_the_one_of_the_conversion():
    tensor = random_rotated_boxes(20)
    expected = BoxMode.convert(tensor, BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS)
    torch.testing.assert_close(RotatedBoxes(tensor).upright().tensor, expected)


@pytest.mark.parametrize(
    ("box", "factors", "expected"),
    [
        pytest.param([10, 20, 4, 2, 0], (2, 3), [20, 60, 8, 6, 0], id="upright"),
        pytest.param([10, 20, 4, 2, 90], (2, 3), [20, 60, 12, 4, 90], id="on its side"),
        pytest.param([10, 20, 4, 2, -130], (2, 2), [20, 40, 8, 4, -130], id="same factor"),
        # Width side (cos 45, -sin 45) * 4 becomes (1, -2) * 2.83; the height side (1, 1) becomes (1, 2).
        pytest.param(
            [0, 0, 4, 2, 45],
            (1, 2),
            [0, 0, 4 * 2.5**0.5, 2 * 2.5**0.5, math.degrees(math.atan2(1, 2))],
            id="turned",
        ),
    ],
)
def test_scale_by_hand(box, factors, expected):
    boxes = RotatedBoxes([box])
    boxes.scale(*factors)
    torch.testing.assert_close(boxes.tensor[0], torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("device", DEVICES)
def test_iou_equals_clipping_polygons(device):
    boxes1, boxes2 = random_rotated_boxes(40), random_rotated_boxes(40, seed=1)
    # The same box; turned about its center by a right, a straight and a tiny angle; on whole numbers and right angles.
    boxes2[:25] = boxes1[:25]
    boxes2[5:10, 4] += 90
    boxes2[10:15, 4] += 180
    boxes2[15:20, 4] += 1e-3
    boxes1[25:, :4], boxes2[25:, :4] = boxes1[25:, :4].round(), boxes2[25:, :4].round()
    boxes1[25:, 4], boxes2[25:, 4] = 0, (boxes2[25:, 4] / 90).round() * 90
    expected = [[iou_of_two_rotated_boxes(a, b) for b in boxes2.tolist()] for a in boxes1.tolist()]
    found = pairwise_iou_rotated(boxes1.to(device), boxes2.to(device)).cpu()
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(pairwise_iou_rotated(boxes2, boxes1), found.T, atol=1e-7, rtol=1e-6)
    assert (found.diag()[:5] == 1).all()


@pytest.mark.parametrize("angle", [0, 90, -90, 180, 720])
def test_iou_of_upright_boxes_equals_that_of_boxes(angle):
    corners1, corners2 = random_boxes(30), random_boxes(40, seed=1)
    boxes1, boxes2 = as_rotated(corners1), as_rotated(corners2, angle)
    if angle in (90, -90):
        boxes2[:, 2:4] = boxes2[:, 2:4].flip(1)
    found = pairwise_iou(RotatedBoxes(boxes1), RotatedBoxes(boxes2))
    torch.testing.assert_close(found, slow_pairwise_iou(corners1, corners2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("box1", "box2", "expected"),
    [
        pytest.param([1, 1, 2**0.5, 2**0.5, 45], [1, 1, 2, 2, 0], 0.5, id="diamond in a square"),
        pytest.param([5, 5, 10, 6, 55], [5, 5, 10, 6, -35], 36 / 84, id="a cross"),
        pytest.param(
            [299.5, 417.37, 600, 364.259186, 27.1828],
            [299.5, 417.37, 600, 364.259155, 27.1828],
            364.259155 / 364.259186,
            id="large, nearly the same",
        ),
        pytest.param([565, 565, 10, 10, 0], [565, 565, 10, 8.3, 0], 0.83, id="shared sides"),
        pytest.param([1e5, 1e5, 1000, 1e-3, 33], [1e5, 1e5, 1000, 1e-3, 33], 1.0, id="thin, far"),
        pytest.param([1e5, 0, 999, 1e-3, 33], [1e5, 0, 999, 2e-3, 213], 0.5, id="thin, half"),
        pytest.param([3, 3, 8, 2, -45], [6, 0, 8, 2, -45], 0.0, id="parallel, apart"),
        pytest.param([0, 0, 2, 2, 0], [2, 0, 2, 2, 0], 0.0, id="touching at a side"),
        pytest.param([0, 0, 2, 2, 0], [2, 2, 2, 2, 0], 0.0, id="touching at a corner"),
        pytest.param([0, 0, 0, 5, 0], [0, 0, 0, 5, 0], 0.0, id="no area"),
        pytest.param([0, 0, -2, -2, 0], [0, 0, 2, 2, 0], 0.0, id="negative sides"),
        pytest.param([0, 0, 2, 2, float("nan")], [0, 0, 2, 2, 0], 0.0, id="not a number"),
        pytest.param([160, 153, 230, 23, -37], [-1e17, 1e18, 1e3, 1e3, 1612], 0.0, id="far off"),
    ],
)
def test_iou_by_hand(box1, box2, expected, device):
    boxes1, boxes2 = torch.tensor([box1]).float(), torch.tensor([box2]).float()
    found = pairwise_iou_rotated(boxes1.to(device), boxes2.to(device))
    assert found.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_swapped", [False, True])
def test_iou_for_matching_is_rounded_as_in_detectron2_where_a_box_lies_within(is_swapped, device):
    inner = torch.tensor([[2, 2, 2, 2, 30], [8.5, 4, 3, 2, -50], [5.5, 3.6, 3.2, 4.8, 290.1]])
    outer = torch.tensor(
        [[0, 0, 45.254833, 22.627417, 0], [16, 0, 32, 32, -90], [3.7, 8.2, 90, 40, 41]]
    )
    # From a float32 program of its steps, pair by pair. The first two columns are equal but for
    # rounding, and the better one is not always the same.
    expected = torch.tensor(
        [
            [0.00390625047, 0.00390625093, 0.00111111114],
            [0.00585937593, 0.005859375, 0.00166666694],
            [0.0150000025, 0.0150000043, 0.00426666718],
        ]
    )
    boxes1, boxes2 = RotatedBoxes(inner.to(device)), RotatedBoxes(outer.to(device))
    if is_swapped:
        found = pairwise_iou_for_matching(boxes2, boxes1).T
    else:
        found = pairwise_iou_for_matching(boxes1, boxes2)
    assert torch.equal(found.cpu(), expected)
    assert not torch.equal(pairwise_iou_rotated(inner, outer), expected)


def test_iou_for_matching_is_exact_elsewhere():
    boxes = random_rotated_boxes(60)
    found = pairwise_iou_for_matching(RotatedBoxes(boxes), RotatedBoxes(boxes))
    torch.testing.assert_close(found, pairwise_iou_rotated(boxes, boxes), atol=1e-6, rtol=1e-6)
    nothing = RotatedBoxes([[0, 0, 0, 5, 0], [0, 0, -2, 5, 0], [0, 0, math.nan, 5, 0]])
    assert (pairwise_iou_for_matching(nothing, nothing) == 0).all()
    assert pairwise_iou_for_matching(nothing[:0], nothing).shape == (0, 3)


def test_iou_without_boxes_is_empty():
    assert pairwise_iou_rotated(torch.zeros(0, 5), torch.zeros(3, 5)).shape == (0, 3)
    assert pairwise_iou_rotated(torch.zeros(3, 5), torch.zeros(0, 5)).shape == (3, 0)


def test_iou_of_upright_coordinates_is_an_error():
    with pytest.raises(ValueError, match=r"rotated boxes are \(N, 5\) XYWHA: got \(3, 4\)"):
        pairwise_iou_rotated(torch.zeros(2, 5), torch.zeros(3, 4))


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_iou_above_a_threshold_is_the_same_there(threshold):
    boxes1, boxes2 = random_rotated_boxes(60), random_rotated_boxes(60, seed=1)
    boxes2[:30] = boxes1[:30] + torch.rand(30, 5, generator=torch.Generator().manual_seed(0))
    whole = pairwise_iou_rotated(boxes1, boxes2)
    found = pairwise_iou_rotated(boxes1, boxes2, above=threshold)
    assert torch.equal(found.where(whole > threshold, 0), whole.where(whole > threshold, 0))
    assert (whole > threshold).any()
    assert threshold == 0 or (found == 0).sum() > (whole == 0).sum()


@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.5, 0.51, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("box", [[90, 40, 60, 1, 20], [5e4, 9e4, 30, 30, 45], [0, 0, 1, 8, 0]])
def test_boxes_moved_just_short_of_the_threshold_are_found(box, threshold):
    boxes = torch.tensor([box]).double()
    angle = torch.deg2rad(boxes[0, 4])
    sides = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    shared = 2 * threshold / (1 + threshold)
    moved = boxes.repeat(2, 1)
    moved[:, :2] += sides * boxes[0, 2:4, None] * (1 - shared) * 0.999
    found = pairwise_iou_rotated(boxes, moved, above=threshold * 0.9999)[0]
    assert (found > threshold * 0.9999).all()


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3])
def test_overlapping_pairs_are_those_of_each_run(threshold):
    boxes = random_rotated_boxes(60)
    counts = [0, 25, 1, 34]
    run = torch.tensor([1] * 25 + [2] + [3] * 34)
    is_pair = (pairwise_iou_rotated(boxes, boxes) > threshold) & (run[:, None] == run)
    expected = is_pair.triu(diagonal=1).nonzero()
    found = overlapping_rotated_boxes(boxes, counts, threshold)
    assert sorted(found.tolist()) == expected.tolist()
    assert 0 < len(expected) < 500
    assert overlapping_rotated_boxes(boxes[:0], [], threshold).shape == (0, 2)


def test_iou_in_small_steps_is_the_same(monkeypatch):
    boxes1, boxes2 = random_rotated_boxes(30), random_rotated_boxes(20, seed=1)
    whole = pairwise_iou_rotated(boxes1, boxes2)
    monkeypatch.setattr("detkit.structures.rotated_boxes._MAX_CANDIDATES", 70)
    monkeypatch.setattr("detkit.structures.rotated_boxes._MAX_PAIRS", {"cpu": 7})
    assert torch.equal(pairwise_iou_rotated(boxes1, boxes2), whole)


@pytest.mark.parametrize("device", DEVICES)
def test_as_many_boxes_as_anchors(device):
    anchors = torch.zeros(1_300_000, 5, device=device)
    assert pairwise_iou_rotated(anchors[:5], anchors).shape == (5, 1_300_000)
