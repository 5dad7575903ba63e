import numpy as np
import pytest
import torch

from detkit.structures import Instances, Keypoints, heatmaps_to_keypoints
from detkit.structures import keypoints as keypoints_module
from tests.helpers import slow_bicubic_resize, slow_keypoint_cell


def random_keypoints(count, seed=0, size=100.0):
    generator = torch.Generator().manual_seed(seed)
    xy = torch.rand(count, 5, 2, generator=generator) * size
    visibility = torch.randint(0, 3, (count, 5, 1), generator=generator)
    return torch.cat([xy, visibility], dim=2)


def test_keypoints_become_float32():
    points = random_keypoints(2)
    assert Keypoints(points).tensor is points
    assert Keypoints(points.double().numpy()).tensor.dtype == torch.float32
    assert Keypoints([[[1, 2, 2]]]).tensor.tolist() == [[[1, 2, 2]]]


@pytest.mark.parametrize("shape", [(0,), (4, 3), (2, 5, 2)])
def test_other_shapes_are_an_error(shape):
    with pytest.raises(
        ValueError, match=r"keypoints are \(M, K, 3\), x, y and visibility of each: got"
    ):
        Keypoints(torch.zeros(shape))


def test_indexing_iterating_and_joining():
    points = random_keypoints(3)
    keypoints = Keypoints(points)
    assert torch.equal(keypoints[1].tensor, points[1:2])
    assert torch.equal(keypoints[-1].tensor, points[2:])
    assert torch.equal(keypoints[torch.tensor([True, False, True])].tensor, points[[0, 2]])
    assert torch.equal(keypoints[torch.tensor([2, 2])].tensor, points[[2, 2]])
    assert torch.equal(torch.stack(list(keypoints)), points)
    instances = Instances((100, 100), gt_keypoints=keypoints)
    assert torch.equal(
        Instances.cat([instances, instances.to("cpu")[:1]]).gt_keypoints.tensor,
        points[[0, 1, 2, 0]],
    )
    with pytest.raises(ValueError, match="at least one Keypoints"):
        Keypoints.cat([])


def test_heatmap_equals_the_slow_reference():
    points = random_keypoints(40)
    boxes = torch.tensor([[20.0, 30.0, 70.5, 80.25]]).repeat(40, 1)
    points[0, :4, :2] = torch.tensor([[20.0, 30.0], [70.5, 80.25], [70.5, 40.0], [19.9, 40.0]])
    points[0, :4, 2] = 2
    cells, valid = Keypoints(points).to_heatmap(boxes, 56)
    expected = [
        [slow_keypoint_cell(p, box, 56) for p in row]
        for row, box in zip(points.tolist(), boxes.tolist(), strict=True)
    ]
    assert cells.tolist() == [[cell for cell, _ in row] for row in expected]
    assert valid.tolist() == [[int(counts) for _, counts in row] for row in expected]
    assert 10 < valid.sum() < 190


def test_corners_of_the_box_by_hand():
    points = torch.tensor(
        [[[0.0, 0, 2], [10, 10, 1], [10, 0, 2], [5, 10, 2], [10.1, 5, 2], [5, 5, 0], [5, 5, 1]]]
    )
    cells, valid = Keypoints(points).to_heatmap(torch.tensor([[0.0, 0, 10, 10]]), 4)
    assert cells.tolist() == [[0, 15, 3, 14, 0, 0, 10]]
    assert valid.tolist() == [[1, 1, 1, 1, 0, 0, 1]]


def test_heatmap_over_a_box_without_extent_has_no_points_beside_it():
    cells, valid = Keypoints([[[5, 5, 2], [4, 6, 2]]]).to_heatmap(torch.tensor([[5.0, 5, 5, 5]]), 4)
    assert valid.tolist() == [[1, 0]]
    assert cells.tolist() == [[15, 0]]


def test_heatmap_of_nothing_is_nothing():
    cells, valid = Keypoints(torch.empty(0, 17, 3)).to_heatmap(torch.empty(0, 4), 56)
    assert cells.shape == valid.shape == (0, 17)
    assert cells.dtype == valid.dtype == torch.int64


def test_heatmap_without_a_box_each_is_an_error():
    with pytest.raises(
        ValueError, match=r"need a box \(x1, y1, x2, y2\) per object: got \(2, 4\) for 3"
    ):
        Keypoints(random_keypoints(3)).to_heatmap(torch.zeros(2, 4), 4)


