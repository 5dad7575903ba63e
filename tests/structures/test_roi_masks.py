import pytest
import torch

from detkit.structures import BitMasks, Boxes, Instances, ROIMasks, paste_masks_in_image


def random_masks(count):
    return torch.rand(count, 6, 6, generator=torch.Generator().manual_seed(0))


def test_bitmasks_are_pasted_masks():
    masks, boxes = random_masks(2), Boxes([[1, 2, 9, 8], [0, 0, 5, 7]])
    pasted = paste_masks_in_image(masks, boxes, (10, 12), 0.4)
    bitmasks = ROIMasks(masks).to_bitmasks(boxes, 10, 12, 0.4)
    assert isinstance(bitmasks, BitMasks)
    assert torch.equal(bitmasks.tensor, pasted)
    assert torch.equal(
        BitMasks.from_roi_masks(ROIMasks(masks), boxes.tensor, 10, 12, 0.4).tensor, pasted
    )


def test_indexing_and_joining():
    masks = ROIMasks(random_masks(3))
    assert torch.equal(masks[1].tensor, masks.tensor[1:2])
    assert torch.equal(masks[torch.tensor([True, False, True])].tensor, masks.tensor[[0, 2]])
    instances = Instances((10, 12), pred_masks=masks)
    joined = Instances.cat([instances[1:], instances.to("cpu")]).pred_masks
    assert torch.equal(joined.tensor, masks.tensor[[1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match="at least one ROIMasks"):
        ROIMasks.cat([])


def test_other_shapes_are_an_error():
    with pytest.raises(
        ValueError, match=r"masks of regions are \(M, h, w\): got shape \(2, 1, 6, 6\)"
    ):
        ROIMasks(torch.zeros(2, 1, 6, 6))
