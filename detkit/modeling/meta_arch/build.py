"""Registries of whole models and of semantic heads, and the functions that build from a config."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from detkit.config import BRANCHES, CfgNode, find_architecture
from detkit.layers import ShapeSpec
from detkit.modeling.compilation import compile_dense
from detkit.modeling.freezing import freeze_matching
from detkit.modeling.initialization import initialize_matching
from detkit.utils.env import resolve_device
from detkit.utils.errors import ConfigError
from detkit.utils.registry import Registry

logger = logging.getLogger(__name__)

META_ARCH_REGISTRY = Registry("META_ARCH")
"""Called as `(cfg)`.

`forward(list[ModelInput])` returns losses by name in training, else `list[ModelOutput]`.
"""

SEM_SEG_HEADS_REGISTRY = Registry("SEM_SEG_HEADS")
"""Called as `(cfg, input_shape)` with the shapes of the backbone's features, by name.

`forward(features, targets)` returns (None, losses) in training, else ((N, K, H, W) scores, {}). An
attribute `ignore_value` is the label of pixels that are not trained. If there is an attribute
`num_classes`, labels are checked against it.
"""

MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
"""Values of MODEL.MEMORY_FORMAT, besides auto."""

# Packages whose classes work in any layout.
_KNOWN_PACKAGES = ("detkit", "torch", "torchvision", "timm")


def build_model(cfg: CfgNode | Mapping[str, Any]) -> nn.Module:
    """Build the model that MODEL.META_ARCHITECTURE selects, with random weights.

    As in Detectron2, the config may be one of omegaconf: any mapping that has all keys. Weights are
    on MODEL.DEVICE, those of convolutions in MODEL.MEMORY_FORMAT, and those that
    SOLVER.FREEZE matches do not train. MODEL.WEIGHTS is loaded by `DetectionCheckpointer`.

    Raises:
        ConfigError: A setting is out of range; the message names the key.
    """
    if not isinstance(cfg, CfgNode):
        cfg = CfgNode(_as_plain(cfg))
    _check_branches(cfg)
    device = resolve_device(cfg.MODEL.DEVICE)
    if cfg.MODEL.DEVICE == "auto":
        # Models written for Detectron2 give it to torch.device, which does not know "auto".
        was_frozen, cfg = cfg.is_frozen(), cfg.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = str(device)
        if was_frozen:
            cfg.freeze()
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    if cfg.MODEL.INIT:
        try:
            initialize_matching(model, cfg.MODEL.INIT)
        except ValueError as error:
            raise ConfigError(f"MODEL.INIT: {error}") from error
    if cfg.SOLVER.FREEZE:
        _freeze(model, cfg.SOLVER.FREEZE)
    if cfg.MODEL.COMPILE != "none":
        compile_dense(model, cfg.MODEL.COMPILE)
    memory_format = _memory_format(cfg.MODEL.MEMORY_FORMAT, model)
    batch_in = getattr(model, "batch_in", None)  # a model may be any module
    if batch_in is not None:
        batch_in(memory_format)
    # Moved once it is complete; convolutions in the layout that images are batched in.
    return model.to(device=device, memory_format=memory_format)


def build_sem_seg_head(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Build the head that MODEL.SEM_SEG_HEAD.NAME selects, for the features of a backbone."""
    return SEM_SEG_HEADS_REGISTRY.get(cfg.MODEL.SEM_SEG_HEAD.NAME)(cfg, input_shape)


def _as_plain(settings: Any) -> Any:
    """Return a tree of mappings and sequences as one of dicts and lists."""
    if isinstance(settings, Mapping):
        return {key: _as_plain(value) for key, value in settings.items()}
    if isinstance(settings, Sequence) and not isinstance(settings, str):
        return [_as_plain(value) for value in settings]
    return settings


def _check_branches(cfg: CfgNode) -> None:
    """Raise a ConfigError if a branch is on that the model does not have."""
    # Otherwise only the evaluation after training would show it, by missing scores.
    name = cfg.MODEL.META_ARCHITECTURE
    architecture = find_architecture(name)
    if architecture is None:
        return
    for key in BRANCHES:
        if cfg.get_by_full_key(key) and key not in architecture.branches:
            raise ConfigError(
                f"{key} is True, but MODEL.META_ARCHITECTURE {name} does not use it: set it to"
                " False, or choose GeneralizedRCNN"
            )


def _memory_format(name: str, model: nn.Module) -> torch.memory_format:
    if name != "auto":
        return MEMORY_FORMATS[name]
    for part in model.modules():
        if type(part).__module__.partition(".")[0] not in _KNOWN_PACKAGES:
            # Detectron2's layout, for which its users' code is written.
            logger.info(
                "%s is a class of your own: convolutions are contiguous. MODEL.MEMORY_FORMAT"
                " channels_last is faster, if its code takes tensors that `view` cannot flatten",
                type(part).__qualname__,
            )
            return torch.contiguous_format
    return torch.channels_last


def _freeze(model: nn.Module, patterns: list[str]) -> None:
    # Here and not in the solver: batch norms change their statistics without an optimizer.
    try:
        frozen = freeze_matching(model, patterns)
    except ValueError as error:
        raise ConfigError(f"SOLVER.FREEZE: {error}") from error
    logger.info(
        "SOLVER.FREEZE: %d of %d tensors do not train", len(frozen), len(model.state_dict())
    )
