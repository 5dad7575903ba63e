"""Pixel mean, standard deviation and channel order that follow the backbone, where the config does
not set them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from detkit.config import CfgNode
from detkit.modeling.backbone.build import BACKBONE_REGISTRY

logger = logging.getLogger(__name__)

B = TypeVar("B")

_KEYS = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")


@dataclass(frozen=True)
class PixelSettings:
    """What a network was trained on: mean and standard deviation per channel, on a scale of 0 to
    255, and the order.
    """

    mean: list[float]
    std: list[float]
    format: str = "RGB"

    @classmethod
    def from_unit_range(cls, mean: Sequence[float], std: Sequence[float]) -> PixelSettings:
        """Return the settings for statistics of RGB images on a scale of 0 to 1."""
        # Three decimals: 0.485 * 255 is 123.675, and should read like that in a YAML file.
        return cls(
            [round(255 * value, 3) for value in mean], [round(255 * value, 3) for value in std]
        )

    def in_order(self, image_format: str) -> PixelSettings:
        """Return the same settings for images of another channel order.

        Raises:
            ValueError: The formats differ in more than the order.
        """
        if image_format == self.format:
            return self
        if {image_format, self.format} != {"RGB", "BGR"}:
            raise ValueError(
                f"INPUT.FORMAT {image_format!r} is not what the backbone was made for,"
                f" {self.format}: set MODEL.PIXEL_MEAN and MODEL.PIXEL_STD as well"
            )
        return PixelSettings(self.mean[::-1], self.std[::-1], image_format)


def made_for_pixels(settings: Callable[[CfgNode], PixelSettings]) -> Callable[[B], B]:
    """Return a decorator for a builder of backbones that says which images its networks were made
    for.
    """

    def decorate(builder: B) -> B:
        builder.pixel_settings = settings  # type: ignore[attr-defined]
        return builder

    return decorate


def follow_backbone_pixels(cfg: CfgNode) -> None:
    """Set PIXEL_MEAN, PIXEL_STD and INPUT.FORMAT as the backbone was trained, each unless the config sets it.

    A builder of backbones has a say in this when it is decorated with `made_for_pixels`, as those
    of torchvision and timm are; with other backbones nothing changes, nor does it at a second call.
    `default_setup`, `DefaultTrainer` and `DefaultPredictor` call it before they build anything.

    Args:
        cfg: Changed, also when it is frozen. Its dump holds the numbers, and so gives the same when
            it is read again.

    Raises:
        ValueError: The config sets a format that the backbone's numbers cannot be brought to.
    """
    left = keys_left_to_backbone(cfg)
    if not left:
        return
    own: PixelSettings = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME).pixel_settings(cfg)
    was_frozen = cfg.is_frozen()
    cfg.defrost()
    if "INPUT.FORMAT" in left:
        cfg.INPUT.FORMAT = own.format
    if "MODEL.PIXEL_MEAN" in left:
        cfg.MODEL.PIXEL_MEAN = own.in_order(cfg.INPUT.FORMAT).mean
    if "MODEL.PIXEL_STD" in left:
        cfg.MODEL.PIXEL_STD = own.in_order(cfg.INPUT.FORMAT).std
    if was_frozen:
        cfg.freeze()
    values = ", ".join(f"{key} {cfg.get_by_full_key(key)}" for key in left)
    logger.info("as %s expects its images: %s", cfg.MODEL.BACKBONE.NAME, values)
    for key in _KEYS:
        if key not in left:
            # A base file may have set it for another backbone.
            logger.warning("%s %s is kept as the config sets it", key, cfg.get_by_full_key(key))


def warn_of_unset_pixels(cfg: CfgNode) -> None:
    """Say so when a backbone is built from a config that `follow_backbone_pixels` has not seen."""
    left = keys_left_to_backbone(cfg)
    if left:
        logger.warning(
            "%s: detkit's defaults, not what %s expects; call"
            " detkit.modeling.follow_backbone_pixels(cfg) first",
            ", ".join(left),
            cfg.MODEL.BACKBONE.NAME,
        )


def keys_left_to_backbone(cfg: CfgNode) -> list[str]:
    """Return those of the keys that neither the config sets nor `follow_backbone_pixels` has set
    yet.
    """
    name = cfg.MODEL.BACKBONE.NAME
    if name not in BACKBONE_REGISTRY or not hasattr(BACKBONE_REGISTRY.get(name), "pixel_settings"):
        return []
    return [key for key in _KEYS if not cfg.is_set(key)]
