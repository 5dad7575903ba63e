"""What all ROI heads share: matching proposals with the ground truth and sampling them.

Legend: N images, R proposals of one image, S sampled proposals of one image, M objects in one
    image, K classes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.layers import nonzero_tuple
from detkit.layers.tensor_ops import split_nonzero
from detkit.modeling.matcher import Matcher
from detkit.modeling.proposal_generator.proposals import add_ground_truth_to_proposals
from detkit.modeling.sampling import (
    find_foreground,
    note_foreground_first,
    subsample_labels,
    subsample_masks,
)
from detkit.structures import ImageList, Instances, PolygonMasks
from detkit.utils.errors import DataError
from detkit.utils.events import get_event_storage, has_event_storage
from detkit.utils.overriding import is_overridden, overridable

Features: TypeAlias = dict[str, Tensor]
"""Features of the backbone, by name."""
Losses: TypeAlias = dict[str, Tensor]
"""Scalar losses, by name."""


class _Sample(NamedTuple):
    """The sampled proposals of an image."""

    picked: Tensor
    """(S,) int64 indices, foreground first."""
    classes: Tensor
    """(S,) int64 in [0, K], K for background."""
    matches: np.ndarray | None = None
    """(S,) int64: the object that each is matched with, where it has been read."""


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

    @overridable
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
        matched = [
            self.proposal_matcher.match_boxes(targets_i.gt_boxes, proposals_i.proposal_boxes)
            for proposals_i, targets_i in zip(proposals, targets, strict=True)
        ]
        sampled: list[Instances] = []
        for proposals_i, targets_i, (matches, _), sample in zip(
            proposals, targets, matched, self._sample_all(matched, targets), strict=True
        ):
            sampled_i = proposals_i[sample.picked]
            sampled_i.gt_classes = sample.classes
            if len(targets_i) > 0:
                picked_matches = matches[sample.picked]
                for name, value in targets_i.get_fields().items():
                    if name.startswith("gt_") and not sampled_i.has(name):
                        sampled_i.set(name, _selected(value, picked_matches, sample.matches))
            sampled.append(sampled_i)
        self._log_sample(sampled)
        return sampled

    def _sample_all(
        self, matched: Sequence[tuple[Tensor, Tensor]], targets: Sequence[Instances]
    ) -> list[_Sample]:
        """Sample the proposals of all images, from the matches and labels of each."""
        gt_classes = [targets_i.gt_classes for targets_i in targets]
        if is_overridden(self._sample_proposals):
            pairs = zip(matched, gt_classes, strict=True)
            return [_Sample(*self._sample_proposals(*pair, classes)) for pair, classes in pairs]
        classes = [
            self._classes(*pair, classes_i)
            for pair, classes_i in zip(matched, gt_classes, strict=True)
        ]
        masks = [
            subsample_masks(
                classes_i, self.batch_size_per_image, self.positive_fraction, self.num_classes
            )
            for classes_i in classes
        ]
        if not masks:
            return []
        # One wait for the device: the numbers of sampled proposals are shapes of all that follows,
        # and polygons are selected on the host.
        columns = [torch.cat(column) for column in zip(*masks, strict=True)]
        columns.append(torch.cat([matches for matches, _ in matched]))
        read = torch.stack(columns).cpu().numpy()
        ends = np.cumsum([len(classes_i) for classes_i in classes])
        on_host = np.split(read, ends[:-1], axis=1)
        counts = [int(count) for read_i in on_host for count in read_i[:2].sum(axis=1)]
        indices = split_nonzero([mask for pair in masks for mask in pair], counts)
        samples: list[_Sample] = []
        for i, (classes_i, read_i) in enumerate(zip(classes, on_host, strict=True)):
            picked = torch.cat(indices[2 * i : 2 * i + 2])
            picked_classes = classes_i[picked]
            note_foreground_first(picked_classes, counts[2 * i], self.num_classes)
            matches_i = np.concatenate([read_i[2][mask != 0] for mask in read_i[:2]])
            samples.append(_Sample(picked, picked_classes, matches_i))
        return samples

    def _classes(self, matches: Tensor, labels: Tensor, gt_classes: Tensor) -> Tensor:
        """Return the (R,) class of each proposal, K for background, -1 if it is ignored."""
        if len(gt_classes) == 0:
            return torch.full_like(matches, self.num_classes)
        classes = gt_classes[matches].masked_fill(labels == 0, self.num_classes)
        return classes.masked_fill(labels == -1, -1)

    @overridable
    def _sample_proposals(
        self, matched_idxs: Tensor, matched_labels: Tensor, gt_classes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sample the proposals of one image by the class they are matched with.

        All images are sampled at once, with one wait for the device, unless a subclass overrides
        this.

        Args:
            matched_idxs: (R,) index of the ground truth, in [0, M).
            matched_labels: (R,) 1 foreground, 0 background, -1 ignored.
            gt_classes: (M,) classes of the ground truth.

        Returns:
            (S,) indices of the sampled proposals, foreground first, and their (S,) classes.
        """
        classes = self._classes(matched_idxs, matched_labels, gt_classes)
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
    selected: list[Instances] = []
    found = find_foreground([p.gt_classes for p in proposals], bg_label)
    for proposals_i, (index, index_on_host) in zip(proposals, found, strict=True):
        selected_i = Instances(proposals_i.image_size)
        for name, value in proposals_i.get_fields().items():
            selected_i.set(name, _selected(value, index, index_on_host))
        selected.append(selected_i)
    return selected, masks


def _selected(value: Any, index: Tensor, index_on_host: np.ndarray | None) -> Any:
    """Return entries of a field, those of lists and polygons by the index on the host if known."""
    # For each of them, the index would be fetched from the device.
    known = index if index_on_host is None else index_on_host
    if isinstance(value, list):
        return [value[i] for i in known.tolist()]
    return value[known if isinstance(value, PolygonMasks) else index]


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
