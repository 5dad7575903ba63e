"""`torch.compile` of the parts of a model that have a fixed course: MODEL.COMPILE.

The rest (proposals, NMS, pooling) depends on what is found, and would fall into dozens of graphs.
"""

import os
import shutil
import sys
from typing import Any

from torch import nn

from detkit.utils.errors import ConfigError

# Where models have their dense heads: RPN, one-stage detectors, semantic segmentation.
_HEADS = ("proposal_generator.rpn_head", "head", "sem_seg_head")
_COMPILERS = {"darwin": "clang++", "win32": "cl"}


def compile_dense(model: nn.Module, part: str, **settings: Any) -> None:
    """Let `torch.compile` run the dense part of a model, from its first use on.

    Names in the `state_dict` stay, and a copy or pickle of the model is not compiled. Norms are
    folded into convolutions within the graph, so that changed weights are seen. The fast paths of
    `detkit.layers.cpu` are not taken there.

    Args:
        model: Changed in place.
        part: `backbone`, or `dense`: also the heads that see every pixel.
        **settings: Further arguments of `torch.compile`.

    Raises:
        ConfigError: There is no C++ compiler, or the model has no backbone.
    """
    compiler = os.environ.get("CXX") or _COMPILERS.get(sys.platform, "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"MODEL.COMPILE {part} needs a C++ compiler, and there is no {compiler}: install one,"
            " let the environment variable CXX name it, or set MODEL.COMPILE none"
        )
    modules = dict(model.named_modules())
    if "backbone" not in modules:
        raise ConfigError(f"MODEL.COMPILE {part} needs a model with a backbone")
    for name in ("backbone", *_HEADS) if part == "dense" else ("backbone",):
        if name in modules:
            # `dynamic`: one graph for images of all sizes, where each new size would make one.
            modules[name].compile(**{"dynamic": True, **settings})
