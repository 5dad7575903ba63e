"""RegNets that were trained alone, by pycls, whose names are Detectron2's, or by torchvision."""

import re
from collections.abc import Mapping

from torch import Tensor

from detkit.checkpoint.foreign.layout import (
    RGB_OF_TORCHVISION,
    Pixels,
    Rule,
    Translation,
    apply_rules,
    rename,
)

# pycls trains on BGR images of unit variance.
_BGR_OF_PYCLS = Pixels("BGR", (103.53, 116.28, 123.675), (57.375, 57.12, 58.395))
_BLOCK = re.compile(r"trunk_output\.block\d\.block(\d)-(\d+)\.(.*)")
_IN_STEM: list[Rule] = [(r"stem\.0\.(.*)", r"stem.conv.\1"), (r"stem\.1\.(.*)", r"stem.bn.\1")]
_IN_BLOCK: list[Rule] = [
    (r"proj\.0\.(.*)", r"proj.\1"),
    (r"proj\.1\.(.*)", r"bn.\1"),
    (r"f\.([abc])\.0\.(.*)", r"f.\1.\2"),
    (r"f\.([abc])\.1\.(.*)", r"f.\1_bn.\2"),
    (r"f\.se\.fc1\.(.*)", r"f.se.f_ex.0.\1"),
    (r"f\.se\.fc2\.(.*)", r"f.se.f_ex.2.\1"),
]


def translate_regnet(weights: Mapping[str, Tensor], file_name: str) -> Translation | None:
    """Return the weights of a RegNet alone under Detectron2's names, or None for something else."""
    if "s1.b1.f.a.weight" in weights:
        return Translation("pycls' RegNet", dict(weights), {}, _BGR_OF_PYCLS)
    if "trunk_output.block1.block1-0.f.a.0.weight" in weights:
        translated, renamed = rename(weights, lambda name, _: _name(name))
        return Translation("torchvision's RegNet", translated, renamed, RGB_OF_TORCHVISION)
    return None


def _name(name: str) -> str | None:
    block = _BLOCK.fullmatch(name)
    if block is None:
        return apply_rules(name, _IN_STEM)
    stage, number, rest = block.groups()
    inner = apply_rules(rest, _IN_BLOCK)
    return None if inner is None else f"s{stage}.b{int(number) + 1}.{inner}"
