"""Drawing boxes, masks and names into pictures, with Pillow alone."""

from detkit.visualization.canvas import Canvas, VisImage
from detkit.visualization.visualizer import ColorMode, Visualizer, readable_scale, side_by_side

__all__ = ["Canvas", "ColorMode", "VisImage", "Visualizer", "readable_scale", "side_by_side"]
