"""Anchors: the boxes that a head refines, laid out on the grid of every feature level.

Source: Ren et al. 2015, arXiv 1506.01497, section 3.1.1; one size per pyramid level: Lin et al.
    2016, arXiv 1612.03144.

Legend: L feature levels, A anchors per cell, H x W cells of a level, B numbers per anchor.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.layers import ShapeSpec
from detkit.structures import Boxes, RotatedBoxes
from detkit.utils.errors import ConfigError, ContractError
from detkit.utils.overriding import is_overridden, overridable
from detkit.utils.registry import Registry

ANCHOR_GENERATOR_REGISTRY = Registry("ANCHOR_GENERATOR")
"""Subclasses of `AnchorGenerator`, called as `(cfg, input_shape: list[ShapeSpec])`."""

# Anchors of recent image sizes are kept. Multi-scale training has many sizes, so there is a limit:
# at 800 x 1333 one entry of a p2-p6 pyramid takes 4.3 MB.
_MAX_CACHED_SIZES = 16


def build_anchor_generator(cfg: CfgNode, input_shape: list[ShapeSpec]) -> "AnchorGenerator":
    """Return the anchor generator that MODEL.ANCHOR_GENERATOR.NAME selects.

    Args:
        cfg: The config.
        input_shape: Shapes of the L features; their strides are used.
    """
    return ANCHOR_GENERATOR_REGISTRY.get(cfg.MODEL.ANCHOR_GENERATOR.NAME)(cfg, input_shape)


class AnchorGenerator(nn.Module):
    """Base of anchor generators: the interface that heads use."""

    box_dim: int = 4
    """Numbers that describe an anchor."""
    box_class: type[Boxes] = Boxes
    """What anchors are returned as."""

    @property
    def num_anchors(self) -> list[int]:
        """A per level."""
        raise NotImplementedError(f"{type(self).__name__} does not implement num_anchors")

    @property
    def num_cell_anchors(self) -> list[int]:
        """The same as `num_anchors`."""
        return self.num_anchors

    def forward(self, features: Sequence[Tensor]) -> list[Boxes]:
        """Return the anchors of every level, ordered by row, column, anchor as predictions are.

        Args:
            features: L maps (N, C, H, W); only their sizes matter.

        Returns:
            Per level H * W * A boxes.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement forward")


