"""Drawing boxes, masks, keypoints, segments and names into pictures, with Pillow alone."""

from detkit.visualization.canvas import Canvas
from detkit.visualization.generic_mask import GenericMask
from detkit.visualization.video import VideoVisualizer
from detkit.visualization.vis_image import VisImage, readable_scale, side_by_side
from detkit.visualization.visualizer import COLOR_MODES, ColorMode, Visualizer

__all__ = [
    "COLOR_MODES",
    "Canvas",
    "ColorMode",
    "GenericMask",
    "VideoVisualizer",
    "VisImage",
    "Visualizer",
    "readable_scale",
    "side_by_side",
]
