"""Weights that other projects saved, brought under the names of Detectron2."""

from detkit.checkpoint.foreign.layout import Translation, differing_settings
from detkit.checkpoint.foreign.torchvision import fold_frozen_eps
from detkit.checkpoint.foreign.transformer import fitted_to_model
from detkit.checkpoint.foreign.translate import translate, translate_for, translate_for_file

__all__ = [
    "Translation",
    "differing_settings",
    "fitted_to_model",
    "fold_frozen_eps",
    "translate",
    "translate_for",
    "translate_for_file",
]
