"""One segment per pixel, from instances and a map of classes.

Source: Kirillov et al. 2018, arXiv 1801.00868, section 7, as Kirillov et al. 2019, arXiv
    1901.02446, apply it.

Legend: M instances, H x W pixels.
"""

from typing import Any

import torch
from torch import Tensor

from detkit.structures import Instances

# The semantic branch of Panoptic FPN calls every thing "class 0": which thing it is, the instances
# say.
_THINGS = 0


def combine_semantic_and_instance_outputs(
    instance_results: Instances,
    semantic_results: Tensor,
    overlap_threshold: float,
    stuff_area_thresh: float,
    instances_score_thresh: float,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Lay instances over each other, best first, and fill what is left with stuff.

    Args:
        instance_results: `pred_masks` (M, H, W), `scores` and `pred_classes`.
        semantic_results: (H, W) int64 class per pixel; 0 stands for all things.
        overlap_threshold: Largest share of an instance that better ones may cover; it is dropped
            beyond, and else gets the pixels that are left.
        stuff_area_thresh: Stuff that is left with fewer pixels is dropped. So is any without a
            pixel.
        instances_score_thresh: Instances below this score are dropped.

    Returns:
        (H, W) int32, the `id` of the segment of each pixel, from 1, or 0 where there is none; and a
        dict per segment in the order of ids: `id`, `isthing`, `category_id` (of things or of
        stuff), `score` and `instance_id` (index in `instance_results`) of a thing, `area` in pixels
        of stuff.

    Raises:
        ValueError: Masks and map differ in size.
    """
    masks = instance_results.pred_masks
    if tuple(masks.shape[1:]) != tuple(semantic_results.shape):
        raise ValueError(
            f"instance masks and semantic map must have one size: got {tuple(masks.shape[1:])} and "
            f"{tuple(semantic_results.shape)}"
        )
    segments, things = _lay_instances(
        instance_results, semantic_results, overlap_threshold, instances_score_thresh
    )
    segments, stuff = _fill_with_stuff(
        segments, semantic_results, stuff_area_thresh, first_id=len(things) + 1
    )
    return segments, things + stuff


def _lay_instances(
    instances: Instances, semantic: Tensor, overlap_threshold: float, score_thresh: float
) -> tuple[Tensor, list[dict[str, Any]]]:
    device = semantic.device
    segments = torch.zeros_like(semantic, dtype=torch.int32)
    scores = instances.scores.to(device)
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= score_thresh]
    masks = instances.pred_masks.to(device=device, dtype=torch.bool)
    last_id = torch.zeros((), dtype=torch.int32, device=device)
    kept = torch.zeros(len(order), dtype=torch.bool, device=device)
    # One after the other, because what an instance keeps depends on those above it. Nothing in the
    # loop asks the device for a number: a GPU would be waited for at every instance.
    for rank, index in enumerate(order.unbind()):
        mask = masks[index]
        free = mask & (segments == 0)
        area = mask.sum()
        keep = (area > 0) & ((area - free.sum()) / area.clamp(min=1) <= overlap_threshold)
        last_id = last_id + keep
        segments = torch.where(free & keep, last_id, segments)
        kept[rank] = keep
    kept_indices = order[kept]
    classes = instances.pred_classes.to(device)
    rows = zip(
        kept_indices.tolist(),
        scores[kept_indices].tolist(),
        classes[kept_indices].tolist(),
        strict=True,
    )
    return segments, [
        {"id": i, "isthing": True, "score": score, "category_id": category, "instance_id": index}
        for i, (index, score, category) in enumerate(rows, start=1)
    ]


def _fill_with_stuff(
    segments: Tensor, semantic: Tensor, area_thresh: float, first_id: int
) -> tuple[Tensor, list[dict[str, Any]]]:
    is_free = segments == 0
    # What instances cover counts as a thing: no stuff may claim it.
    labels = torch.where(is_free, semantic, _THINGS)
    areas = torch.bincount(labels.flatten()).tolist()
    chosen = [
        label
        for label, area in enumerate(areas)
        if label != _THINGS and area >= max(area_thresh, 1)
    ]
    id_of_label = torch.zeros(len(areas), dtype=torch.int32)
    id_of_label[chosen] = torch.arange(first_id, first_id + len(chosen), dtype=torch.int32)
    filled = torch.where(is_free, id_of_label.to(semantic.device)[labels], segments)
    return filled, [
        {"id": i, "isthing": False, "category_id": label, "area": areas[label]}
        for i, label in enumerate(chosen, start=first_id)
    ]
