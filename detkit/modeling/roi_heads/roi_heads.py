"""What all ROI heads share: matching proposals with the ground truth and sampling them.

Legend: N images, R proposals of one image, S sampled proposals of one image, M objects in one
    image, K classes.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.layers import nonzero_tuple
from detkit.modeling.matcher import Matcher
from detkit.modeling.proposal_generator.proposals import add_ground_truth_to_proposals
from detkit.modeling.sampling import subsample_labels
from detkit.structures import ImageList, Instances
from detkit.utils.errors import DataError
from detkit.utils.events import get_event_storage, has_event_storage

Features: TypeAlias = dict[str, Tensor]
"""Features of the backbone, by name."""
Losses: TypeAlias = dict[str, Tensor]
"""Scalar losses, by name."""


class ROIHeads(nn.Module):
    """Base of the heads that classify and refine regions.

    A subclass implements `losses` and `predict`, or a `forward` of its own.
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        batch_size_per_image: int,
        positive_fraction: float,
        proposal_matcher: Matcher,
        proposal_append_gt: bool = True,
    ) -> None:
        """Set how proposals are sampled for training.

        Args:
            num_classes: K, without background. Background is class K.
            batch_size_per_image: Proposals per image that the losses sample.
            positive_fraction: Largest share of foreground among them.
            proposal_matcher: Labels proposals by their IoU with the ground truth.
            proposal_append_gt: Whether to add the ground truth to the proposals.
        """
        super().__init__()
        self.num_classes = num_classes
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.proposal_matcher = proposal_matcher
        self.proposal_append_gt = proposal_append_gt

    @classmethod
    def from_config(cls, cfg: CfgNode, *args: Any) -> dict[str, Any]:
        """Map config keys to the arguments of this base class."""
        heads = cfg.MODEL.ROI_HEADS
        return {
            "num_classes": heads.NUM_CLASSES,
            "batch_size_per_image": heads.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": heads.POSITIVE_FRACTION,
            # Unlike anchors, proposals below the threshold are never foreground.
            "proposal_matcher": Matcher(heads.IOU_THRESHOLDS, heads.IOU_LABELS),
            "proposal_append_gt": heads.PROPOSAL_APPEND_GT,
        }

    def forward(
        self,
        images: ImageList,
        features: Features,
        proposals: Sequence[Instances],
        targets: Sequence[Instances] | None = None,
    ) -> tuple[list[Instances], Losses]:
        """Compute the losses of sampled proposals in training, else the detections.

        Args:
            images: The batch.
            features: Features of the backbone, by name.
            proposals: N proposals with `proposal_boxes`.
            targets: N ground truths, in training.

        Returns:
            In training the sampled proposals and the losses by name; in inference the detections
            (`pred_boxes`, `scores`, `pred_classes`) and an empty dict.

        Raises:
            ValueError: There is no ground truth in training.
        """
        if not self.training:
            return self.predict(features, proposals), {}
        if targets is None:
            raise ValueError("the ROI heads need ground truth in training: targets is None")
        sampled = self.label_and_sample_proposals(proposals, targets)
        return sampled, self.losses(features, sampled, targets)

    def losses(
        self, features: Features, proposals: Sequence[Instances], targets: Sequence[Instances]
    ) -> Losses:
        """Return the losses by name.

        Args:
            features: Features of the backbone, by name.
            proposals: Output of `label_and_sample_proposals`.
            targets: N ground truths.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement losses")

    def predict(self, features: Features, proposals: Sequence[Instances]) -> list[Instances]:
        """Return the detections of every image."""
        raise NotImplementedError(f"{type(self).__name__} does not implement predict")

    def predict_boxes_only(
        self, images: ImageList, features: Features, proposals: Sequence[Instances]
    ) -> list[Instances]:
        """Return detections with `pred_boxes`, `scores` and `pred_classes`; the rest is not used.

        Test-time augmentation merges the boxes of all views before it asks for masks. Heads with
        further branches override this to leave them out.
        """
        detections, _ = self.forward(images, features, proposals)
        return detections

    def forward_with_given_boxes(
        self, features: Features, instances: Sequence[Instances]
    ) -> list[Instances]:
        """Add the fields of the other branches, such as masks, to detected boxes.

        Args:
            features: Features of the backbone, by name.
            instances: N detections with `pred_boxes` and `pred_classes`.

        Returns:
            The detections with further fields.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not implement forward_with_given_boxes"
        )

    def _check_given(self, instances: Sequence[Instances]) -> None:
        """Raise unless `forward_with_given_boxes` can work on these instances now."""
        if self.training:
            raise RuntimeError("forward_with_given_boxes predicts: call eval() on the model first")
        for i, instances_i in enumerate(instances):
            for name in ("pred_boxes", "pred_classes"):
                if not instances_i.has(name):
                    raise ValueError(f"given instances of image {i} need a field {name!r}")

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: Sequence[Instances], targets: Sequence[Instances]
    ) -> list[Instances]:
        """Sample the proposals that the losses use, and attach their ground truth.

        Args:
            proposals: N proposals with `proposal_boxes`. Not changed.
            targets: N ground truths with `gt_boxes` and `gt_classes`.

        Returns:
            Per image S proposals with `gt_classes`, in [0, K], K for background. Images with
            objects also have every `gt_*` field of the target; its values mean something for
            foreground only.
        """
        if self.proposal_append_gt:
            proposals = add_ground_truth_to_proposals(targets, proposals)
        sampled: list[Instances] = []
        for proposals_i, targets_i in zip(proposals, targets, strict=True):
            matches, labels = self.proposal_matcher.match_boxes(
                targets_i.gt_boxes, proposals_i.proposal_boxes
            )
            picked, classes = self._sample_proposals(matches, labels, targets_i.gt_classes)
            sampled_i = proposals_i[picked]
            sampled_i.gt_classes = classes
            if len(targets_i) > 0:
                picked_matches = matches[picked]
                for name, value in targets_i.get_fields().items():
                    if name.startswith("gt_") and not sampled_i.has(name):
                        sampled_i.set(name, value[picked_matches])
            sampled.append(sampled_i)
        self._log_sample(sampled)
        return sampled

    def _sample_proposals(
        self, matches: Tensor, labels: Tensor, gt_classes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sample the proposals of one image by the class they are matched with.

        Args:
            matches: (R,) index of the ground truth, in [0, M).
            labels: (R,) 1 foreground, 0 background, -1 ignored.
            gt_classes: (M,) classes of the ground truth.

        Returns:
            (S,) indices of the sampled proposals, foreground first, and their (S,) classes.
        """
        if len(gt_classes) > 0:
            classes = gt_classes[matches].masked_fill(labels == 0, self.num_classes)
            classes = classes.masked_fill(labels == -1, -1)
        else:
            classes = torch.full_like(matches, self.num_classes)
        # Waits for the device: the number of sampled proposals is a shape of all that follows.
        picked = torch.cat(
            subsample_labels(
                classes, self.batch_size_per_image, self.positive_fraction, self.num_classes
            )
        )
        return picked, classes[picked]

    def _log_sample(self, sampled: Sequence[Instances]) -> None:
        if not has_event_storage() or not sampled:
            return
        is_background = [(p.gt_classes == self.num_classes).sum() for p in sampled]
        num_background = torch.stack(is_background).float().mean()
        num_sampled = sum(len(p) for p in sampled) / len(sampled)
        storage = get_event_storage()
        storage.put_scalar("roi_head/num_fg_samples", num_sampled - num_background)
        storage.put_scalar("roi_head/num_bg_samples", num_background)


def select_foreground_proposals(
    proposals: Sequence[Instances], bg_label: int
) -> tuple[list[Instances], list[Tensor]]:
    """Select the proposals of objects, which masks and keypoints are trained on.

    Args:
        proposals: Per image S proposals with `gt_classes`.
        bg_label: Class of background. Class -1 is ignored and not selected either.

    Returns:
        The foreground proposals of each image, and per image the (S,) bool mask that selects them.

    Raises:
        ValueError: Proposals have no `gt_classes`.
    """
    for i, proposals_i in enumerate(proposals):
        if not proposals_i.has("gt_classes"):
            raise ValueError(
                f"proposals of image {i} have no gt_classes: they must come from"
                " label_and_sample_proposals"
            )
    masks = [(p.gt_classes != -1) & (p.gt_classes != bg_label) for p in proposals]
    # Indices, not the mask: each field that a mask selects from would wait for the device again.
    selected = [p[nonzero_tuple(mask)[0]] for p, mask in zip(proposals, masks, strict=True)]
    return selected, masks


def select_proposals_with_visible_keypoints(proposals: Sequence[Instances]) -> list[Instances]:
    """Select the proposals that contain at least one labelled keypoint of their object.

    The heatmap of a proposal covers the proposal only, so others have no target.

    Args:
        proposals: Per image its foreground proposals, with `proposal_boxes` and, unless there are
            none, `gt_keypoints`.

    Raises:
        DataError: Foreground proposals have no `gt_keypoints`.
    """
    selected: list[Instances] = []
    counts: list[int] = []
    for i, proposals_i in enumerate(proposals):
        # An image without foreground may come without keypoints, and does not count in the mean.
        if len(proposals_i) == 0:
            selected.append(proposals_i)
            continue
        if not proposals_i.has("gt_keypoints"):
            raise DataError(
                f"proposals of image {i} have no gt_keypoints: MODEL.KEYPOINT_ON needs a data set"
                " with keypoints"
            )
        keypoints = proposals_i.gt_keypoints.tensor
        points, visibility = keypoints[:, :, :2], keypoints[:, :, 2]
        boxes = proposals_i.proposal_boxes.tensor[:, None]
        # On the border counts as inside.
        is_inside = ((points >= boxes[..., :2]) & (points <= boxes[..., 2:])).all(dim=2)
        has_keypoint = (is_inside & (visibility >= 1)).any(dim=1)
        kept = proposals_i[nonzero_tuple(has_keypoint)[0]]
        selected.append(kept)
        counts.append(len(kept))
    if has_event_storage():
        mean = sum(counts) / max(len(counts), 1)
        get_event_storage().put_scalar("keypoint_head/num_fg_samples", mean)
    return selected
