"""The resize of torchvision's detectors, for weights that were trained behind it.

It differs in three ways, which move boxes by up to a pixel: pixels become floating-point numbers,
nothing is antialiased when an image gets smaller, and sides are rounded down.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from detkit.data.transforms.geometry import ResizeShortestEdge, ResizeTransform
from detkit.data.transforms.transform import NoOpTransform, Transform


class TorchvisionResizeTransform(ResizeTransform):
    """Scales to a new size bilinearly, in float32 and without antialias."""

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Return the resized image as float32; label maps (with `interp`) as `ResizeTransform` does.

        Raises:
            ValueError: The image does not have the size that was announced.
        """
        if (
            interp is not None
            or img.shape[:2] != (self.h, self.w)
            or img.shape[:2] == (self.new_h, self.new_w)
        ):
            return super().apply_image(img, interp)
        pixels = torch.from_numpy(np.array(img, dtype=np.float32, order="C"))
        planes = (pixels[:, :, None] if img.ndim == 2 else pixels).permute(2, 0, 1)[None]
        size = (self.new_h, self.new_w)
        resized = (
            F.interpolate(planes, size=size, mode="bilinear", align_corners=False)[0]
            .permute(1, 2, 0)
            .numpy()
        )
        return resized[:, :, 0] if img.ndim == 2 else resized


class TorchvisionResizeShortestEdge(ResizeShortestEdge):
    """As `ResizeShortestEdge`, with torchvision's rounding and arithmetic."""

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw a length."""
        height, width = image.shape[:2]
        length = self._draw()
        if length == 0:
            return NoOpTransform()
        new_height, new_width = self.get_output_shape(height, width, length, self.max_size)
        return TorchvisionResizeTransform(height, width, new_height, new_width)

    @staticmethod
    def get_output_shape(
        oldh: int, oldw: int, short_edge_length: int, max_size: int
    ) -> tuple[int, int]:
        """Return the `(height, width)` that an image of `(oldh, oldw)` is resized to."""
        scale = min(short_edge_length / min(oldh, oldw), max_size / max(oldh, oldw))
        return max(1, math.floor(oldh * scale)), max(1, math.floor(oldw * scale))
