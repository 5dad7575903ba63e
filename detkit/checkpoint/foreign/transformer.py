"""Transformers that were trained alone: MAE, DINOv2, Swin, MViT; and their positions in a model.

Their names are those of Detectron2's transformers and of timm's, without the prefix of a detector.
What differs are positions for images of another size, and parts of a model that another one lacks.

Legend: C channels, D channels of a head, T tokens.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from detkit.checkpoint.foreign.layout import Translation, rename

_PATCHES = "patch_embed.proj.weight"


def translate_transformer(weights: Mapping[str, Tensor], file_name: str) -> Translation | None:
    """Return the weights of a transformer alone, or None if they are something else.

    DINOv2's register tokens get timm's name, and buffers that follow from the shapes are left out.
    """
    if _PATCHES not in weights:
        return None
    if "blocks.0.attn.pool_q.weight" in weights:
        layout = "MViT"
    elif "layers.0.blocks.0.attn.relative_position_bias_table" in weights:
        layout = "Swin"
    elif "blocks.0.attn.qkv.weight" in weights:
        layout = "DINOv2" if "blocks.0.ls1.gamma" in weights else "a vision transformer alone"
    else:
        return None
    skipped = ("attn_mask", "mask_token")
    kept = {n: value for n, value in weights.items() if n.rpartition(".")[2] not in skipped}
    names = {"register_tokens": "reg_token"}
    translated, renamed = rename(kept, lambda name, _: names.get(name))
    return Translation(layout, translated, renamed)


def fitted_to_model(
    weights: Mapping[str, Tensor], model_state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Adapt positions, scales of layers, and the channels of the stem to those of a model.

    Absolute positions, tables of relative positions and Swin's biases of another size are
    interpolated. Where the model has no layer scale, as in Detectron2's ViT, it is multiplied into
    the layer before it, which computes the same.

    Args:
        weights: Name -> tensor, under the names of the model. Not changed.
        model_state: Name -> tensor of the model.

    Returns:
        The weights, and a line for the user about each kind of change.
    """
    fitted = dict(weights)
    remarks = _fold_layer_scales(fitted, model_state)
    resized = []
    for name, value in weights.items():
        if name not in model_state or value.shape == model_state[name].shape:
            continue
        leaf, target = name.rpartition(".")[2], model_state[name]
        new = None
        if leaf == "pos_embed" and value.dim() == target.dim() == 3:
            new = _absolute(fitted, name, value, target, model_state)
        elif leaf in ("rel_pos_h", "rel_pos_w") and value.dim() == target.dim() == 2:
            new = F.interpolate(value.float().T[None], size=len(target), mode="linear")[0].T
        elif leaf == "relative_position_bias_table":
            new = _on_grid(value.float()[None], math.isqrt(len(target)))[0]
        elif value.dim() == target.dim() == 4 and value.shape[1] == 3:
            # The stem of a model for colour. As in timm, its filters are repeated, which keeps
            # colour where the first channels are RGB, and scaled by the number of channels.
            channels = target.shape[1]
            stem = value.repeat(1, -(-channels // 3), 1, 1)[:, :channels] * (3 / channels)
            if channels == 1:
                stem = value.sum(dim=1, keepdim=True)
            if stem.shape == target.shape:
                fitted[name] = stem
                remarks.append(f"{name}: filters of 3 channels repeated for {channels}")
        elif leaf == "relative_position_index":
            fitted[name] = target  # a constant of the window's size
        if new is not None and new.shape == target.shape:
            fitted[name] = new.to(value.dtype)
            resized.append(f"{leaf} {tuple(value.shape)} to {tuple(target.shape)}")
    if resized:
        kinds = ", ".join(dict.fromkeys(resized))
        remarks.append(f"interpolated {len(resized)} tables of positions: {kinds}")
    return fitted, remarks


def _fold_layer_scales(weights: dict[str, Tensor], model_state: Mapping[str, Tensor]) -> list[str]:
    count = 0
    for scale, layer in (("ls1.gamma", "attn.proj"), ("ls2.gamma", "mlp.fc2")):
        for name in [n for n in weights if n.endswith(scale) and n not in model_state]:
            # The scale has no place in the model, and so no prefix yet; the layer has.
            end = f"{name.removesuffix(scale)}{layer}"
            layers = [n for n in weights if n in model_state and n.rpartition(".")[0].endswith(end)]
            if not layers:
                continue
            gamma = weights.pop(name)
            for of_layer in layers:
                factor = gamma[:, None] if weights[of_layer].dim() == 2 else gamma
                weights[of_layer] = weights[of_layer] * factor
            count += 1
    return [f"multiplied {count} layer scales into the layers before them"] if count else []


def _absolute(
    fitted: dict[str, Tensor],
    name: str,
    table: Tensor,
    target: Tensor,
    model_state: Mapping[str, Tensor],
) -> Tensor | None:
    """Return learnt positions (1, T, C) for the T of `target`; the first rows may be tokens'."""
    side, target_side = math.isqrt(table.shape[1]), math.isqrt(target.shape[1])
    tokens, target_tokens = table.shape[1] - side**2, target.shape[1] - target_side**2
    if table.shape[-1] != target.shape[-1]:
        return None
    special, grid = table[:, :tokens].float(), _on_grid(table[:, tokens:].float(), target_side)
    if target_tokens < tokens:
        # timm adds the class token's position to the token itself.
        cls_token = f"{name.removesuffix('pos_embed')}cls_token"
        if tokens == 1 and cls_token in model_state and cls_token in fitted:
            fitted[cls_token] = fitted[cls_token] + special.to(fitted[cls_token].dtype)
        special = special[:, tokens - target_tokens :]
    elif target_tokens > tokens:
        missing = target.new_zeros(1, target_tokens - tokens, target.shape[-1])
        special = torch.cat([missing.to(special), special], dim=1)
    return torch.cat([special, grid], dim=1)


def _on_grid(table: Tensor, side: int) -> Tensor:
    """Return (1, side * side, C) of a table (1, T, C) of a square grid, row by row."""
    old = math.isqrt(table.shape[1])
    if old == side or old * old != table.shape[1]:
        return table
    grid = table.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2)
