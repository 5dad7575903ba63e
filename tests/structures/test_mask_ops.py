import numpy as np
import pytest
import torch

from detkit.structures import Boxes, mask_ops, paste_masks_in_image
from detkit.structures.mask_ops import _do_paste_mask, pad_masks, scale_boxes
from tests.helpers import slow_paste_mask

BOXES = torch.tensor(
    [
        [3.2, 4.7, 20.1, 17.4],
        [-8.0, -3.0, 7.5, 9.0],  # beyond the image's corner
        [10.0, 10.0, 11.0, 12.0],  # smaller than the mask
        [0.0, 0.0, 30.0, 25.0],
        [40.0, 40.0, 50.0, 50.0],  # beyond the image
    ]
)


def random_masks(count, seed=0, size=(7, 7)):
    return torch.rand(count, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(7, 7), (4, 9)], ids=str)
def test_pasted_probabilities_equal_the_slow_reference(size):
    masks = random_masks(len(BOXES), size=size)
    pasted = paste_masks_in_image(masks, BOXES, (25, 30), threshold=-1)
    assert pasted.dtype == torch.uint8
    expected = [
        slow_paste_mask(mask, box, 25, 30) * 255
        for mask, box in zip(masks, BOXES.tolist(), strict=True)
    ]
    assert np.abs(pasted.numpy().astype(float) - np.floor(expected)).max() <= 1
    assert pasted[3].float().mean() > 100


def test_threshold_belongs_to_the_mask():
    masks = torch.tensor([0.5, 0.49]).reshape(2, 1, 1).expand(2, 4, 4)
    pasted = paste_masks_in_image(masks, Boxes([[2, 1, 6, 5]] * 2), (8, 9))
    assert pasted.dtype == torch.bool
    assert pasted.sum(dim=(1, 2)).tolist() == [16, 0]
    whole = paste_masks_in_image(torch.ones(1, 4, 4), Boxes([[2, 1, 6, 5]]), (8, 9))
    assert whole.nonzero()[:, 1:].tolist() == [[r, c] for r in range(1, 5) for c in range(2, 6)]


def test_all_in_chunks_is_each_within_its_box(monkeypatch):
    """What a GPU does is what a CPU does."""
    monkeypatch.setattr(mask_ops, "_MAX_PIXELS", 2 * 25 * 30)
    masks = random_masks(len(BOXES))
    for threshold in (0.5, 0.0, 0.1, -1):
        expected = paste_masks_in_image(masks, BOXES, (25, 30), threshold)
        pasted = torch.zeros_like(expected)
        mask_ops._paste_in_chunks(pasted, masks, BOXES, threshold)
        assert (pasted.int() - expected.int()).abs().max() <= (1 if threshold < 0 else 0)
        assert expected.any()


def test_flipping_mask_and_box_flips_the_result():
    masks, box = random_masks(1, seed=3), torch.tensor([[3.0, 4.0, 21.5, 19.25]])
    flipped_box = torch.tensor([[30 - 21.5, 4.0, 30 - 3.0, 19.25]])
    pasted = paste_masks_in_image(masks, box, (25, 30))
    assert pasted.any()
    assert torch.equal(paste_masks_in_image(masks.flip(2), flipped_box, (25, 30)), pasted.flip(2))


def test_no_masks_and_degenerate_boxes_paint_nothing():
    assert paste_masks_in_image(torch.empty(0, 28, 28), Boxes([]), (5, 6)).shape == (0, 5, 6)
    degenerate = Boxes([[2, 2, 2, 4], [2.5, 2.5, 2.5, 2.5], [4, 4, 2, 2]])
    for paste in (mask_ops._paste_within_boxes, mask_ops._paste_in_chunks):
        painted = torch.zeros(3, 5, 6, dtype=torch.bool)
        paste(painted, torch.ones(3, 4, 4), degenerate.tensor, 0.5)
        assert not painted.any()


def test_masks_in_half_precision_are_pasted_in_full():
    masks = random_masks(2).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pasted = paste_masks_in_image(masks, BOXES[:2], (25, 30))
    assert torch.equal(pasted, paste_masks_in_image(masks.float(), BOXES[:2], (25, 30)))


def test_masks_without_a_box_each_are_an_error():
    with pytest.raises(
        ValueError, match=r"need a mask \(h, w\) per box: got masks \(2, 7, 7\) and 1 boxes"
    ):
        paste_masks_in_image(random_masks(2), BOXES[:1], (5, 5))


def test_box_without_area_paints_nothing_even_on_the_center_of_a_pixel():
    # Few cells: the scale of a box without width, cells by the smallest float, is finite then.
    box = torch.tensor([[2.5, 2.5, 2.5, 2.5], [2.5, 1.0, 2.5, 4.0]])
    assert not paste_masks_in_image(torch.ones(2, 2, 2), box, (6, 6), 0.5).any()


def test_border_and_larger_boxes_belong_together():
    masks, scale = pad_masks(torch.ones(2, 4, 4), 1)
    assert masks.shape == (2, 6, 6)
    assert masks[:, 0].sum() == 0
    assert scale == 1.5
    assert scale_boxes(torch.tensor([[0.0, 0, 4, 8]]), 1.5).tolist() == [[-1, -2, 5, 10]]


def test_part_of_the_image_that_holds_all_boxes_is_cut_out_of_the_whole():
    masks, boxes = random_masks(3), BOXES[:3]
    whole, everywhere = _do_paste_mask(masks[:, None], boxes, 25, 30, skip_empty=False)
    assert everywhere == ()
    expected = np.array(
        [
            slow_paste_mask(mask, box, 25, 30)
            for mask, box in zip(masks, boxes.tolist(), strict=True)
        ]
    )
    assert whole.numpy() == pytest.approx(expected, abs=1e-5)
    part, (rows, columns) = _do_paste_mask(masks[:1, None].half(), boxes[:1], 25, 30)
    assert (rows, columns) == (slice(3, 19), slice(2, 22))
    assert part.numpy() == pytest.approx(expected[:1][:, rows, columns], abs=1e-3)
    assert whole[0].sum() == pytest.approx(whole[0, rows, columns].sum())


def test_part_of_the_image_is_empty_where_boxes_are_beyond_it():
    part, where = _do_paste_mask(random_masks(1)[:, None], BOXES[4:], 25, 30)
    assert part.numel() == torch.zeros(1, 25, 30)[(slice(None), *where)].numel() == 0
    part, where = _do_paste_mask(torch.zeros(0, 1, 7, 7), torch.zeros(0, 4), 25, 30)
    assert part.shape == (0, 25, 30)
