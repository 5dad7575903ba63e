"""Detection in tiles: huge images, and small objects that a resize of the whole would lose.

Legend: M detections in one image, C channels, H and W height and width of the image.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.data import transforms as T
from detkit.data.dataset_mapper import image_to_tensor
from detkit.data.transforms.build import build_test_resize
from detkit.structures import (
    Boxes,
    Instances,
    ModelInput,
    ModelOutput,
    pairwise_ioa,
    pairwise_iou,
    union_of_rles,
    window_to_rle,
)
from detkit.utils.errors import ConfigError

# Pixels from the border of a tile within which a box may be that of an object cut there: boxes do
# not end exactly where an object does.
_BORDER = 4.0
# Boxes of two tiles are of one object if, within what both tiles show, they overlap by more.
_SAME_OBJECT = 0.5


class Tile(NamedTuple):
    """A window of an image, in pixels; `x1` and `y1` lie behind its last pixels."""

    x0: int
    y0: int
    x1: int
    y1: int


def tile_grid(image_size: tuple[int, int], size: int, overlap: float) -> list[Tile]:
    """Return tiles that cover an image, row by row.

    The last ones of a row and of a column are moved inwards, so that all are of one size.

    Args:
        image_size: `(height, width)`.
        size: Side of a tile; an image that is smaller has one of its own size there.
        overlap: Part of a tile that the next one shows, too, in [0, 1).

    Example:
        >>> [tile.x0 for tile in tile_grid((100, 250), 100, 0.2)]
        [0, 80, 150]
    """
    height, width = image_size
    step = max(1, size - round(size * overlap))
    starts = []
    for length in (height, width):
        last = max(0, length - size)
        starts.append([*range(0, last, step), last])
    return [
        Tile(x, y, min(x + size, width), min(y + size, height))
        for y in starts[0]
        for x in starts[1]
    ]


@dataclass
class _Found:
    """The detections of all tiles, in pixels of the image."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    tiles: np.ndarray
    """(M,) index of the tile."""
    is_cut: np.ndarray
    """(M,) bool: whether the object may go on behind the border of its tile."""
    masks: list[Any] | None
    """(M,) run lengths."""
    keypoints: Tensor | None


