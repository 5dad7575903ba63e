import math

import numpy as np
import pytest
import torch

from detkit.structures import BoxMode
from tests.helpers import random_boxes


def test_modes_have_the_integers_that_files_store():
    assert [mode.value for mode in BoxMode] == [0, 1, 2, 3, 4]
    assert BoxMode.XYXY_ABS == 0
    assert BoxMode.XYWH_ABS == 1
    assert BoxMode.XYWHA_ABS == 4


@pytest.mark.parametrize(
    ("box", "from_mode", "to_mode", "expected"),
    [
        pytest.param(
            [5, 6, 10, 20], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS, [5, 6, 15, 26], id="xywh to xyxy"
        ),
        pytest.param(
            [5, 6, 15, 26], BoxMode.XYXY_ABS, BoxMode.XYWH_ABS, [5, 6, 10, 20], id="xyxy to xywh"
        ),
        pytest.param(
            [5, 6, 10, 21],
            BoxMode.XYWH_ABS,
            BoxMode.XYWHA_ABS,
            [10, 16.5, 10, 21, 0],
            id="xywh to xywha",
        ),
        pytest.param(
            [50, 50, 30, 20, 0], BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS, [35, 40, 65, 60], id="upright"
        ),
        pytest.param(
            [50, 50, 30, 20, 90],
            BoxMode.XYWHA_ABS,
            BoxMode.XYXY_ABS,
            [40, 35, 60, 65],
            id="quarter turn",
        ),
        pytest.param(
            [50, 50, 30, 20, -180],
            BoxMode.XYWHA_ABS,
            BoxMode.XYXY_ABS,
            [35, 40, 65, 60],
            id="half turn",
        ),
    ],
)
def test_convert_gives_the_box_worked_by_hand(box, from_mode, to_mode, expected):
    assert BoxMode.convert(box, from_mode, to_mode) == pytest.approx(expected)


def test_box_around_a_square_turned_by_45_degrees_is_wider_by_root_two():
    x1, y1, x2, y2 = BoxMode.convert(
        [0.0, 0.0, 2.0, 2.0, 45.0], BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS
    )
    assert (x1, y1, x2, y2) == pytest.approx(
        (-math.sqrt(2), -math.sqrt(2), math.sqrt(2), math.sqrt(2))
    )


@pytest.mark.parametrize(
    "container",
    [
        pytest.param(list, id="list"),
        pytest.param(tuple, id="tuple"),
        pytest.param(np.array, id="ndarray"),
        pytest.param(torch.tensor, id="tensor"),
    ],
)
def test_convert_gives_the_container_it_was_given(container):
    box = container([1.5, 2.0, 3.0, 4.0])
    converted = BoxMode.convert(box, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    assert type(converted) is type(box)
    assert list(converted) == [1.5, 2.0, 4.5, 6.0]
    assert list(box) == [1.5, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (7, 4), (2, 3, 4)])
def test_converting_there_and_back_is_identity(shape):
    boxes = random_boxes(math.prod(shape[:-1])).reshape(shape)
    xywh = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    assert xywh.shape == shape
    torch.testing.assert_close(BoxMode.convert(xywh, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS), boxes)


def test_python_floats_keep_their_precision():
    assert BoxMode.convert([0.1, 0.2, 0.3, 0.4], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)[:2] == [
        0.1,
        0.2,
    ]


def test_whole_numbers_stay_whole():
    converted = BoxMode.convert([1, 2, 3, 4], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    assert all(isinstance(value, int) for value in converted)


def test_modes_may_be_the_integers_of_a_json_file():
    assert BoxMode.convert([1, 2, 3, 4], 1, 0) == [1, 2, 4, 6]


def test_equal_modes_give_the_input_itself():
    box = [1, 2, 3, 4]
    assert BoxMode.convert(box, BoxMode.XYWH_REL, BoxMode.XYWH_REL) is box


def test_missing_conversion_is_of_detectron2s_kinds():
    for kind in (NotImplementedError, AssertionError):
        with pytest.raises(kind, match="no conversion from XYXY_ABS to XYWHA_ABS"):
            BoxMode.convert([1, 2, 3, 4], BoxMode.XYXY_ABS, BoxMode.XYWHA_ABS)


def test_relative_mode_is_an_error_that_lists_the_conversions():
    with pytest.raises(
        ValueError, match="no conversion from XYXY_REL to XYXY_ABS; there are: XYWH_ABS to XYXY_ABS"
    ):
        BoxMode.convert([0, 0, 1, 1], BoxMode.XYXY_REL, BoxMode.XYXY_ABS)


@pytest.mark.parametrize("box", [[1, 2, 3], [1, 2, 3, 4, 5]])
def test_wrong_number_of_coordinates_is_an_error(box):
    with pytest.raises(
        ValueError, match=r"a box in mode XYWH_ABS has 4 numbers: got shape \(\d,\)"
    ):
        BoxMode.convert(box, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
