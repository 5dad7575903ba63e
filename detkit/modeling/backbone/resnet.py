"""ResNet and ResNeXt.

Papers: Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun: Deep Residual Learning for Image
Recognition, 2015, arXiv 1512.03385; Saining Xie, Ross Girshick, Piotr Dollar, Zhuowen Tu, Kaiming
He: Aggregated Residual Transformations for Deep Neural Networks, 2016, arXiv 1611.05431.

Legend: N images, C channels, H and W height and width, K classes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from detkit.layers import CheckpointedSequential, CNNBlockBase, ShapeSpec
from detkit.modeling.backbone.backbone import Backbone, check_features
from detkit.modeling.backbone.resnet_blocks import BasicBlock, BottleneckBlock
from detkit.utils.errors import ContractError

# Table 1 of the paper.
BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def make_stage(
    block_class: type[CNNBlockBase],
    num_blocks: int,
    *,
    in_channels: int,
    out_channels: int,
    **kwargs: Any,
) -> list[CNNBlockBase]:
    """Build the blocks of one stage.

    Args:
        block_class: Built with `in_channels`, `out_channels` and the keyword arguments.
        num_blocks: How many.
        in_channels: Input channels of the first block.
        out_channels: Output channels of every block.
        **kwargs: Arguments for every block. One whose name ends in `_per_block` is a list with a
            value for each: `stride_per_block=[2, 1, 1]` gives the blocks `stride` 2, 1 and 1.

    Raises:
        ValueError: Such a list has not one value per block.

    Example:
        >>> blocks = make_stage(BasicBlock, 2, in_channels=8, out_channels=16, norm="BN")
        >>> [(block.in_channels, block.out_channels, block.stride) for block in blocks]
        [(8, 16, 1), (16, 16, 1)]
    """
    if "first_stride" in kwargs:
        # As in Detectron2 before 0.4.
        stride = kwargs.pop("first_stride")
        kwargs["stride_per_block"] = [stride] + [1] * (num_blocks - 1)
    blocks = []
    for index in range(num_blocks):
        arguments = {}
        for name, value in kwargs.items():
            if name.endswith("_per_block"):
                if len(value) != num_blocks:
                    raise ContractError(
                        f"{name} needs one value for each of {num_blocks} blocks: got {value}"
                    )
                arguments[name.removesuffix("_per_block")] = value[index]
            else:
                arguments[name] = value
        blocks.append(block_class(in_channels=in_channels, out_channels=out_channels, **arguments))
        in_channels = out_channels
    return blocks


class ResNet(Backbone):
    """A stem, stages of residual blocks named `res2`, `res3`, ..., and optionally a classifier.

    Example:
        >>> import torch
        >>> from detkit.modeling.backbone import BasicStem
        >>> stages = ResNet.make_default_stages(18, norm="BN")
        >>> backbone = ResNet(BasicStem(), stages, out_features=["res3", "res5"])
        >>> {name: tuple(x.shape) for name, x in backbone(torch.zeros(1, 3, 64, 96)).items()}
        {'res3': (1, 128, 8, 12), 'res5': (1, 512, 2, 3)}
    """

    make_stage = staticmethod(make_stage)

    def __init__(
        self,
        stem: CNNBlockBase,
        stages: Sequence[Sequence[CNNBlockBase]],
        num_classes: int | None = None,
        out_features: Sequence[str] | None = None,
        freeze_at: int = 0,
        checkpointed: Collection[str] = (),
    ) -> None:
        """Build the network.

        Args:
            stem: From image to the input of the first stage.
            stages: The blocks of each stage; usually from `make_stage`. Stages after the last one
                that `out_features` names are left out, so that no parameter goes without a
                gradient.
            num_classes: K. None builds no classifier.
            out_features: Names of the maps to return: "stem", "res2", ..., and "linear" with a
                classifier. None returns the last.
            freeze_at: Number of parts to freeze, as in `freeze`.
            checkpointed: Names of the stages that keep only the input of each block in training,
                and recompute the rest in the backward pass: less memory, more time, the same
                gradients.

        Raises:
            ValueError: A name in `out_features` or `checkpointed` is unknown.
            ValueError: `out_features` is empty.
        """
        super().__init__()
        names = ["stem", *(f"res{number}" for number in range(2, 2 + len(stages)))]
        if num_classes is not None:
            names.append("linear")
        self._out_features = [names[-1]] if out_features is None else list(out_features)
        check_features("out_features", self._out_features, names)
        if checkpointed:
            stage_names = [name for name in names[1:] if name != "linear"]
            check_features("checkpointed", tuple(checkpointed), stage_names)
        # Later stages are not built: parameters without a gradient stop DistributedDataParallel.
        last = max(names.index(name) for name in self._out_features)

        self.num_classes = num_classes
        self.stem = stem
        self._out_feature_strides = {"stem": stem.stride}
        self._out_feature_channels = {"stem": stem.out_channels}
        self.stage_names = tuple(name for name in names[1 : last + 1] if name != "linear")
        stride, channels = stem.stride, stem.out_channels
        # Not strict: there may be more stages than are built.
        for name, blocks in zip(self.stage_names, stages, strict=False):
            container = CheckpointedSequential if name in checkpointed else nn.Sequential
            self.add_module(name, container(*blocks))
            for block in blocks:
                stride, channels = stride * block.stride, block.out_channels
            self._out_feature_strides[name], self._out_feature_channels[name] = stride, channels

        self.linear = None
        if num_classes is not None and "linear" in self._out_features:
            self.linear = nn.Linear(channels, num_classes)
            # Goyal et al. 2017, arXiv 1706.02677, section 5.1.
            nn.init.normal_(self.linear.weight, std=0.01)
            nn.init.zeros_(self.linear.bias)
        self.freeze(freeze_at)

    @property
    def stages(self) -> list[nn.Sequential]:
        """The stages, each a sequence of blocks."""
        stages = []
        for name in self.stage_names:
            stage = self.get_submodule(name)
            assert isinstance(stage, nn.Sequential)
            stages.append(stage)
        return stages

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the maps of images (N, C, H, W), by name; "linear" is (N, K) logits."""
        if x.dim() != 4:
            raise ContractError(f"ResNet takes images (N, C, H, W): got shape {tuple(x.shape)}")
        outputs = {}
        for name in ("stem", *self.stage_names):
            x = self.get_submodule(name)(x)
            if name in self._out_features:
                outputs[name] = x
        if self.linear is not None:
            # Global average pooling, and so images of any size.
            outputs["linear"] = self.linear(x.mean(dim=(2, 3)))
        return outputs

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of each feature map, by name; of "linear" the classes."""
        shapes = {}
        for name in self._out_features:
            if name == "linear" and self.linear is not None:
                shapes[name] = ShapeSpec(channels=self.linear.out_features)
            else:
                channels = self._out_feature_channels[name]
                shapes[name] = ShapeSpec(channels=channels, stride=self._out_feature_strides[name])
        return shapes

    def parameter_stages(self) -> dict[str, int]:
        """Return each parameter's stage: 0 the stem, 1 res2, ...; the last for a classifier."""
        parts = ["stem", *self.stage_names]
        stages = {}
        for name, _ in self.named_parameters():
            part = name.partition(".")[0]
            stages[name] = parts.index(part) if part in parts else len(parts) - 1
        return stages

    def freeze(self, freeze_at: int = 0) -> ResNet:
        """Stop training the first parts; their batch norms become FrozenBatchNorm2d.

        Args:
            freeze_at: Number of parts: 0 none, 1 the stem, 2 the stem and res2, ..., 5 everything
                up to res5.
        """
        if freeze_at >= 1:
            self.stem.freeze()
        for stage in self.stages[: max(0, freeze_at - 1)]:
            for block in stage:
                assert isinstance(block, CNNBlockBase)
                block.freeze()
        return self

    @staticmethod
    def make_default_stages(
        depth: int, block_class: type[CNNBlockBase] | None = None, **kwargs: Any
    ) -> list[list[CNNBlockBase]]:
        """Build the four stages of a ResNet as in the paper.

        Args:
            depth: 18, 34, 50, 101 or 152.
            block_class: None is the paper's: basic blocks for 18 and 34, bottlenecks from 50 on.
            **kwargs: Further arguments of `make_stage`, e.g. `norm`, except strides and channels.

        Raises:
            ValueError: The depth is another one.
        """
        if depth not in BLOCKS_PER_STAGE:
            raise ValueError(f"depth must be one of {list(BLOCKS_PER_STAGE)}: got {depth}")
        if block_class is None:
            block_class = BasicBlock if depth < 50 else BottleneckBlock
        out_channels = [64, 128, 256, 512] if depth < 50 else [256, 512, 1024, 2048]
        stages = []
        in_channels = 64
        # res2 keeps the resolution: the max-pool of the stem has halved it already.
        per_stage = zip(BLOCKS_PER_STAGE[depth], (1, 2, 2, 2), out_channels, strict=True)
        for num_blocks, stride, channels in per_stage:
            if issubclass(block_class, BottleneckBlock):
                # The paper's bottlenecks widen by 4: 64 to 256 in res2.
                kwargs["bottleneck_channels"] = channels // 4
            blocks = make_stage(
                block_class,
                num_blocks,
                in_channels=in_channels,
                out_channels=channels,
                stride_per_block=[stride] + [1] * (num_blocks - 1),
                **kwargs,
            )
            stages.append(blocks)
            in_channels = channels
        return stages
