"""From the coordinates of the network's input to those of the picture that the user sees."""

import torch.nn.functional as F
from torch import Tensor

from detkit.structures import Instances


def detector_postprocess(results: Instances, output_height: int, output_width: int) -> Instances:
    """Rescale what was found in a resized image to another size of the same image.

    Args:
        results: Instances in the coordinates of their `image_size`, with `pred_boxes` or `proposal_boxes`. Not changed.
        output_height: Wanted height, in pixels.
        output_width: Wanted width, in pixels.

    Returns:
        Instances of the wanted size. Boxes are clipped to it, and those that are empty then are gone.
    """
    height, width = results.image_size
    rescaled = Instances((output_height, output_width), **results.get_fields())
    name = "pred_boxes" if rescaled.has("pred_boxes") else "proposal_boxes"
    boxes = rescaled.get(name).clone()
    boxes.scale(output_width / width, output_height / height)
    boxes.clip(rescaled.image_size)
    rescaled.set(name, boxes)
    return rescaled[boxes.nonempty()]


def sem_seg_postprocess(result: Tensor, img_size: tuple[int, int], output_height: int, output_width: int) -> Tensor:
    """Rescale scores per pixel of a padded image to another size of the same image.

    Args:
        result: (K, H, W) scores, padding included.
        img_size: (height, width) without the padding.
        output_height: Wanted height, in pixels.
        output_width: Wanted width, in pixels.

    Returns:
        (K, output_height, output_width) scores.
    """
    without_padding = result[None, :, : img_size[0], : img_size[1]]
    return F.interpolate(
        without_padding, size=(output_height, output_width), mode="bilinear", align_corners=False
    ).squeeze(0)
