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
from detkit.modeling.backbone.backbone import Backbone
from detkit.modeling.backbone.resnet_blocks import BasicBlock, BottleneckBlock
from detkit.utils.near_miss import did_you_mean

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
    """Return the blocks of one stage, each taking what the one before it gives.

    Args:
        block_class: Built with `in_channels`, `out_channels` and the keyword arguments.
        num_blocks: How many.
        in_channels: Channels that the first block takes.
        out_channels: Channels that every block gives.
        **kwargs: Arguments for every block. One whose name ends in `_per_block` is a list with a
            value for each: `stride_per_block=[2, 1, 1]` gives the blocks `stride` 2, 1 and 1.

    Raises:
        ValueError: Such a list has not one value per block.
    """
    blocks = []
    for index in range(num_blocks):
        arguments = {}
        for name, value in kwargs.items():
            if name.endswith("_per_block"):
                if len(value) != num_blocks:
                    raise ValueError(
                        f"{name} needs one value for each of {num_blocks} blocks: got {value}"
                    )
                arguments[name.removesuffix("_per_block")] = value[index]
            else:
                arguments[name] = value
        blocks.append(block_class(in_channels=in_channels, out_channels=out_channels, **arguments))
        in_channels = out_channels
    return blocks


class ResNet(Backbone):
    """A stem, and stages of residual blocks that are named `res2`, `res3`, ...; optionally a
    classifier.
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
            out_features: Which maps to give: "stem", "res2", ..., and "linear" with a classifier.
                None gives the last.
            freeze_at: See `freeze`.
            checkpointed: Names of the stages that keep only the input of each block in training,
                and compute the rest again in the backward pass: less memory, more time, the same
                gradients.

        Raises:
            ValueError: A name in `out_features` is not known, or there is none.
        """
        super().__init__()
        names = ["stem", *(f"res{number}" for number in range(2, 2 + len(stages)))]
        if num_classes is not None:
            names.append("linear")
        self._out_features = [names[-1]] if out_features is None else list(out_features)
        check_features("out_features", self._out_features, names)
        if checkpointed:
            check_features(
                "checkpointed",
                tuple(checkpointed),
                [name for name in names[1:] if name != "linear"],
            )
        last = max(names.index(name) for name in self._out_features)

        self.stem = stem
        self._out_feature_strides = {"stem": stem.stride}
        self._out_feature_channels = {"stem": stem.out_channels}
        self.stage_names = tuple(name for name in names[1 : last + 1] if name != "linear")
        stride, channels = stem.stride, stem.out_channels
        for name, blocks in zip(self.stage_names, stages, strict=False):
            container = CheckpointedSequential if name in checkpointed else nn.Sequential
            self.add_module(name, container(*blocks))
            for block in blocks:
                stride, channels = stride * block.stride, block.out_channels
            self._out_feature_strides[name], self._out_feature_channels[name] = stride, channels

        self.linear = None
        if num_classes is not None and "linear" in self._out_features:
            self.linear = nn.Linear(channels, num_classes)
            nn.init.normal_(self.linear.weight, std=0.01)
            nn.init.zeros_(self.linear.bias)
        self.freeze(freeze_at)

    @property
    def stages(self) -> list[nn.Sequential]:
        """The stages, each a sequence of blocks."""
        return [self.get_submodule(name) for name in self.stage_names]  # type: ignore[misc]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the maps of `out_features` for images (N, C, H, W), by name; "linear" is (N, K)
        logits.
        """
        if x.dim() != 4:
            raise ValueError(f"ResNet takes images (N, C, H, W): got shape {tuple(x.shape)}")
        outputs = {}
        for name in ("stem", *self.stage_names):
            x = self.get_submodule(name)(x)
            if name in self._out_features:
                outputs[name] = x
        if self.linear is not None:
            outputs["linear"] = self.linear(x.mean(dim=(2, 3)))
        return outputs

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of each feature map, by name; of "linear" the classes."""
        return {
            name: (
                ShapeSpec(channels=self.linear.out_features)
                if name == "linear" and self.linear is not None
                else ShapeSpec(
                    channels=self._out_feature_channels[name],
                    stride=self._out_feature_strides[name],
                )
            )
            for name in self._out_features
        }

    def parameter_stages(self) -> dict[str, int]:
        """Return the stage of each parameter by its name: 0 the stem, 1 res2, ...; a classifier
        counts as the last.
        """
        parts = ["stem", *self.stage_names]
        last = len(parts) - 1
        depth = {name: index for index, name in enumerate(parts)}
        return {
            name: depth.get(name.partition(".")[0], last) for name, _ in self.named_parameters()
        }

    def freeze(self, freeze_at: int = 0) -> ResNet:
        """Stop training the first parts; their batch norms become FrozenBatchNorm2d. Common when fine-tuning.

        Args:
            freeze_at: How many parts: 0 none, 1 the stem, 2 the stem and res2, ..., 5 everything up
                to res5.
        """
        for part in [
            self.stem,
            *(block for stage in self.stages[: max(0, freeze_at - 1)] for block in stage),
        ]:
            if freeze_at >= 1:
                part.freeze()  # type: ignore[operator]
        return self

    @staticmethod
    def make_default_stages(
        depth: int, block_class: type[CNNBlockBase] | None = None, **kwargs: Any
    ) -> list[list[CNNBlockBase]]:
        """Return the four stages of a ResNet as in the paper.

        Args:
            depth: 18, 34, 50, 101 or 152.
            block_class: None takes the paper's: basic blocks for 18 and 34, bottlenecks from 50 on.
            **kwargs: Further arguments of `make_stage`, e.g. `norm`; not strides and channels,
                which follow.

        Raises:
            ValueError: The depth is none of those.
        """
        check_depth("depth", depth)
        if block_class is None:
            block_class = BasicBlock if depth < 50 else BottleneckBlock
        out_channels = [64, 128, 256, 512] if depth < 50 else [256, 512, 1024, 2048]
        stages = []
        in_channels = 64
        for num_blocks, stride, channels in zip(
            BLOCKS_PER_STAGE[depth], (1, 2, 2, 2), out_channels, strict=True
        ):
            if issubclass(block_class, BottleneckBlock):
                kwargs["bottleneck_channels"] = channels // 4
            strides = [stride] + [1] * (num_blocks - 1)
            stages.append(
                make_stage(
                    block_class,
                    num_blocks,
                    in_channels=in_channels,
                    out_channels=channels,
                    stride_per_block=strides,
                    **kwargs,
                )
            )
            in_channels = channels
        return stages


def check_depth(where: str, depth: int) -> None:
    """Check that there is a ResNet of a depth; the error says `where` it was asked for."""
    if depth not in BLOCKS_PER_STAGE:
        raise ValueError(f"{where} must be one of {list(BLOCKS_PER_STAGE)}: got {depth}")


def check_features(where: str, features: Sequence[str], known: Sequence[str]) -> None:
    """Check that features are known, and that there is one; the error says `where` they were asked
    for.
    """
    if len(features) == 0:
        raise ValueError(f"{where} needs at least one of {list(known)}: got none")
    for name in features:
        if name not in known:
            raise ValueError(
                f"{where} must be of {list(known)}: got {name!r}.{did_you_mean(name, known)}"
            )
