"""Views of an image: it is resized and mirrored, and boxes are taken into a view and out of it.

Legend: M detections of one image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detkit.config import CfgNode, configurable
from detkit.structures import Boxes, Instances, ModelInput


@dataclass(frozen=True)
class View:
    """One way to see an image: in a size, and mirrored or not. Sizes are (height, width) in pixels."""

    size: tuple[int, int]
    is_mirrored: bool

    def image(self, image: Tensor) -> Tensor:
        """Return a (C, H, W) image as this view shows it, in its dtype."""
        if image.shape[1:] != self.size:
            resized = F.interpolate(
                image[None].float(), self.size, mode="bilinear", antialias=True
            )[0]
            # Bytes again, as a resized image from the data loader has them.
            image = (
                resized
                if image.is_floating_point()
                else resized.round().clamp(0, 255).to(image.dtype)
            )
        return image.flip(2) if self.is_mirrored else image

    def boxes_into(self, boxes: Tensor, from_size: tuple[int, int]) -> Tensor:
        """Return (M, 4) boxes of an image of another size in the coordinates of this view."""
        return self._mirrored(_scaled(boxes, from_size, self.size))

    def boxes_out(self, boxes: Tensor, to_size: tuple[int, int]) -> Tensor:
        """Return (M, 4) boxes of this view in the coordinates of an image of another size."""
        return _scaled(self._mirrored(boxes), self.size, to_size)

    def _mirrored(self, boxes: Tensor) -> Tensor:
        if not self.is_mirrored:
            return boxes
        x1, y1, x2, y2 = boxes.unbind(dim=1)
        width = self.size[1]
        return torch.stack([width - x2, y1, width - x1, y2], dim=1)


def _scaled(boxes: Tensor, from_size: tuple[int, int], to_size: tuple[int, int]) -> Tensor:
    (height, width), (new_height, new_width) = from_size, to_size
    x, y = new_width / width, new_height / height
    return boxes * boxes.new_tensor([x, y, x, y])


class DatasetMapperTTA:
    """Turns one model input into several, one per view."""

    @configurable
    def __init__(self, *, min_sizes: Sequence[int], max_size: int, flip: bool) -> None:
        """Set the views.

        Args:
            min_sizes: Length of the shortest side of each size, in pixels.
            max_size: Longest side, in pixels; wins over `min_sizes`.
            flip: Whether every size is also seen mirrored.

        Raises:
            ValueError: There is no size.
        """
        if not min_sizes:
            raise ValueError("TEST.AUG.MIN_SIZES needs at least one size, got none")
        self.min_sizes = list(min_sizes)
        self.max_size = max_size
        self.flip = flip

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Map config keys to arguments."""
        return {
            "min_sizes": cfg.TEST.AUG.MIN_SIZES,
            "max_size": cfg.TEST.AUG.MAX_SIZE,
            "flip": cfg.TEST.AUG.FLIP,
        }

    def __call__(self, model_input: ModelInput) -> list[tuple[ModelInput, View]]:
        """Return the views of an input, each with what it shows: `image`, and `proposals` where
        there are any.
        """
        height, width = model_input["image"].shape[1:]
        views = []
        for min_size in self.min_sizes:
            size = _resized((height, width), min_size, self.max_size)
            views += [
                View(size, is_mirrored) for is_mirrored in ([False, True] if self.flip else [False])
            ]
        return [(_seen(model_input, view), view) for view in views]


def _resized(size: tuple[int, int], min_size: int, max_size: int) -> tuple[int, int]:
    """Return the (height, width) of an image resized to a shortest side, rounded as Detectron2
    does.
    """
    height, width = size
    scale = min_size / min(height, width)
    new = (min_size, scale * width) if height < width else (scale * height, min_size)
    shrink = min(1.0, max_size / max(new))
    return max(1, int(new[0] * shrink + 0.5)), max(1, int(new[1] * shrink + 0.5))


def _seen(model_input: ModelInput, view: View) -> ModelInput:
    image = model_input["image"]
    seen: ModelInput = {"image": view.image(image)}
    if "proposals" in model_input:
        proposals = model_input["proposals"]
        fields = proposals.get_fields()
        boxes = view.boxes_into(proposals.proposal_boxes.tensor, (image.shape[1], image.shape[2]))
        seen["proposals"] = Instances(view.size, **{**fields, "proposal_boxes": Boxes(boxes)})
    return seen