def random_maps(count, size=6, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 3


ROIS = torch.tensor([[3.0, 4, 23.5, 17.2], [0.0, 0, 6, 6], [5.0, 5, 5.3, 5.4], [-4.5, 2, 40, 70]])


def test_keypoints_equal_the_slow_reference():
    maps = random_maps(len(ROIS))
    found = heatmaps_to_keypoints(maps, ROIS)
    for map_i, roi, found_i in zip(
        maps.double().numpy(), ROIS.double().tolist(), found, strict=True
    ):
        width, height = max(roi[2] - roi[0], 1), max(roi[3] - roi[1], 1)
        columns, rows = int(np.ceil(np.float32(width))), int(np.ceil(np.float32(height)))
        for values, point in zip(map_i, found_i.tolist(), strict=True):
            enlarged = slow_bicubic_resize(values, rows, columns)
            row, column = np.unravel_index(enlarged.argmax(), enlarged.shape)
            x = roi[0] + (column + 0.5) * width / columns
            y = roi[1] + (row + 0.5) * height / rows
            score = np.exp(enlarged.max()) / np.exp(values).sum()
            assert point == pytest.approx([x, y, enlarged.max(), score], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("limit", "count"),
    [
        pytest.param(0, 4, id="one by one"),
        pytest.param(600, 3, id="some"),
        pytest.param(10**9, 1, id="all"),
    ],
)
def test_regions_enlarged_together_are_those_enlarged_alone(limit, count, monkeypatch):
    """What a GPU does is what a CPU does."""
    maps = random_maps(len(ROIS), seed=5)
    alone = heatmaps_to_keypoints(maps, ROIS)
    sizes = (ROIS[:, 2:] - ROIS[:, :2]).clamp(min=1).ceil().long().tolist()
    groups = list(keypoints_module._groups(sizes, limit))
    assert len(groups) == count
    assert [0] + [end for _, end, *_ in groups] == [start for start, *_ in groups] + [len(ROIS)]
    monkeypatch.setattr(keypoints_module, "_groups", lambda *_: groups)
    torch.testing.assert_close(heatmaps_to_keypoints(maps, ROIS), alone)


def test_a_graph_finds_what_the_model_finds(monkeypatch):
    maps = random_maps(len(ROIS), seed=5)
    expected = heatmaps_to_keypoints(maps, ROIS)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close(heatmaps_to_keypoints(maps, ROIS), expected)
    assert heatmaps_to_keypoints(maps[:0], ROIS[:0]).shape == (0, maps.shape[1], 4)


def test_enlarging_is_that_of_torch():
    maps = random_maps(1, size=56)
    found = heatmaps_to_keypoints(maps, torch.tensor([[0.0, 0, 133, 71]]))[0]
    enlarged = torch.nn.functional.interpolate(
        maps, size=(71, 133), mode="bicubic", align_corners=False
    )[0]
    logit, position = enlarged.flatten(1).max(dim=1)
    torch.testing.assert_close(found[:, 2], logit)
    assert found[:, :2].tolist() == [[p % 133 + 0.5, p // 133 + 0.5] for p in position.tolist()]


def test_best_cell_is_found_where_the_target_was_set():
    """What `to_heatmap` encodes, `heatmaps_to_keypoints` gives back, up to half a cell."""
    points = random_keypoints(6, seed=2, size=60)
    points[..., 2] = 2
    boxes = torch.tensor([[-1.0, -1, 61, 61]]).repeat(6, 1)
    cells, valid = Keypoints(points).to_heatmap(boxes, 56)
    assert valid.all()
    maps = torch.nn.functional.one_hot(cells, 56 * 56).float().reshape(6, 5, 56, 56) * 10
    found = heatmaps_to_keypoints(maps, boxes)
    assert (found[..., :2] - points[..., :2]).abs().max() <= 62 / 56


def test_moving_the_region_moves_the_keypoints():
    maps = random_maps(len(ROIS), seed=1)
    shift = torch.tensor([8.0, -16.0])
    moved = heatmaps_to_keypoints(maps, ROIS + shift.repeat(2))
    still = heatmaps_to_keypoints(maps, ROIS)
    torch.testing.assert_close(moved[..., :2], still[..., :2] + shift)
    torch.testing.assert_close(moved[..., 2:], still[..., 2:])


def test_no_region_has_no_keypoints():
    assert heatmaps_to_keypoints(torch.empty(0, 17, 56, 56), torch.empty(0, 4)).shape == (0, 17, 4)


def test_half_precision_maps_give_positions_in_full_precision():
    maps = random_maps(1).bfloat16()
    found = heatmaps_to_keypoints(maps, ROIS[:1])
    assert found.dtype == torch.float32
    assert torch.equal(found, heatmaps_to_keypoints(maps.float(), ROIS[:1]))
