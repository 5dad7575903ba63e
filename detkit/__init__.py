"""detkit: object detection in the Detectron2 vocabulary, in pure Python on torch and torchvision."""

__version__ = "0.1.0"
