"""Tests of detkit.modeling.anchor_generator."""

import sys

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from detkit.config import get_cfg
from detkit.layers import ShapeSpec
from detkit.modeling import anchors_per_level, build_model
from detkit.modeling.anchor_generator import (
    ANCHOR_GENERATOR_REGISTRY,
    BufferList,
    DefaultAnchorGenerator,
    RotatedAnchorGenerator,
    anchor_grid,
    build_anchor_generator,
    generate_cell_anchors,
)
from detkit.structures import RotatedBoxes
from detkit.utils.errors import ContractError
from tests.helpers import slow_anchors


def feature(height, width):
    return torch.empty(1, 2, height, width)


def make(sizes=((32, 64),), aspect_ratios=((0.5, 1.0, 2.0),), strides=(4, 8), offset=0.0):
    return DefaultAnchorGenerator(
        sizes=sizes, aspect_ratios=aspect_ratios, strides=strides, offset=offset
    )


@pytest.mark.parametrize("offset", [0.0, 0.5], ids=["corner", "centre"])
def test_anchors_are_those_of_the_slow_reference(offset):
    generator = make(sizes=[[32, 64], [100]], aspect_ratios=[[0.5, 1.0, 2.0], [0.3]], offset=offset)
    anchors = generator([feature(3, 5), feature(2, 1)])
    expected = [
        slow_anchors([32, 64], [0.5, 1.0, 2.0], stride=4, offset=offset, grid_size=(3, 5)),
        slow_anchors([100], [0.3], stride=8, offset=offset, grid_size=(2, 1)),
    ]
    for boxes, reference in zip(anchors, expected, strict=True):
        torch.testing.assert_close(boxes.tensor, reference)


def test_cell_anchors_by_hand():
    expected = [[-8.0, -8, 8, 8], [-4, -16, 4, 16], [-16, -16, 16, 16], [-8, -32, 8, 32]]
    torch.testing.assert_close(generate_cell_anchors([16, 32], [1.0, 4.0]), torch.tensor(expected))


def test_plain_numbers_serve_every_level():
    nested, plain = make(), make(sizes=(32, 64), aspect_ratios=(0.5, 1.0, 2.0))
    for a, b in zip(nested.cell_anchors, plain.cell_anchors, strict=True):
        torch.testing.assert_close(a, b)


class _Shifted(DefaultAnchorGenerator):
    """Lays anchors out in its own way, different each time."""

    calls = 0

    def _grid_anchors(self, grid_sizes):
        self.calls += 1
        return [anchors + self.calls for anchors in super()._grid_anchors(grid_sizes)]


def test_overridden_grid_is_asked_each_time():
    own = _Shifted(sizes=[[32]], aspect_ratios=[[1.0]], strides=[4])
    features = [feature(2, 2)]
    plain = make(sizes=[[32]], aspect_ratios=[[1.0]], strides=[4], offset=0.5)(features)[0].tensor
    for shift in (1, 2):
        torch.testing.assert_close(own(features)[0].tensor, plain + shift)


class _Doubled(DefaultAnchorGenerator):
    def _calculate_anchors(self, sizes, aspect_ratios):
        levels = zip(sizes, aspect_ratios, strict=True)
        return BufferList(2 * self.generate_cell_anchors(*level) for level in levels)


class _Turned(RotatedAnchorGenerator):
    def _calculate_anchors(self, sizes, aspect_ratios, angles):
        quarter = torch.tensor([0.0, 0, 0, 0, 90])
        levels = zip(sizes, aspect_ratios, angles, strict=True)
        return [self.generate_cell_anchors(*level) + quarter for level in levels]


def test_overridden_anchors_of_a_cell_are_those_that_are_laid_out():
    doubled = _Doubled(sizes=[[32]], aspect_ratios=[[1.0]], strides=[4, 8])
    assert [x.tolist() for x in doubled.cell_anchors] == [[[-32.0, -32, 32, 32]]] * 2
    turned = _Turned(sizes=[[32]], aspect_ratios=[[1.0]], angles=[[0, 30]], strides=[4])
    assert turned.cell_anchors[0][:, 4].tolist() == [90, 120]


def test_cell_anchors_have_detectron2s_defaults():
    assert make().generate_cell_anchors().shape == (15, 4)
    rotated = RotatedAnchorGenerator(
        sizes=[[32]], aspect_ratios=[[1.0]], angles=[[0]], strides=[4]
    ).generate_cell_anchors()
    assert rotated.shape == (105, 5)
    assert rotated[:7, 4].tolist() == [-90, -60, -30, 0, 30, 60, 90]


