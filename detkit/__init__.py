"""detkit: object detection with Detectron2's vocabulary, in pure Python on current torch."""

__version__ = "0.1.0"
