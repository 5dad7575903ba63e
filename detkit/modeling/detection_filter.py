"""The way in which detections suppress each other, as a config names it."""

from detkit.config import CfgNode
from detkit.layers import NMSMethod


def nms_method(cfg: CfgNode) -> NMSMethod:
    """Return the method that TEST.NMS describes, for every head that gives detections."""
    nms = cfg.TEST.NMS
    return NMSMethod(method=nms.METHOD, sigma=nms.SIGMA, class_agnostic=nms.CLASS_AGNOSTIC)