@ANCHOR_GENERATOR_REGISTRY.register()
class DefaultAnchorGenerator(AnchorGenerator):
    """Places the same A anchors, sizes times aspect ratios, around every cell of a level.

    Sizes vary slowest: the anchors of a cell are (size 0, ratio 0), (size 0, ratio 1), ... A size
    is the square root of the area in pixels; a ratio is height / width.

    Example:
        >>> import torch
        >>> from detkit.modeling import DefaultAnchorGenerator
        >>> generator = DefaultAnchorGenerator(sizes=[[32.0]], aspect_ratios=[[1.0]], strides=[16])
        >>> (anchors,) = generator([torch.zeros(1, 256, 2, 3)])
        >>> len(anchors), anchors.tensor[0].tolist()
        (6, [-8.0, -8.0, 24.0, 24.0])
    """

    @configurable
    def __init__(
        self,
        *,
        sizes: Sequence[Sequence[float]] | Sequence[float],
        aspect_ratios: Sequence[Sequence[float]] | Sequence[float],
        strides: Sequence[int],
        offset: float = 0.5,
    ) -> None:
        """Lay out the anchors of one cell per level.

        Args:
            sizes: One list per level; a single list, or plain numbers, serve all levels.
            aspect_ratios: Likewise.
            strides: Stride of each of the L levels, in pixels.
            offset: Centre of the first anchor in units of the stride, in [0, 1). 0 is the corner of
                the cell.

        Raises:
            ValueError: The lists do not fit the number of levels.
            ValueError: A size or ratio is not positive.
            ValueError: `offset` is out of range.
        """
        super().__init__()
        self._lay_out(strides, offset, sizes=sizes, aspect_ratios=aspect_ratios)

    def _lay_out(self, strides: Sequence[int], offset: float, **lists: Sequence[Any]) -> None:
        """Keep the anchors of a cell per level, from `lists` by the names of the arguments."""
        if not 0.0 <= offset < 1.0:
            raise ContractError(f"offset must be in [0, 1), got {offset}")
        self.strides = list(strides)
        self.offset = offset
        per_level = [_per_level(lists[name], len(self.strides), name) for name in lists]
        for i, anchors in enumerate(self._calculate_anchors(*per_level)):
            # Not persistent: anchors follow from the config, and Detectron2's checkpoints do not
            # hold them.
            self.register_buffer(f"cell_anchors_{i}", anchors, persistent=False)
        self._cache: dict[Any, list[Tensor]] = {}

    def _calculate_anchors(self, *per_level: list[list[float]]) -> Iterable[Tensor]:
        """Return the anchors of a cell per level, from the sizes, ratios, ... of each."""
        levels = zip(*per_level, strict=True)
        return [self.generate_cell_anchors(*level).float() for level in levels]

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        """Map config keys to arguments."""
        return {
            "sizes": cfg.MODEL.ANCHOR_GENERATOR.SIZES,
            "aspect_ratios": cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS,
            "strides": [shape.stride for shape in input_shape],
            "offset": cfg.MODEL.ANCHOR_GENERATOR.OFFSET,
        }

    def generate_cell_anchors(
        self,
        sizes: Sequence[float] = (32, 64, 128, 256, 512),
        aspect_ratios: Sequence[float] = (0.5, 1, 2),
    ) -> Tensor:
        """Return the anchors of one cell; see the function of this name."""
        return generate_cell_anchors(sizes, aspect_ratios)

    @property
    def num_features(self) -> int:
        """Number of levels L."""
        return len(self.strides)

    @property
    def cell_anchors(self) -> list[Tensor]:
        """Per level the (A, 4) anchors of a cell, centred at (0, 0)."""
        return [self.get_buffer(f"cell_anchors_{i}") for i in range(self.num_features)]

    @property
    def num_anchors(self) -> list[int]:
        """A per level."""
        return [len(anchors) for anchors in self.cell_anchors]

    def forward(self, features: Sequence[Tensor]) -> list[Boxes]:
        """Return the anchors of every level; see `AnchorGenerator`.

        The coordinates are shared between calls and must not be changed in place.
        """
        if len(features) != self.num_features:
            raise ValueError(
                f"anchors are laid out for {self.num_features} feature levels, got {len(features)}"
            )
        if torch.compiler.is_exporting():  # sizes are no numbers to look up
            grids = self._grid_anchors(tuple((f.shape[-2], f.shape[-1]) for f in features))
            return [self.box_class(anchors) for anchors in grids]
        grid_sizes = tuple((int(f.shape[-2]), int(f.shape[-1])) for f in features)
        if is_overridden(self._grid_anchors):
            return [self.box_class(anchors) for anchors in self._grid_anchors(grid_sizes)]
        key = (grid_sizes, self.cell_anchors_0.device, self.cell_anchors_0.dtype)
        cached = self._cache
        grids = cached.get(key)
        if grids is None:
            # A tensor created in inference mode could not take part in a later training step.
            with torch.inference_mode(False), torch.no_grad():
                grids = self._grid_anchors(grid_sizes)
        # The latest last, in a new dict: threads that share the model may be reading the old one.
        others = [(other, cached[other]) for other in cached if other != key]
        self._cache = dict([*others[1 - _MAX_CACHED_SIZES :], (key, grids)])
        return [self.box_class(anchors) for anchors in grids]

    @overridable
    def _grid_anchors(self, grid_sizes: tuple[tuple[int, int], ...]) -> list[Tensor]:
        """Return the (H * W * A, B) anchors of each level, from its H and W."""
        grids = []
        levels = zip(self.cell_anchors, grid_sizes, self.strides, strict=True)
        for cell_anchors, size, stride in levels:
            grids.append(anchor_grid(cell_anchors, size, (stride, stride), self.offset))
        return grids


def generate_cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """Return the anchors of one cell, centred at (0, 0).

    Args:
        sizes: Square roots of the areas, in pixels.
        aspect_ratios: Height / width.

    Returns:
        (sizes * ratios, 4) float32, sizes varying slowest.
    """
    anchors = []
    for size in sizes:
        for ratio in aspect_ratios:
            width = math.sqrt(size**2 / ratio)
            height = ratio * width
            anchors.append([-width / 2, -height / 2, width / 2, height / 2])
    return torch.tensor(anchors, dtype=torch.float32)