def test_num_anchors_counts_sizes_times_ratios_per_level():
    generator = make(sizes=[[32, 64], [100]], aspect_ratios=[[0.5, 1.0, 2.0]])
    assert generator.num_anchors == generator.num_cell_anchors == [6, 3]
    assert generator.box_dim == 4


def test_empty_map_has_no_anchors():
    anchors = make()([feature(0, 3), feature(1, 1)])
    assert [len(boxes) for boxes in anchors] == [0, 6]


def test_anchors_are_not_in_the_state_dict():
    assert make().state_dict() == {}


def test_anchors_of_a_size_are_made_once():
    generator = make()
    first = generator([feature(3, 5), feature(2, 3)])
    again = generator([feature(3, 5), feature(2, 3)])
    other = generator([feature(5, 3), feature(3, 2)])
    assert first[0].tensor is again[0].tensor
    assert first[0].tensor is not other[0].tensor


def test_clipping_given_anchors_leaves_the_cached_ones():
    generator = make()
    generator([feature(3, 5), feature(2, 3)])[0].clip((4, 4))
    assert generator([feature(3, 5), feature(2, 3)])[0].tensor.min() < 0


def test_number_of_cached_sizes_is_bounded():
    generator = make()
    for width in range(1, 40):
        generator([feature(1, width), feature(1, 1)])
    assert len(generator._cache) <= 16


def test_least_recent_size_is_the_one_given_up():
    generator = make()
    sizes = [[feature(1, width), feature(1, 1)] for width in range(1, 18)]
    kept = generator(sizes[0])[0].tensor
    for size in sizes[1:16]:
        generator(size)
    generator(sizes[0])
    generator(sizes[16])
    assert generator(sizes[0])[0].tensor is kept


def test_threads_may_share_a_generator():
    # Between any two lines of one call, others come for more sizes than are kept.
    generator, forward = make(), DefaultAnchorGenerator.forward.__code__
    others = [[feature(1, width), feature(1, 1)] for width in range(1, 19)]
    lines = 0

    def interfere(frame, event, _):
        nonlocal lines
        if frame.f_code is not forward:
            return None
        if event == "line":
            lines += 1
            sys.settrace(None)
            for size in others:
                generator(size)
            sys.settrace(interfere)
        return interfere

    size = [feature(3, 5), feature(2, 3)]
    expected = make()(size)[0].tensor
    before = sys.gettrace()
    sys.settrace(interfere)
    try:
        found = generator(size)
    finally:
        sys.settrace(before)
    assert lines > 5
    assert torch.equal(found[0].tensor, expected)


def test_rows_and_columns_may_have_strides_of_their_own():
    grid = anchor_grid(torch.tensor([[-1.0, -2, 1, 2]]), (2, 3), (10, 100), 0.5)
    centres = (grid[:, :2] + grid[:, 2:]) / 2
    assert centres.tolist() == [[50, 5], [150, 5], [250, 5], [50, 15], [150, 15], [250, 15]]


def test_anchors_made_in_inference_mode_take_part_in_training():
    generator = make()
    with torch.inference_mode():
        generator([feature(3, 5), feature(2, 3)])
    anchors = generator([feature(3, 5), feature(2, 3)])[0].tensor
    scale = torch.ones(1, requires_grad=True)
    (anchors * scale).sum().backward()
    torch.testing.assert_close(scale.grad, anchors.sum()[None])


def test_anchors_follow_the_device_of_the_module():
    assert make().to("meta")([feature(3, 5), feature(2, 3)])[0].device.type == "meta"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            {"sizes": [[32], [64], [128]]},
            "sizes must be .*each of the 2 .*got 3",
            id="levels",
        ),
        pytest.param({"sizes": []}, "sizes must be .*got 0 lists", id="no-sizes"),
        pytest.param(
            {"aspect_ratios": [[]]}, "aspect_ratios must have positive numbers", id="no-ratios"
        ),
        pytest.param(
            {"aspect_ratios": [[-1.0]]},
            "aspect_ratios must have positive numbers",
            id="negative-ratio",
        ),
        pytest.param({"offset": 1.0}, r"offset must be in \[0, 1\), got 1.0", id="offset"),
    ],
)
def test_bad_settings_name_the_argument(arguments, message):
    with pytest.raises(ContractError, match=message):
        make(**arguments)


def test_wrong_number_of_features_is_an_error():
    with pytest.raises(ValueError, match="laid out for 2 feature levels, got 1"):
        make()([feature(2, 2)])


def test_build_takes_everything_from_the_config():
    cfg = get_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32]]
    generator = build_anchor_generator(cfg, [ShapeSpec(stride=4), ShapeSpec(stride=8)])
    assert generator.num_anchors == [3, 3]
    assert generator.strides == [4, 8]


