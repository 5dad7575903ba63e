"""Panoptic FPN: instances, a class for every pixel, and both merged, from one backbone.

Source: Kirillov et al. 2019, arXiv 1901.02446; the merging: Kirillov et al. 2018, arXiv 1801.00868,
    section 7.

Legend: N images, K classes of pixels, M instances, H x W pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detkit.config import BRANCHES, CfgNode, configurable, declare_architecture
from detkit.modeling.backbone import Backbone
from detkit.modeling.meta_arch.build import META_ARCH_REGISTRY, build_sem_seg_head
from detkit.modeling.meta_arch.rcnn import GeneralizedRCNN
from detkit.modeling.meta_arch.semantic_seg import rescale_sem_seg, sem_seg_targets
from detkit.modeling.postprocessing import detector_postprocess
from detkit.modeling.roi_heads import ROIHeads
from detkit.structures import Instances, ModelInput, ModelOutput
from detkit.utils.errors import ConfigError
from detkit.utils.overriding import overridable


@META_ARCH_REGISTRY.register()
@declare_architecture(
    num_classes="MODEL.ROI_HEADS.NUM_CLASSES",
    num_stuff_classes="MODEL.SEM_SEG_HEAD.NUM_CLASSES",
    score_thresholds=[
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
        "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH",
    ],
    nms_threshold="MODEL.ROI_HEADS.NMS_THRESH_TEST",
    # Rotated boxes have no masks, which it merges.
    branches=[key for key in BRANCHES if key != "MODEL.ROTATED_BOXES"],
)
class PanopticFPN(GeneralizedRCNN):
    """A `GeneralizedRCNN` with a head that classifies pixels beside it."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        proposal_generator: nn.Module | None,
        roi_heads: ROIHeads,
        sem_seg_head: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str | None = None,
        vis_period: int = 0,
        instance_loss_weight: float = 1.0,
        combine_on: bool = True,
        combine_overlap_thresh: float = 0.5,
        combine_stuff_area_thresh: float = 4096,
        combine_instances_score_thresh: float = 0.5,
    ) -> None:
        """Set the parts. Arguments that are not listed are those of `GeneralizedRCNN`.

        Args:
            roi_heads: See `ROIHeads`. They predict masks, unless `combine_on` is off.
            sem_seg_head: See `SEM_SEG_HEADS_REGISTRY`.
            instance_loss_weight: Factor on the losses of `roi_heads`.
            combine_on: Whether to merge instances and pixel classes into `panoptic_seg`.
            combine_overlap_thresh: See `combine_semantic_and_instance_outputs`.
            combine_stuff_area_thresh: Likewise.
            combine_instances_score_thresh: Likewise.
        """
        super().__init__(
            backbone=backbone,
            proposal_generator=proposal_generator,
            roi_heads=roi_heads,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            input_format=input_format,
            vis_period=vis_period,
        )
        self.sem_seg_head = sem_seg_head
        self.instance_loss_weight = instance_loss_weight
        self.combine_on = combine_on
        self.combine_overlap_thresh = combine_overlap_thresh
        self.combine_stuff_area_thresh = combine_stuff_area_thresh
        self.combine_instances_score_thresh = combine_instances_score_thresh

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Map config keys to arguments."""
        arguments = super().from_config(cfg)
        panoptic = cfg.MODEL.PANOPTIC_FPN
        if panoptic.COMBINE.ENABLED and not cfg.MODEL.MASK_ON:
            raise ConfigError(
                "PanopticFPN merges masks into its result: set MODEL.MASK_ON to True, or"
                " MODEL.PANOPTIC_FPN.COMBINE.ENABLED to False"
            )
        return {
            **arguments,
            "sem_seg_head": build_sem_seg_head(cfg, arguments["backbone"].output_shape()),
            "instance_loss_weight": panoptic.INSTANCE_LOSS_WEIGHT,
            "combine_on": panoptic.COMBINE.ENABLED,
            "combine_overlap_thresh": panoptic.COMBINE.OVERLAP_THRESH,
            "combine_stuff_area_thresh": panoptic.COMBINE.STUFF_AREA_LIMIT,
            "combine_instances_score_thresh": panoptic.COMBINE.INSTANCES_CONFIDENCE_THRESH,
        }

    def training_losses(self, batched_inputs: list[ModelInput]) -> dict[str, Tensor]:
        """Return the losses of all heads and of the proposal generator by name.

        Args:
            batched_inputs: N inputs with `instances` and `sem_seg`.
        """
        images = self.preprocess_image(batched_inputs)
        labels = sem_seg_targets(batched_inputs, images, self.sem_seg_head)
        features = self.backbone(images.tensor)
        _, sem_seg_losses = self.sem_seg_head(features, labels)
        head_losses, proposal_losses = self.instance_losses(images, features, batched_inputs)
        # The factor lambda_i of the paper (section 3, training). As in Detectron2 it leaves out the
        # losses of the RPN.
        weighted = {name: loss * self.instance_loss_weight for name, loss in head_losses.items()}
        return {**sem_seg_losses, **proposal_losses, **weighted}

    @overridable
    def inference(
        self,
        batched_inputs: list[ModelInput],
        detected_instances: list[Instances] | bool | None = None,
        do_postprocess: bool = True,
    ) -> Any:
        """Return `instances`, `sem_seg` scores (K, height, width) and `panoptic_seg` per image.

        Args:
            batched_inputs: N inputs.
            detected_instances: See `GeneralizedRCNN`; the output then is instances alone, as there.
                A bool stands for `do_postprocess`, which comes second in Detectron2.
            do_postprocess: Whether to rescale to the size that each input asks for, and merge.
                Otherwise a list of Instances and a tensor (N, K, H, W) of scores are returned, in
                the coordinates of the padded inputs.
        """
        if isinstance(detected_instances, bool):  # second in Detectron2
            detected_instances, do_postprocess = None, detected_instances
        if detected_instances is not None:
            return super().inference(batched_inputs, detected_instances, do_postprocess)
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        # One backbone pass for both heads, which is the point of the model.
        scores, _ = self.sem_seg_head(features, None)
        found = self.find_instances(images, features, batched_inputs)
        if not do_postprocess:
            return found, scores
        outputs: list[ModelOutput] = []
        sem_segs = rescale_sem_seg(scores, images, batched_inputs)
        for found_i, sem_seg in zip(found, sem_segs, strict=True):
            instances = detector_postprocess(found_i, *sem_seg.shape[-2:])
            output: ModelOutput = {"instances": instances, "sem_seg": sem_seg}
            if self.combine_on:
                output["panoptic_seg"] = combine_semantic_and_instance_outputs(
                    instances,
                    sem_seg.argmax(dim=0),
                    self.combine_overlap_thresh,
                    self.combine_stuff_area_thresh,
                    self.combine_instances_score_thresh,
                )
            outputs.append(output)
        return outputs


# The semantic branch of Panoptic FPN has one class for all things; instances tell which.
_THINGS = 0


def combine_semantic_and_instance_outputs(
    instance_results: Instances,
    semantic_results: Tensor,
    overlap_threshold: float,
    stuff_area_thresh: float,
    instances_score_thresh: float,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Paint instances, best first, and fill the remaining pixels with stuff.

    Args:
        instance_results: `pred_masks` (M, H, W), `scores` and `pred_classes`.
        semantic_results: (H, W) int64 class per pixel; 0 stands for all things.
        overlap_threshold: Largest share of an instance that better ones may cover. Beyond it the
            instance is dropped; otherwise it keeps the pixels that are left.
        stuff_area_thresh: Stuff of fewer remaining pixels, or of none, is dropped.
        instances_score_thresh: Instances below this score are dropped.

    Returns:
        (H, W) int32, the `id` of the segment of each pixel, from 1, or 0 for none.
        A dict per segment, in the order of ids: `id`, `isthing`, `category_id` (of things or of
        stuff); `score` and `instance_id` (index in `instance_results`) of a thing; `area` in pixels
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
    segments, things = _paint_instances(
        instance_results, semantic_results, overlap_threshold, instances_score_thresh
    )
    segments, stuff = _fill_with_stuff(
        segments, semantic_results, stuff_area_thresh, first_id=len(things) + 1
    )
    return segments, things + stuff


def _paint_instances(
    instances: Instances, semantic: Tensor, overlap_threshold: float, score_thresh: float
) -> tuple[Tensor, list[dict[str, Any]]]:
    device = semantic.device
    segments = torch.zeros_like(semantic, dtype=torch.int32)
    scores = instances.scores.to(device)
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= score_thresh]
    masks = instances.pred_masks.to(device=device, dtype=torch.bool)
    # The id of an instance is the number of those kept so far; both stay on the device.
    last_id = torch.zeros((), dtype=torch.int32, device=device)
    kept = torch.zeros(len(order), dtype=torch.bool, device=device)
    # One after the other, because the pixels of an instance depend on those above it. Nothing in
    # the loop reads a number from the device, which would wait for a GPU at every instance.
    for rank, index in enumerate(order.unbind()):
        mask = masks[index]
        free = mask & (segments == 0)
        area = mask.sum()
        keep = (area > 0) & ((area - free.sum()) / area.clamp(min=1) <= overlap_threshold)
        last_id = last_id + keep
        segments = torch.where(free & keep, last_id, segments)
        kept[rank] = keep
    kept_indices = order[kept]
    kept_scores = scores[kept_indices].tolist()
    kept_classes = instances.pred_classes.to(device)[kept_indices].tolist()
    things: list[dict[str, Any]] = []
    rows = zip(kept_indices.tolist(), kept_scores, kept_classes, strict=True)
    for i, (index, score, category) in enumerate(rows, start=1):
        thing = {"id": i, "isthing": True, "score": score, "category_id": category}
        things.append({**thing, "instance_id": index})
    return segments, things


def _fill_with_stuff(
    segments: Tensor, semantic: Tensor, area_thresh: float, first_id: int
) -> tuple[Tensor, list[dict[str, Any]]]:
    is_free = segments == 0
    # Pixels that instances cover count as things, so that no stuff claims them.
    labels = torch.where(is_free, semantic, _THINGS)
    areas = torch.bincount(labels.flatten()).tolist()
    id_of_label = torch.zeros(len(areas), dtype=torch.int32)
    stuff: list[dict[str, Any]] = []
    for label, area in enumerate(areas):
        if label != _THINGS and area >= max(area_thresh, 1):
            i = first_id + len(stuff)
            id_of_label[label] = i
            stuff.append({"id": i, "isthing": False, "category_id": label, "area": area})
    # A table of ids by label, looked up for all pixels at once.
    filled = torch.where(is_free, id_of_label.to(semantic.device)[labels], segments)
    return filled, stuff
