"""Whether a config builds the model that was recorded for it: names, shapes, and what is trained."""

from collections.abc import Collection, Mapping, Sequence
from typing import TypedDict

import torch

from detkit.config import CfgNode
from detkit.modeling import META_ARCH_REGISTRY

# Of a long list of differences, the first few tell what is wrong.
_SHOWN = 4


class RecordedModel(TypedDict):
    """A model as `tests/golden/state_dicts.json.gz` holds it."""

    keys: Mapping[str, Sequence[int]]
    """Shape of every tensor in the `state_dict`."""
    trainable: Sequence[str]
    """Names of the parameters that take a gradient."""


def compare_with_recorded(cfg: CfgNode, recorded: RecordedModel) -> list[str]:
    """Build the model of a config, and say in which ways it differs from the recorded one; nothing where it does not.

    It is built on torch's meta device, without memory and random numbers: names, shapes and
    trainable sets are all that is compared, and 92 models take seconds.
    """
    with torch.device("meta"):
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    wanted = {name: list(shape) for name, shape in recorded["keys"].items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    reshaped = [
        f"{n}: {shapes[n]}, not {wanted[n]}"
        for n in shapes
        if n in wanted and shapes[n] != wanted[n]
    ]
    return [
        *_difference("missing", wanted.keys() - shapes.keys()),
        *_difference("not recorded", shapes.keys() - wanted.keys()),
        *_difference("of another shape", reshaped),
        *_difference("trained, but should not be", trained - set(recorded["trainable"])),
        *_difference("not trained, but should be", set(recorded["trainable"]) - trained),
    ]


def _difference(what: str, names: Collection[str]) -> list[str]:
    if not names:
        return []
    more = f", ... ({len(names)})" if len(names) > _SHOWN else ""
    return [f"{what}: {', '.join(sorted(names)[:_SHOWN])}{more}"]
