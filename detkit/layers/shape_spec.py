"""What one part of a model needs to know about the feature maps of another."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ShapeSpec:
    """The shape of a feature map, as far as it is known before there is an input."""

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None
    """Pixels of the input image per step on the feature map."""
