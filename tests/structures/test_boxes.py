import pytest
import torch

from detkit.structures import (
    Boxes,
    matched_pairwise_iou,
    pairwise_intersection,
    pairwise_ioa,
    pairwise_iou,
    pairwise_point_box_distance,
)
from tests.helpers import random_boxes, slow_pairwise_iou


@pytest.mark.parametrize(
    "coordinates",
    [
        pytest.param([], id="empty list"),
        pytest.param(torch.empty(0), id="empty tensor of one dimension"),
        pytest.param(torch.empty(0, 4), id="empty tensor of two"),
    ],
)
def test_nothing_gives_no_boxes(coordinates):
    boxes = Boxes(coordinates)
    assert boxes.tensor.shape == (0, 4)
    assert len(boxes) == 0
    assert boxes.area().shape == (0,)
    assert boxes.get_centers().shape == (0, 2)
    assert boxes.nonempty().shape == (0,)
    assert list(boxes) == []


def test_coordinates_become_float32():
    assert Boxes([[0, 0, 1, 1]]).tensor.dtype == torch.float32
    assert Boxes(torch.zeros(1, 4, dtype=torch.float16)).tensor.dtype == torch.float32
    assert Boxes(torch.zeros(1, 4, dtype=torch.float64).numpy()).tensor.dtype == torch.float32


def test_float32_tensor_is_kept_without_a_copy():
    coordinates = random_boxes(2)
    assert Boxes(coordinates).tensor is coordinates


@pytest.mark.parametrize("shape", [(4,), (2, 5), (1, 2, 4)])
def test_other_shapes_are_an_error(shape):
    with pytest.raises(ValueError, match=r"boxes need coordinates of shape \(N, 4\): got"):
        Boxes(torch.zeros(shape))


def test_area_and_centers_by_hand():
    boxes = Boxes([[0, 0, 10, 20], [1, 1, 1, 5]])
    assert boxes.area().tolist() == [200, 0]
    assert boxes.get_centers().tolist() == [[5, 10], [1, 3]]


def test_clip_limits_to_height_and_width_and_leaves_the_input_alone():
    coordinates = torch.tensor(
        [[-5.0, -6.0, 70.0, 80.0], [10.0, 20.0, 30.0, 40.0], [90.0, 90.0, 99.0, 99.0]]
    )
    before = coordinates.clone()
    boxes = Boxes(coordinates)
    boxes.clip((50, 60))
    assert boxes.tensor.tolist() == [[0, 0, 60, 50], [10, 20, 30, 40], [60, 50, 60, 50]]
    assert torch.equal(coordinates, before)


def test_clip_twice_is_clip_once():
    boxes = Boxes(random_boxes(20) * 2 - 50)
    boxes.clip((60, 70))
    once = boxes.tensor.clone()
    boxes.clip((60, 70))
    assert torch.equal(boxes.tensor, once)


def test_nonempty_needs_both_sides_above_the_threshold():
    boxes = Boxes([[0, 0, 10, 10], [0, 0, 0, 10], [0, 0, 10, 0], [5, 5, 0, 10]])
    assert boxes.nonempty().tolist() == [True, False, False, False]
    assert boxes.nonempty(threshold=10).tolist() == [False] * 4


def test_inside_box_allows_a_border():
    boxes = Boxes([[0, 0, 59, 49], [-1, 0, 20, 20], [0, 0, 61, 20]])
    assert boxes.inside_box((50, 60)).tolist() == [True, False, False]
    assert boxes.inside_box((50, 60), boundary_threshold=2).tolist() == [True, True, True]


def test_inside_box_counts_the_left_and_upper_border_only():
    # A box per side that lies on the border, and one that lies a quarter of a pixel beyond.
    on = Boxes([[0, 5, 9, 9], [5, 0, 9, 9], [5, 5, 60, 9], [5, 5, 9, 50]])
    assert on.inside_box((50, 60)).tolist() == [True, True, False, False]
    beyond = Boxes([[-0.25, 5, 9, 9], [5, -0.25, 9, 9], [5, 5, 60.25, 9], [5, 5, 9, 50.25]])
    assert beyond.inside_box((50, 60)).tolist() == [False] * 4
    on_border = Boxes([[-2, 5, 9, 9], [5, -2, 9, 9], [5, 5, 62, 9], [5, 5, 9, 52]])
    assert on_border.inside_box((50, 60), 2).tolist() == [True, True, False, False]
    assert beyond.inside_box((50, 60), 2).all()


def test_scale_multiplies_x_and_y_of_the_tensor_itself():
    coordinates = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    boxes = Boxes(coordinates)
    boxes.scale(2, 10)
    assert boxes.tensor is coordinates
    assert coordinates.tolist() == [[2, 20, 6, 40]]


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        pytest.param(1, [1], id="int"),
        pytest.param(-1, [3], id="last"),
        pytest.param(slice(1, 3), [1, 2], id="slice"),
        pytest.param(torch.tensor([True, False, False, True]), [0, 3], id="mask"),
        pytest.param(torch.tensor([2, 0, 2]), [2, 0, 2], id="indices"),
        pytest.param(torch.zeros(4, dtype=torch.bool), [], id="nothing"),
    ],
)
def test_indexing_gives_boxes(item, expected):
    coordinates = random_boxes(4)
    selected = Boxes(coordinates)[item]
    assert isinstance(selected, Boxes)
    assert torch.equal(selected.tensor, coordinates[expected])


def test_index_beyond_the_boxes_is_an_error():
    with pytest.raises(IndexError, match="box 4 of 4"):
        Boxes(random_boxes(4))[4]


def test_index_into_coordinates_is_an_error():
    with pytest.raises(ValueError, match="not boxes"):
        Boxes(random_boxes(4))[torch.zeros(4, 4, dtype=torch.bool)]