class TiledModel(nn.Module):
    """A model that detects in tiles of every image, and is called like the model itself.

    Its inputs are images of the original size: each tile is resized by itself. `image` may also be
    an array (H, W, C), or `TiffWindows`, of which no more than a tile is in memory. Detections of
    an object in several tiles are merged: those that agree within what their tiles both show are of
    one object. One that no border cuts is preferred; of an object larger than the overlap the parts
    are joined. Nothing limits the number of objects, but TEST.DETECTIONS_PER_IMAGE that of each
    tile.

    The output has `pred_masks` as a list of run lengths: bitmaps of a huge image would not fit into
    memory.
    """

    @configurable
    def __init__(
        self,
        *,
        model: nn.Module,
        resize: T.Augmentation,
        size: int,
        overlap: float = 0.2,
        merge: str = "nms",
        batch_size: int = 1,
    ) -> None:
        """Wrap a model.

        Args:
            model: Its weights are shared.
            resize: Applied to each tile.
            size: Side of a tile, in pixels of the image.
            overlap: Part of a tile that the next one shows, too; objects up to that size are whole
                in one of them.
            merge: `nms` keeps the best box of an object; `wbf` takes the mean of its boxes,
                weighted by their scores, and of the scores.
            batch_size: Tiles in one pass.

        Raises:
            ValueError: `merge` is another one, or a number is out of range.
        """
        super().__init__()
        if merge not in ("nms", "wbf"):
            raise ValueError(f"merge must be nms or wbf, got {merge!r}")
        if min(size, batch_size) < 1:
            raise ValueError(f"need a size and a batch_size of 1 or more, got {size}, {batch_size}")
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap must lie in [0, 1), got {overlap}")
        self.model, self.resize, self.size, self.overlap = model, resize, size, overlap
        self.merge, self.batch_size = merge, batch_size
        self.train(model.training)

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Map config keys to arguments."""
        if cfg.MODEL.ROTATED_BOXES:
            raise ConfigError("TEST.TILES is for upright boxes, and MODEL.ROTATED_BOXES is on")
        tiles = cfg.TEST.TILES
        return {
            "model": model,
            "resize": build_test_resize(cfg),
            "size": tiles.SIZE,
            "overlap": tiles.OVERLAP,
            "merge": tiles.MERGE,
            "batch_size": tiles.BATCH_SIZE,
        }

    @torch.no_grad()
    def forward(self, batched_inputs: list[ModelInput]) -> list[ModelOutput]:
        """Return the instances in every image.

        Raises:
            ConfigError: The model finds no instances, or the image was resized before.
        """
        return [{"instances": self._detect(x)} for x in batched_inputs]

    def _detect(self, model_input: ModelInput) -> Instances:
        image: Any = model_input["image"]
        height, width = image.shape[1:] if isinstance(image, Tensor) else image.shape[:2]
        wanted = (model_input.get("height", height), model_input.get("width", width))
        if wanted != (height, width):
            raise ConfigError(
                "TEST.TILES takes images of their original size, and resizes each tile: got one of"
                f" {height} x {width} for an output of {wanted[0]} x {wanted[1]}"
            )
        tiles = tile_grid((height, width), self.size, self.overlap)
        parts: list[_Found] = []
        for start in range(0, len(tiles), self.batch_size):
            batch = tiles[start : start + self.batch_size]
            outputs = self.model([self._tile_input(image, tile) for tile in batch])
            for index, (output, tile) in enumerate(zip(outputs, batch, strict=True), start):
                parts.append(_in_image(output, tile, index, (height, width)))
        return merged_tiles(_joined(parts), tiles, (height, width), self.merge)

    def _tile_input(self, image: Any, tile: Tile) -> ModelInput:
        rows, columns = slice(tile.y0, tile.y1), slice(tile.x0, tile.x1)
        if isinstance(image, Tensor):
            pixels = image[:, rows, columns].cpu().permute(1, 2, 0).numpy()
        else:
            pixels = image[rows, columns]
        resized = self.resize.get_transform(pixels).apply_image(pixels)
        height, width = pixels.shape[:2]
        return {"image": image_to_tensor(resized), "height": height, "width": width}


def _in_image(output: ModelOutput, tile: Tile, index: int, image_size: tuple[int, int]) -> _Found:
    """Return what was found in a tile, in pixels of the image."""
    if "instances" not in output:
        raise ConfigError(
            f"TEST.TILES needs a model that finds instances; this one gives {', '.join(output)}"
        )
    found = output["instances"].to("cpu")
    corner = torch.tensor([tile.x0, tile.y0], dtype=torch.float32)
    boxes = found.pred_boxes.tensor.float() + corner.repeat(2)
    height, width = image_size
    # Of the sides of a tile, those of the image cut nothing.
    is_cut = (
        ((boxes[:, 0] < tile.x0 + _BORDER) & (tile.x0 > 0))
        | ((boxes[:, 1] < tile.y0 + _BORDER) & (tile.y0 > 0))
        | ((boxes[:, 2] > tile.x1 - _BORDER) & (tile.x1 < width))
        | ((boxes[:, 3] > tile.y1 - _BORDER) & (tile.y1 < height))
    )
    masks = keypoints = None
    if found.has("pred_masks"):
        masks = [
            window_to_rle(mask, tile.y0, tile.x0, image_size) for mask in found.pred_masks.numpy()
        ]
    if found.has("pred_keypoints"):
        keypoints = found.pred_keypoints.clone()
        keypoints[:, :, :2] += corner
    tiles = np.full(len(boxes), index)
    return _Found(boxes, found.scores, found.pred_classes, tiles, is_cut.numpy(), masks, keypoints)


def _joined(parts: Sequence[_Found]) -> _Found:
    has_masks = parts[0].masks is not None
    has_keypoints = parts[0].keypoints is not None
    return _Found(
        torch.cat([part.boxes for part in parts]),
        torch.cat([part.scores for part in parts]),
        torch.cat([part.classes for part in parts]),
        np.concatenate([part.tiles for part in parts]),
        np.concatenate([part.is_cut for part in parts]),
        [mask for part in parts for mask in part.masks or ()] if has_masks else None,
        torch.cat([cast(Tensor, part.keypoints) for part in parts]) if has_keypoints else None,
    )


def merged_tiles(
    found: _Found, tiles: Sequence[Tile], image_size: tuple[int, int], merge: str = "nms"
) -> Instances:
    """Return each object once, best first."""
    boxes, scores, seeds = [], [], []
    masks: list[Any] = []
    for group in _groups(found, tiles):
        seed, members = group[0], torch.tensor(group)
        seeds.append(seed)
        box, score = found.boxes[seed], found.scores[seed]
        if found.is_cut[seed]:
            # The parts of an object that no tile shows whole.
            low, high = found.boxes[members].split(2, dim=1)
            box = torch.cat([low.amin(dim=0), high.amax(dim=0)])
        elif merge == "wbf":
            whole = members[torch.from_numpy(~found.is_cut[group])]
            weights = found.scores[whole].float()
            box = (found.boxes[whole] * weights[:, None]).sum(dim=0) / weights.sum().clamp(1e-12)
            score = weights.mean().to(score)
        boxes.append(box)
        scores.append(score)
        if found.masks is not None:
            parts = group if found.is_cut[seed] else [seed]
            joined = [found.masks[i] for i in parts]
            masks.append(joined[0] if len(joined) == 1 else union_of_rles(joined))
    all_scores = torch.stack(scores) if scores else found.scores
    order = all_scores.argsort(descending=True, stable=True)
    kept = torch.tensor(seeds, dtype=torch.int64)[order]
    result = Instances(image_size)
    result.pred_boxes = Boxes(torch.stack(boxes)[order] if boxes else found.boxes)
    result.scores = all_scores[order]
    result.pred_classes = found.classes[kept]
    if found.masks is not None:
        result.pred_masks = [masks[i] for i in order.tolist()]
    if found.keypoints is not None:
        result.pred_keypoints = found.keypoints[kept]
    return result


def _groups(found: _Found, tiles: Sequence[Tile]) -> list[list[int]]:
    """Return the detections of each object, by index, the one to go by first."""
    overlaps = _overlaps(found, tiles)
    is_taken = np.zeros(len(found.scores), dtype=bool)
    groups: list[list[int]] = []
    # Whole objects first: a part of one has no say where the whole is known.
    for seed in np.lexsort((-found.scores.numpy(), found.is_cut)).tolist():
        if is_taken[seed]:
            continue
        group, waiting = [seed], [seed]
        is_taken[seed] = True
        while waiting:
            of_tile: dict[int, tuple[float, int]] = {}
            for other, overlap in overlaps[waiting.pop()].items():
                if is_taken[other]:
                    continue
                if found.is_cut[other]:
                    group.append(other)
                    is_taken[other] = True
                    if found.is_cut[seed]:  # a large object goes on from tile to tile
                        waiting.append(other)
                else:
                    # A tile's own NMS has decided that its objects are several.
                    tile = int(found.tiles[other])
                    of_tile[tile] = max(of_tile.get(tile, (0.0, -1)), (overlap, other))
            for _, other in of_tile.values():
                group.append(other)
                is_taken[other] = True
        groups.append(group)
    return groups


def _overlaps(found: _Found, tiles: Sequence[Tile]) -> dict[int, dict[int, float]]:
    """Return for each detection those in other tiles that are the same object, and how well."""
    result: dict[int, dict[int, float]] = defaultdict(dict)
    members = [np.flatnonzero(found.tiles == index) for index in range(len(tiles))]
    for first, a in enumerate(tiles):
        for second, b in enumerate(tiles[first + 1 :], start=first + 1):
            if b.y0 >= a.y1:
                break  # the tiles go row by row
            if b.x0 >= a.x1 or a.x0 >= b.x1 or not len(members[first]) or not len(members[second]):
                continue
            low = torch.tensor([max(a.x0, b.x0), max(a.y0, b.y0)], dtype=torch.float32)
            high = torch.tensor([min(a.x1, b.x1), min(a.y1, b.y1)], dtype=torch.float32)
            pair = []
            for indices in (members[first], members[second]):
                near = (found.boxes[indices, :2] < high + _BORDER) & (
                    found.boxes[indices, 2:] > low - _BORDER
                )
                pair.append(indices[near.all(dim=1).numpy()])
            rows, columns = pair
            if not len(rows) or not len(columns):
                continue
            matches = _matches(found, rows, columns, low, high)
            for i, j in zip(*np.nonzero(matches), strict=True):
                row, column = int(rows[i]), int(columns[j])
                result[row][column] = result[column][row] = float(matches[i, j])
    return result


def _matches(
    found: _Found, rows: np.ndarray, columns: np.ndarray, low: Tensor, high: Tensor
) -> np.ndarray:
    """Return how well boxes agree within a region, 0 where they are of different objects."""
    cut, other_cut = (torch.from_numpy(found.is_cut[k]) for k in (rows, columns))
    boxes, others = (_clipped(found.boxes[k], low, high) for k in (rows, columns))
    # A part of an object lies within the whole, but may be found too small, or, where it is a
    # stripe of a few pixels, a little beside it: so the whole is enlarged.
    margin = torch.tensor([-_BORDER, -_BORDER, _BORDER, _BORDER])
    enlarged = _clipped(found.boxes[rows] + margin, low, high)
    others_enlarged = _clipped(found.boxes[columns] + margin, low, high)
    covered = torch.where(
        cut[:, None], pairwise_ioa(others_enlarged, boxes).T, pairwise_ioa(enlarged, others)
    )
    agreement = torch.where(cut[:, None] != other_cut, covered, pairwise_iou(boxes, others))
    same_class = found.classes[rows][:, None] == found.classes[columns]
    return torch.where(same_class & (agreement > _SAME_OBJECT), agreement, 0.0).numpy()


def _clipped(boxes: Tensor, low: Tensor, high: Tensor) -> Boxes:
    return Boxes(boxes.view(-1, 2, 2).clamp(low, high).view(-1, 4))