def test_unknown_generator_offers_a_near_miss():
    cfg = get_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "DefaultAnchorGenerater"
    with pytest.raises(KeyError, match="Did you mean 'DefaultAnchorGenerator'"):
        build_anchor_generator(cfg, [ShapeSpec(stride=4)])
    assert "DefaultAnchorGenerator" in ANCHOR_GENERATOR_REGISTRY


RATIOS = [[0.5, 1.0, 2.0]]


@pytest.mark.parametrize(
    ("sizes", "strides", "image_size"),
    [
        pytest.param([[32], [64], [128], [256], [512]], [4, 8, 16, 32, 64], (64, 128), id="even"),
        pytest.param(
            [[32], [64], [128], [256], [512]], [4, 8, 16, 32, 64], (96, 160), id="p6-is-rounded-up"
        ),
        pytest.param(
            [[32, 40, 50], [64, 80, 101], [128, 161, 203]],
            [8, 16, 32],
            (96, 64),
            id="several-sizes",
        ),
        pytest.param([[33, 35]], [16], (32, 48), id="corners-halfway-between-pixels"),
    ],
)
def test_anchors_are_torchvisions(sizes, strides, image_size):
    cfg = get_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "TorchvisionAnchorGenerator"
    cfg.MODEL.ANCHOR_GENERATOR.SIZES, cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = sizes, RATIOS
    ours = build_anchor_generator(cfg, [ShapeSpec(stride=stride) for stride in strides])
    features = [torch.zeros(2, 1, -(-image_size[0] // s), -(-image_size[1] // s)) for s in strides]
    images = ImageList(torch.zeros(2, 3, *image_size), [image_size] * 2)
    wanted = AnchorGenerator(tuple(map(tuple, sizes)), tuple(map(tuple, RATIOS * len(sizes))))(
        images, features
    )
    assert torch.equal(torch.cat([boxes.tensor for boxes in ours(features)]), wanted[0])
    assert ours.num_anchors == [3 * len(sizes_i) for sizes_i in sizes]


def test_rotated_anchors_are_sizes_times_ratios_times_angles():
    cfg = get_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "RotatedAnchorGenerator"
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32, 64]]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.25, 1]]
    cfg.MODEL.ANCHOR_GENERATOR.ANGLES = [0, 45]
    generator = build_anchor_generator(cfg, [ShapeSpec(stride=4)])
    assert generator.num_anchors == [8]
    assert generator.box_dim == 5
    (anchors,) = generator([feature(1, 2)])
    assert type(anchors) is RotatedBoxes
    cell = [[64, 16, 0], [64, 16, 45], [32, 32, 0], [32, 32, 45]]
    cell += [[128, 32, 0], [128, 32, 45], [64, 64, 0], [64, 64, 45]]
    expected = [[x, 0, *anchor] for x in (0, 4) for anchor in cell]
    torch.testing.assert_close(anchors.tensor, torch.tensor(expected).float())


def test_rotated_anchors_around_an_upright_one_are_that_anchor():
    settings = {"sizes": [[16], [40]], "aspect_ratios": [[0.5, 3.0]], "strides": (4, 8)}
    upright = make(**settings, offset=0.5)([feature(3, 4), feature(2, 2)])
    generator = RotatedAnchorGenerator(**settings, offset=0.5, angles=[[0], [-180]])
    for boxes, rotated in zip(upright, generator([feature(3, 4), feature(2, 2)]), strict=True):
        torch.testing.assert_close(rotated.upright().tensor, boxes.tensor)


def test_angles_of_another_number_of_levels_are_an_error():
    with pytest.raises(
        ValueError, match="angles must be one list for all, or one for each of the 2"
    ):
        RotatedAnchorGenerator(
            sizes=[[16]], aspect_ratios=[[1.0]], strides=(4, 8), angles=[[0], [1], [2]]
        )


@pytest.mark.parametrize(
    ("name", "strides"),
    [
        pytest.param("faster_rcnn", [4, 8, 16, 32, 64], id="Faster R-CNN"),
        pytest.param("fcos", [], id="FCOS has cells alone"),
        pytest.param("rotated_faster_rcnn", [], id="rotated"),
    ],
)
def test_anchors_per_level_are_those_that_are_matched_with_objects(name, strides):
    cfg = get_cfg()
    cfg.merge_from_file(f"detkit://quick_start/{name}_R_18_FPN_shapes.yaml")
    cfg.MODEL.DEVICE = "cpu"
    levels = anchors_per_level(build_model(cfg))
    assert [stride for stride, _, _ in levels] == strides
    ratios = len(cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS[0])
    for _, offset, cells in levels:
        assert offset == cfg.MODEL.ANCHOR_GENERATOR.OFFSET
        assert cells.shape == (ratios, 4)
