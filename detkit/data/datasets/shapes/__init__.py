"""The generated default data set: overlapping shapes on textured backgrounds."""

from detkit.data.datasets.shapes.files import ensure_shapes, generate_shapes
from detkit.data.datasets.shapes.register import register_shapes
from detkit.data.datasets.shapes.scene import SHAPES_CLASSES

__all__ = ["SHAPES_CLASSES", "ensure_shapes", "generate_shapes", "register_shapes"]
