"""The registry of whole models, and `build_model`."""

import torch
from torch import nn

from detkit.config import CfgNode
from detkit.utils.env import resolve_device
from detkit.utils.registry import Registry

META_ARCH_REGISTRY = Registry("META_ARCH")
"""Called as `(cfg)`. `forward(list[ModelInput])` gives losses by name in training, else `list[ModelOutput]`."""

MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
"""Values of MODEL.MEMORY_FORMAT."""


def build_model(cfg: CfgNode) -> nn.Module:
    """Give the model that MODEL.META_ARCHITECTURE selects, with random weights.

    Its weights are on MODEL.DEVICE, those of convolutions in MODEL.MEMORY_FORMAT. Loading MODEL.WEIGHTS is the
    checkpointer's.
    """
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    return model.to(device=resolve_device(cfg.MODEL.DEVICE), memory_format=MEMORY_FORMATS[cfg.MODEL.MEMORY_FORMAT])