def anchors_per_level(model: nn.Module) -> list[tuple[int, float, np.ndarray]]:
    """Return stride, offset and (A, 4) anchors of a cell, for each level of a model.

    Only heads that match anchors with objects by overlap have them (FCOS has cells alone). Empty
    for rotated anchors, and for generators other than `DefaultAnchorGenerator`.
    """
    levels = []
    for head in model.modules():
        generator = getattr(head, "anchor_generator", None)
        if not hasattr(head, "anchor_matcher") or not isinstance(generator, DefaultAnchorGenerator):
            continue
        for stride, cells in zip(generator.strides, generator.cell_anchors, strict=True):
            if generator.box_dim == 4:
                levels.append((stride, generator.offset, cells.detach().cpu().numpy()))
    return levels


def anchor_grid(
    cell_anchors: Tensor, grid_size: tuple[int, int], strides: tuple[int, int], offset: float
) -> Tensor:
    """Return (H * W * A, B) anchors: those of a cell, shifted to every cell.

    Args:
        cell_anchors: (A, B): XYXY, or XYWHA of rotated ones.
        grid_size: (H, W)
        strides: Pixels from row to row, and from column to column.
        offset: Centre of the first anchor in units of the stride.
    """
    height, width = grid_size
    device = cell_anchors.device
    y = (torch.arange(height, device=device, dtype=torch.float32) + offset) * strides[0]
    x = (torch.arange(width, device=device, dtype=torch.float32) + offset) * strides[1]
    y, x = torch.meshgrid(y, x, indexing="ij")
    is_upright = cell_anchors.shape[1] == 4
    shifts = torch.stack([x, y, x, y] if is_upright else [x, y, *[torch.zeros_like(x)] * 3], dim=-1)
    # (H, W, 1, B) + (A, B): anchors of a cell vary fastest, as in the head's channels-last output.
    return (shifts[:, :, None] + cell_anchors).reshape(-1, cell_anchors.shape[1])


def _per_level(values: Sequence[Any], num_levels: int, name: str) -> list[list[float]]:
    """Return one list of numbers per level, from an argument that may give one for all levels."""
    if not isinstance(values, Sequence):
        raise ContractError(f"{name} must be a list, got {values}")
    if values and not isinstance(values[0], Sequence):
        values = [values]
    per_level = [list(level) for level in values]
    if len(per_level) == 1:
        per_level = per_level * num_levels
    if len(per_level) != num_levels:
        raise ContractError(
            f"{name} must be one list for all, or one for each of the {num_levels} feature levels;"
            f" got {len(per_level)} lists: {values}"
        )
    is_length = name in ("sizes", "aspect_ratios")  # not angles, nor what a subclass has of its own
    for level in per_level:
        kind = "positive numbers" if is_length else "numbers"
        if not level or (is_length and not all(v > 0 for v in level)):
            raise ContractError(f"{name} must have {kind} on every level, got {values}")
    return per_level


def same_on_all_levels(values: Sequence[int | None], what: str, key: str) -> int:
    """Return the number that all levels share, as a head needs it that serves all of them.

    Args:
        values: One per level.
        what: What they count, for the message.
        key: Config key to change, for the message.

    Raises:
        ConfigError: They differ, or are not known.
    """
    if len(set(values)) != 1 or values[0] is None:
        raise ConfigError(
            f"{key}: one head serves all levels, which need the same {what}; got {list(values)}"
        )
    return values[0]


