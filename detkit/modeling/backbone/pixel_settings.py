"""Pixel mean, standard deviation and channel order that the backbone was trained with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from detkit.config import CfgNode
from detkit.modeling.backbone.build import BACKBONE_REGISTRY
from detkit.utils.errors import ConfigError, UserError

logger = logging.getLogger(__name__)

B = TypeVar("B")

# Where `made_for_pixels` stores the settings of a builder, on the function itself.
_ATTRIBUTE = "pixel_settings"
_KEYS = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")


@dataclass(frozen=True)
class PixelSettings:
    """Mean and standard deviation per channel, on a scale of 0 to 255, and the channel order."""

    mean: list[float]
    std: list[float]
    format: str = "RGB"

    @classmethod
    def from_unit_range(cls, mean: Sequence[float], std: Sequence[float]) -> PixelSettings:
        """Return the settings for statistics of RGB images on a scale of 0 to 1."""
        # Three decimals: 0.485 * 255 is 123.675, and should read like that in a YAML file.
        return cls([round(255 * x, 3) for x in mean], [round(255 * x, 3) for x in std])

    def in_order(self, image_format: str) -> PixelSettings:
        """Return the same settings for images of another channel order.

        Raises:
            ConfigError: The formats differ in more than the order.
        """
        if image_format == self.format:
            return self
        if {image_format, self.format} != {"RGB", "BGR"}:
            raise ConfigError(
                f"INPUT.FORMAT {image_format!r} is not what the backbone was made for,"
                f" {self.format}: set MODEL.PIXEL_MEAN and MODEL.PIXEL_STD as well"
            )
        return PixelSettings(self.mean[::-1], self.std[::-1], image_format)


def made_for_pixels(settings: Callable[[CfgNode], PixelSettings]) -> Callable[[B], B]:
    """Return a decorator that declares the pixel settings of a backbone builder's networks."""

    def decorate(builder: B) -> B:
        setattr(builder, _ATTRIBUTE, settings)
        return builder

    return decorate


def follow_backbone_pixels(cfg: CfgNode) -> None:
    """Set PIXEL_MEAN, PIXEL_STD and INPUT.FORMAT to the backbone's, each unless the config sets it.

    Only builders that are decorated with `made_for_pixels` have such settings, as those of
    torchvision and timm; with others, and at a second call, nothing changes.

    Args:
        cfg: Changed, even when it is frozen. Its dump has the numbers, so a config that is read
            from it has the same.

    Raises:
        ConfigError: The config sets a format that the backbone's numbers cannot be converted to.
    """
    left = keys_left_to_backbone(cfg)
    if not left:
        return
    name = cfg.MODEL.BACKBONE.NAME
    try:
        own: PixelSettings = getattr(BACKBONE_REGISTRY.get(name), _ATTRIBUTE)(cfg)
    except UserError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    # In place, not in the copy that `cfg.edited()` makes: the loaders read the caller's tree, too.
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
    logger.info("as %s expects its images: %s", name, values)
    for key in _KEYS:
        if key not in left:
            # A base file may have set it for another backbone.
            logger.warning("%s %s is kept as the config sets it", key, cfg.get_by_full_key(key))


def warn_of_unset_pixels(cfg: CfgNode) -> None:
    """Warn if a backbone is built from a config without a call of `follow_backbone_pixels`."""
    left = keys_left_to_backbone(cfg)
    if left:
        logger.warning(
            "%s: detkit's defaults, not what %s expects; call"
            " detkit.modeling.follow_backbone_pixels(cfg) first",
            ", ".join(left),
            cfg.MODEL.BACKBONE.NAME,
        )


def keys_left_to_backbone(cfg: CfgNode) -> list[str]:
    """Return those of the keys that follow the backbone and are not set yet."""
    name = cfg.MODEL.BACKBONE.NAME
    if name not in BACKBONE_REGISTRY or not hasattr(BACKBONE_REGISTRY.get(name), _ATTRIBUTE):
        return []
    return [key for key in _KEYS if not cfg.is_set(key)]
