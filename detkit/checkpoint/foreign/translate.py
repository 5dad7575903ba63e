"""Translation of foreign weights to the names of Detectron2 and of a model.

A layout is recognised by its names. Tensors of a ResNet have no prefix and are placed in a model
by the end of their names: `stem.conv1.weight` is `backbone.bottom_up.stem.conv1.weight` in a model
with a pyramid, and the same file fits a plain backbone.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from torch import Tensor

from detkit.checkpoint.foreign.caffe2 import translate_caffe2
from detkit.checkpoint.foreign.layout import Translation
from detkit.checkpoint.foreign.mmdet import translate_mmdet
from detkit.checkpoint.foreign.regnet import translate_regnet
from detkit.checkpoint.foreign.torchvision import (
    keep_coco_classes,
    translate_detector,
    translate_resnet,
)
from detkit.checkpoint.foreign.transformer import translate_transformer

# Detectors before ResNets, as they contain one.
_LAYOUTS = (
    translate_detector,
    translate_mmdet,
    translate_caffe2,
    translate_resnet,
    translate_transformer,
    translate_regnet,
)
_BARE = re.compile(r"(stem|res[2-6]|linear)\.")
_PYRAMID = re.compile(r"(fpn_(lateral|output)\d|top_block)\.")
_CLASSIFIERS = ("roi_heads.box_predictor.cls_score.bias", "head.cls_score.bias")


def translate(weights: Mapping[str, Tensor], file_name: str = "") -> Translation | None:
    """Translate weights of a known foreign layout to Detectron2's names, without prefixes.

    Args:
        weights: Name -> tensor. Not changed.
        file_name: Name of their file; some published files are recognised by it.

    Returns:
        None if no foreign layout is recognised.
    """
    for translate_layout in _LAYOUTS:
        translation = translate_layout(weights, file_name)
        if translation is not None:
            translation.unrecognised = [
                n for n in translation.weights if n in weights and n not in translation.renamed
            ]
            return translation
    if weights and all(_BARE.match(name) for name in weights):
        return Translation("a ResNet alone", dict(weights), {})
    return None


def translate_for(
    weights: Mapping[str, Tensor],
    model_state: Mapping[str, Tensor],
    file_name: str = "",
    *,
    by_suffix: bool = False,
) -> Translation | None:
    """Translate weights of a foreign layout to the names of one model.

    Args:
        weights: Name -> tensor. Not changed.
        model_state: Name -> tensor of the model.
        file_name: See `translate`.
        by_suffix: Match the ends of names even if no layout is recognised, as Detectron2 does for
            files with `matching_heuristics`.

    Returns:
        None if the weights already have the names of the model.
    """
    translation = translate(weights, file_name)
    as_they_are = places_by_suffix(weights, model_state)
    if translation is None:
        if not by_suffix:
            return None
        return Translation("parts of a model", *_placed(weights, {}, as_they_are))
    num_classes = _num_classes(translation.weights, model_state)
    if num_classes is not None:
        keep_coco_classes(translation, num_classes)
    places = places_by_suffix(translation.weights, model_state)
    if len(as_they_are) > len(places):
        # The model itself contains foreign parts, such as torchvision's ResNet.
        # Heads of a detector may still need the translation.
        is_own = all(name == place for name, place in as_they_are.items())
        if is_own and places.keys() <= as_they_are.keys():
            return None
        name_in_file = {new: old for old, new in translation.renamed.items()}
        for name in list(translation.weights):
            old = name_in_file.get(name, name)
            if name not in places and old in as_they_are:
                translation.weights.pop(name)
                translation.renamed.pop(old, None)
                translation.weights[old] = weights[old]
                places[old] = as_they_are[old]
    translation.weights, translation.renamed = _placed(
        translation.weights, translation.renamed, places
    )
    return translation


def translate_for_file(weights: Mapping[str, Tensor], file_name: str = "") -> Translation | None:
    """Translate weights of a foreign layout to the full names of a GeneralizedRCNN or RetinaNet.

    A plain ResNet keeps its short names, which load into any model.
    """
    translation = translate(weights, file_name)
    if translation is None or all(_BARE.match(name) for name in translation.weights):
        return translation
    has_pyramid = any(_PYRAMID.match(name) for name in translation.weights)
    has_heads = any(name.startswith("roi_heads.") for name in translation.weights)
    full_names = {}
    for name in translation.weights:
        if _PYRAMID.match(name):
            full_names[name] = f"backbone.{name}"
        elif _BARE.match(name):
            backbone = "backbone.bottom_up." if has_pyramid else "backbone."
            # Without a pyramid, res5 belongs to the heads.
            in_heads = has_heads and not has_pyramid and name.startswith("res5.")
            full_names[name] = f"{'roi_heads.' if in_heads else backbone}{name}"
    translation.weights, translation.renamed = _placed(
        translation.weights, translation.renamed, full_names
    )
    return translation


def places_by_suffix(names: Iterable[str], model_names: Iterable[str]) -> dict[str, str]:
    """Map each name to the name in a model that equals it or ends with it.

    Names without a match are left out. If several parts of the model match, the part with the most
    matches is chosen.
    """
    names = dict.fromkeys(names)
    prefixes: dict[str, list[str]] = defaultdict(list)
    for model_name in model_names:
        parts = model_name.split(".")
        for start in range(len(parts)):
            suffix = ".".join(parts[start:])
            if suffix in names:
                prefixes[suffix].append(model_name.removesuffix(suffix))
    popularity = Counter(prefix for found in prefixes.values() for prefix in found)
    places = {}
    for name in names:
        if "" in prefixes[name]:
            places[name] = name
        elif prefixes[name]:
            places[name] = max(prefixes[name], key=popularity.__getitem__) + name
    return places


def _placed(
    weights: Mapping[str, Tensor], renamed: Mapping[str, str], places: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename translated weights to their places in a model.

    Returns:
        The weights, and name in the file -> new name.
    """
    name_in_file = {new: old for old, new in renamed.items()}
    placed = {places.get(name, name): value for name, value in weights.items()}
    names = {name_in_file.get(name, name): places.get(name, name) for name in weights}
    return placed, {old: new for old, new in names.items() if old != new}


def _num_classes(weights: Mapping[str, Tensor], model_state: Mapping[str, Tensor]) -> int | None:
    """Return K of a model with the same kind of classifier as the weights, else None."""
    rcnn, retinanet = _CLASSIFIERS
    if rcnn in weights and rcnn in model_state:
        return len(model_state[rcnn]) - 1
    if retinanet in weights and retinanet in model_state and "head.bbox_pred.bias" in model_state:
        return len(model_state[retinanet]) * 4 // len(model_state["head.bbox_pred.bias"])
    return None