@ANCHOR_GENERATOR_REGISTRY.register()
class TorchvisionAnchorGenerator(DefaultAnchorGenerator):
    """Anchors as torchvision's detectors have them, for weights that were trained with them.

    Their corners are on whole pixels, and aspect ratios vary slowest. The stride of a level is the
    side of the image divided by that of the level, rounded down. It differs from the nominal one on
    levels that pooling rounds up: an image of 800 pixels has 25 rows on p5 and 13 on p6, which
    makes 61 pixels instead of 64.
    """

    def generate_cell_anchors(
        self, sizes: Sequence[float], aspect_ratios: Sequence[float]
    ) -> Tensor:
        """Return (ratios * sizes, 4) float32 anchors centred at (0, 0), ratios varying slowest."""
        # In float32 and in torchvision's order of operations: some corners lie halfway between
        # pixels, and would round to the other side.
        height_factors = torch.tensor(aspect_ratios, dtype=torch.float32).sqrt()[:, None]
        scales = torch.tensor(sizes, dtype=torch.float32)[None]
        widths = (1 / height_factors * scales).flatten()
        heights = (height_factors * scales).flatten()
        return (torch.stack([-widths, -heights, widths, heights], dim=1) / 2).round()

    @overridable
    def _grid_anchors(self, grid_sizes: tuple[tuple[int, int], ...]) -> list[Tensor]:
        # The finest level has the nominal stride: images are padded to multiples of a coarser one.
        height, width = (side * self.strides[0] for side in grid_sizes[0])
        grids = []
        for cell_anchors, size in zip(self.cell_anchors, grid_sizes, strict=True):
            strides = (height // size[0], width // size[1])
            grids.append(anchor_grid(cell_anchors, size, strides, self.offset))
        return grids


@ANCHOR_GENERATOR_REGISTRY.register()
class RotatedAnchorGenerator(DefaultAnchorGenerator):
    """Places the same A rotated anchors, sizes times aspect ratios times angles, around every cell.

    Angles vary fastest, then ratios, then sizes. A ratio is height / width before the anchor is
    turned.

    Source: Ma et al. 2017, arXiv 1703.01086, section III-C.

    Example:
        >>> import torch
        >>> from detkit.modeling import RotatedAnchorGenerator
        >>> generator = RotatedAnchorGenerator(
        ...     sizes=[[32.0]], aspect_ratios=[[1.0]], strides=[16], angles=[[0, 45]]
        ... )
        >>> (anchors,) = generator([torch.zeros(1, 256, 2, 3)])
        >>> len(anchors), anchors.tensor[1].tolist()
        (12, [8.0, 8.0, 32.0, 32.0, 45.0])
    """

    box_dim = 5
    box_class = RotatedBoxes

    @configurable
    def __init__(
        self,
        *,
        sizes: Sequence[Sequence[float]] | Sequence[float],
        aspect_ratios: Sequence[Sequence[float]] | Sequence[float],
        strides: Sequence[int],
        angles: Sequence[Sequence[float]] | Sequence[float],
        offset: float = 0.5,
    ) -> None:
        """Lay out the anchors of one cell per level; arguments as in `DefaultAnchorGenerator`.

        Args:
            angles: In degrees, counter-clockwise: one list per level; a single list, or plain
                numbers, serve all levels.
        """
        super(DefaultAnchorGenerator, self).__init__()
        self._lay_out(strides, offset, sizes=sizes, aspect_ratios=aspect_ratios, angles=angles)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        """Map config keys to arguments."""
        angles = cfg.MODEL.ANCHOR_GENERATOR.ANGLES
        return {**super().from_config(cfg, input_shape), "angles": angles}

    def generate_cell_anchors(
        self,
        sizes: Sequence[float] = (32, 64, 128, 256, 512),
        aspect_ratios: Sequence[float] = (0.5, 1, 2),
        angles: Sequence[float] = (-90, -60, -30, 0, 30, 60, 90),
    ) -> Tensor:
        """Return (sizes * ratios * angles, 5) float32 anchors centred at (0, 0)."""
        upright = generate_cell_anchors(sizes, aspect_ratios)
        anchors = upright.new_zeros(len(upright), len(angles), 5)
        anchors[..., 2:4] = (upright[:, 2:] - upright[:, :2])[:, None]
        anchors[..., 4] = torch.tensor(angles, dtype=torch.float32)
        return anchors.flatten(0, 1)


class BufferList(nn.Module):
    """A list of tensors that move with the module and are not saved with it."""

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        super().__init__()
        for i, buffer in enumerate(buffers):
            self.register_buffer(str(i), buffer, persistent=False)

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[Tensor]:
        return (buffer for buffer in self._buffers.values() if buffer is not None)
