"""From the coordinates of the network's input to those of the original image.

Legend: M objects in one image, K classes or keypoints, S cells of a mask along a side, H x W
    pixels.
"""

import torch.nn.functional as F
from torch import Tensor

from detkit.layers import nonzero_tuple
from detkit.structures import Boxes, Instances, ROIMasks


def detector_postprocess(
    results: Instances, output_height: int, output_width: int, mask_threshold: float = 0.5
) -> Instances:
    """Rescale detections from a resized image to another size of the same image.

    Args:
        results: Instances in the coordinates of their `image_size`, with `pred_boxes` or
            `proposal_boxes`; maybe with `pred_masks`, (M, 1, S, S) probabilities or `ROIMasks`, and
            `pred_keypoints` (M, K, 3). Not changed.
        output_height: In pixels.
        output_width: In pixels.
        mask_threshold: Probability from which a pixel belongs to the object.

    Returns:
        Instances of the output size. Boxes are clipped to it, and empty ones are dropped. Masks
        cover the image: (M, output_height, output_width) bool.
    """
    height, width = results.image_size
    scale_x, scale_y = output_width / width, output_height / height
    rescaled = Instances((output_height, output_width), **results.get_fields())
    name = "pred_boxes" if rescaled.has("pred_boxes") else "proposal_boxes"
    boxes: Boxes = rescaled.get(name).clone()
    boxes.scale(scale_x, scale_y)
    boxes.clip(rescaled.image_size)
    # Empty boxes are dropped first, so that masks are painted for the others only.
    rescaled.set(name, boxes)
    # By indices: a mask would be searched, and waited for, at each of the fields.
    rescaled = rescaled[nonzero_tuple(boxes.nonempty())[0]]
    if rescaled.has("pred_masks"):
        masks = rescaled.pred_masks
        roi_masks = masks if isinstance(masks, ROIMasks) else ROIMasks(masks[:, 0])
        bitmasks = roi_masks.to_bitmasks(
            rescaled.get(name), output_height, output_width, mask_threshold
        )
        rescaled.pred_masks = bitmasks.tensor
    if rescaled.has("pred_keypoints"):
        keypoints = rescaled.pred_keypoints.clone()
        keypoints[:, :, 0] *= scale_x
        keypoints[:, :, 1] *= scale_y
        rescaled.pred_keypoints = keypoints
    return rescaled


def sem_seg_postprocess(
    result: Tensor, img_size: tuple[int, int], output_height: int, output_width: int
) -> Tensor:
    """Resize the scores of a padded image to another size of the same image.

    Args:
        result: (K, H, W) logits or probabilities, with the padding of the batch at the right and
            the bottom.
        img_size: `(height, width)` of the image within.
        output_height: In pixels.
        output_width: In pixels.

    Returns:
        (K, output_height, output_width), interpolated bilinearly.
    """
    # The padding is cut off before the scores are resized, so that it does not bleed in.
    image = result[None, :, : img_size[0], : img_size[1]]
    return F.interpolate(
        image, size=(output_height, output_width), mode="bilinear", align_corners=False
    )[0]
