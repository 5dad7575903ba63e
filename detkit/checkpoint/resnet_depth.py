"""Whether a checkpoint's ResNet is as deep as the model's.

The names of a ResNet-101 contain those of a ResNet-50, with the same shapes: loaded by name, the
one fills the other, and the features mean nothing.
"""

import re
from collections import defaultdict
from collections.abc import Iterable

from detkit.checkpoint.safe_load import CheckpointError

# Of detkit's ResNets, and of those that a model takes from torchvision or timm.
_CONV = re.compile(r"(.*\b(?:res[2-5]|layer[1-4]))\.(\d+)\.conv(\d)\.weight")


def check_depth(names: Iterable[str], model_names: Iterable[str], path: str) -> None:
    """Raise the CheckpointError of a file whose ResNet is not as deep as the model's.

    Args:
        names: Of the tensors in the file.
        model_names: Of the tensors of the model.
        path: The file, for the message.
    """
    if difference := depth_difference(names, model_names):
        raise CheckpointError(
            f"{path} holds weights of a ResNet of another depth: {difference}. Set"
            " MODEL.RESNETS.DEPTH (or the name in MODEL.TORCHVISION, MODEL.TIMM) to theirs, or"
            " choose other weights."
        )


def depth_difference(names: Iterable[str], model_names: Iterable[str]) -> str:
    """Say how the depths differ, in words; empty if they do not, or if there are no two ResNets to
    compare.
    """
    in_file, in_model = _stages(names), _stages(model_names)
    for stage, (blocks_in_model, convs_in_model) in in_model.items():
        # Blocks that the model has no place for keep the file's shorter name: res4.6 beside
        # backbone.res4.0.
        found = [in_file[name] for name in in_file if f".{stage}".endswith(f".{name}")]
        blocks, convs = max((n for n, _ in found), default=0), max((n for _, n in found), default=0)
        if found and (blocks, convs) != (blocks_in_model, convs_in_model):
            return (
                f"{stage} has {blocks} blocks of {convs} convolutions in the file,"
                f" {blocks_in_model} of {convs_in_model} in the model"
            )
    return ""


def _stages(names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return, for each stage, its number of blocks and of convolutions in a block."""
    found: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for match in filter(None, map(_CONV.fullmatch, names)):
        blocks, convs = found[match[1]]
        found[match[1]] = max(blocks, int(match[2]) + 1), max(convs, int(match[3]))
    return dict(found)
