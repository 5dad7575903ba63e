"""detkit: object detection with Detectron2's vocabulary, in pure Python on current torch."""

import os

from detkit.utils.detectron2_names import answer_detectron2_names

__version__ = "0.1.0"

answer_detectron2_names()
if os.environ.get("DETKIT_AS_DETECTRON2") == "1":
    import detkit.as_detectron2  # noqa: F401
