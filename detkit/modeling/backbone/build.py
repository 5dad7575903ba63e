"""The registry of backbones, and the function that builds the one a config names."""

from __future__ import annotations

from detkit.config import CfgNode
from detkit.layers import ShapeSpec
from detkit.modeling.backbone.backbone import Backbone
from detkit.modeling.backbone.dry_run import OutputShapeError, check_output_shape
from detkit.utils.registry import Registry

BACKBONE_REGISTRY = Registry("BACKBONE")
BACKBONE_REGISTRY.__doc__ = (
    """Backbones by name: callables `(cfg, input_shape: ShapeSpec) -> Backbone`."""
)


def build_backbone(cfg: CfgNode, input_shape: ShapeSpec | None = None) -> Backbone:
    """Build the backbone that `MODEL.BACKBONE.NAME` names.

    Args:
        cfg: The config.
        input_shape: The input's channels; None takes one channel per value of `MODEL.PIXEL_MEAN`.

    Raises:
        UnknownNameError: No backbone of that name is registered.
        TypeError: What was built is not a Backbone.
        OutputShapeError: One that is not detkit's own returns other features than it declares.
    """
    if input_shape is None:
        input_shape = ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN))
    name = cfg.MODEL.BACKBONE.NAME
    backbone = BACKBONE_REGISTRY.get(name)(cfg, input_shape)
    if not isinstance(backbone, Backbone):
        kind = type(backbone).__name__
        raise TypeError(
            f"MODEL.BACKBONE.NAME: {name!r} must build a detkit.modeling.Backbone, got {kind}"
        )
    # A wrong stride would not raise an error later: boxes would be learnt at the wrong places.
    try:
        check_output_shape(backbone, input_shape.channels or len(cfg.MODEL.PIXEL_MEAN))
    except OutputShapeError as error:
        raise OutputShapeError(f"MODEL.BACKBONE.NAME: {name!r}: {error}") from error
    return backbone