def test_iteration_gives_each_box():
    coordinates = random_boxes(3)
    assert torch.equal(torch.stack(list(Boxes(coordinates))), coordinates)


def test_cat_joins_in_order_with_its_own_memory():
    a, b = random_boxes(2, seed=1), random_boxes(3, seed=2)
    joined = Boxes.cat([Boxes(a), Boxes(b), Boxes([])])
    assert torch.equal(joined.tensor, torch.cat([a, b]))
    single = Boxes.cat([Boxes(a)])
    assert single.tensor.data_ptr() != a.data_ptr()


def test_cat_of_nothing_is_no_boxes():
    assert len(Boxes.cat([])) == 0


def test_cat_of_tensors_is_an_error():
    with pytest.raises(TypeError, match="Boxes.cat takes Boxes: item 1 is Tensor") as error:
        Boxes.cat([Boxes([]), random_boxes(1)])  # type: ignore[list-item]
    assert isinstance(error.value, AssertionError)  # as in Detectron2


def test_clone_and_to_give_equal_boxes():
    boxes = Boxes(random_boxes(2))
    assert torch.equal(boxes.clone().tensor, boxes.tensor)
    assert boxes.clone().tensor is not boxes.tensor
    assert boxes.to("cpu").device == torch.device("cpu")
    assert boxes.to("meta").device.type == "meta"


SIZES = [
    pytest.param(n, m, id=f"{n} and {m}") for n, m in [(0, 0), (0, 3), (3, 0), (1, 1), (13, 7)]
]


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_pairwise_iou_equals_the_slow_reference(n, m):
    a, b = random_boxes(n, seed=1), random_boxes(m, seed=2)
    torch.testing.assert_close(pairwise_iou(Boxes(a), Boxes(b)), slow_pairwise_iou(a, b))


def test_pairwise_iou_of_boxes_with_themselves_is_symmetric_and_one_on_the_diagonal():
    boxes = Boxes(random_boxes(20))
    iou = pairwise_iou(boxes, boxes)
    assert torch.equal(iou, iou.T)
    assert torch.equal(iou.diagonal(), torch.ones(20))


def test_pairwise_iou_does_not_change_with_shift_and_scale():
    a, b = random_boxes(10, seed=1), random_boxes(10, seed=2)
    moved = pairwise_iou(Boxes(a * 4 + 64), Boxes(b * 4 + 64))
    torch.testing.assert_close(moved, pairwise_iou(Boxes(a), Boxes(b)), atol=1e-5, rtol=1e-4)


def test_degenerate_boxes_overlap_nothing():
    degenerate = Boxes([[1, 1, 1, 1], [1, 1, 1, 9], [9, 9, 1, 1]])
    whole = Boxes([[0, 0, 10, 10], [1, 1, 1, 1]])
    assert pairwise_iou(degenerate, whole).tolist() == [[0, 0]] * 3
    assert pairwise_ioa(whole, degenerate).tolist() == [[0, 0, 0]] * 2
    assert matched_pairwise_iou(degenerate, degenerate)[:2].tolist() == [0, 0]


def test_pairwise_functions_do_not_change_their_inputs():
    a, b = random_boxes(5, seed=1), random_boxes(6, seed=2)
    before = a.clone(), b.clone()
    pairwise_iou(Boxes(a), Boxes(b))
    pairwise_ioa(Boxes(a), Boxes(b))
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


def test_pairwise_iou_passes_a_gradient():
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0]], dtype=torch.float32, requires_grad=True)
    pairwise_iou(Boxes(a), Boxes([[1, 0, 3, 2]])).sum().backward()
    # IoU = 2 (x2 - 1) / (2 x2 + 4 - 2 (x2 - 1)) = (x2 - 1) / 3 for x2 near 2.
    assert a.grad is not None
    assert a.grad[0, 2].item() == pytest.approx(1 / 3)


def test_pairwise_intersection_and_ioa_by_hand():
    a, b = Boxes([[0, 0, 10, 10]]), Boxes([[5, 5, 15, 15], [2, 2, 4, 4], [20, 20, 30, 30]])
    assert pairwise_intersection(a, b).tolist() == [[25, 4, 0]]
    assert pairwise_ioa(a, b).tolist() == [[0.25, 1, 0]]


def test_matched_pairwise_iou_is_the_diagonal():
    a, b = Boxes(random_boxes(9, seed=1)), Boxes(random_boxes(9, seed=2))
    torch.testing.assert_close(matched_pairwise_iou(a, b), pairwise_iou(a, b).diagonal())
    assert matched_pairwise_iou(Boxes([]), Boxes([])).shape == (0,)


def test_matched_pairwise_iou_needs_partners():
    with pytest.raises(ValueError, match="need as many boxes as partners: got 2 and 3"):
        matched_pairwise_iou(Boxes(random_boxes(2)), Boxes(random_boxes(3)))


def test_point_box_distance_by_hand():
    distance = pairwise_point_box_distance(
        torch.tensor([[3.0, 4.0], [11.0, 4.0]]), Boxes([[0, 0, 10, 20]])
    )
    assert distance.tolist() == [[[3, 4, 7, 16]], [[11, 4, -1, 16]]]
    assert pairwise_point_box_distance(torch.empty(0, 2), Boxes(random_boxes(3))).shape == (0, 3, 4)


def test_own_boxes_are_joined_with_plain_ones():
    class Own(Boxes):
        """Boxes that count the last pixel."""

    a, b = random_boxes(2, seed=1), random_boxes(3, seed=2)
    joined = Own.cat([Own(a), Boxes(b)])
    assert type(joined) is Own
    assert torch.equal(joined.tensor, torch.cat([a, b]))
