"""Models of one or two stages on a region proposal network.

Legend: N images.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detkit.config import BRANCHES, CfgNode, configurable, declare_architecture
from detkit.modeling.backbone import Backbone
from detkit.modeling.meta_arch.base import Detector, rescale_outputs
from detkit.modeling.meta_arch.build import META_ARCH_REGISTRY
from detkit.modeling.proposal_generator import build_proposal_generator
from detkit.modeling.roi_heads import ROIHeads, build_roi_heads
from detkit.structures import ImageList, Instances, ModelInput, ModelOutput


@META_ARCH_REGISTRY.register()
@declare_architecture(
    num_classes="MODEL.ROI_HEADS.NUM_CLASSES",
    score_thresholds=["MODEL.ROI_HEADS.SCORE_THRESH_TEST"],
    nms_threshold="MODEL.ROI_HEADS.NMS_THRESH_TEST",
    branches=BRANCHES,
)
class GeneralizedRCNN(Detector):
    """A backbone, a proposal generator, and heads that look at the proposed regions."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        proposal_generator: nn.Module | None,
        roi_heads: ROIHeads,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        """Put the parts together.

        Args:
            backbone: Images to features by name.
            proposal_generator: Features to proposals; see `PROPOSAL_GENERATOR_REGISTRY`. None takes
                `proposals` from the input.
            roi_heads: Features and proposals to instances; see `ROI_HEADS_REGISTRY`.
            pixel_mean: See `Detector`.
            pixel_std: See `Detector`.
            memory_format: See `Detector`.
        """
        super().__init__(
            backbone=backbone,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            memory_format=memory_format,
        )
        self.proposal_generator = proposal_generator
        self.roi_heads = roi_heads

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Map config keys to arguments."""
        arguments = super().from_config(cfg)
        shapes = arguments["backbone"].output_shape()
        return {
            **arguments,
            "proposal_generator": build_proposal_generator(cfg, shapes),
            "roi_heads": build_roi_heads(cfg, shapes),
        }

    def losses(self, batched_inputs: list[ModelInput]) -> dict[str, Tensor]:
        """Return the losses of the proposal generator and of the heads by name.

        Args:
            batched_inputs: N inputs with `instances`; with `proposals` too where there is no
                proposal generator.
        """
        images = self.preprocess_image(batched_inputs)
        head_losses, proposal_losses = self.instance_losses(
            images, self.backbone(images.tensor), batched_inputs
        )
        return {**head_losses, **proposal_losses}

    def instance_losses(
        self, images: ImageList, features: dict[str, Tensor], batched_inputs: list[ModelInput]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the losses of the heads and those of the proposal generator, from features."""
        targets = self.take_field(batched_inputs, "instances")
        if self.proposal_generator is None:
            proposals, proposal_losses = self.take_field(batched_inputs, "proposals"), {}
        else:
            proposals, proposal_losses = self.proposal_generator(images, features, targets)
        _, head_losses = self.roi_heads(images, features, proposals, targets)
        return head_losses, proposal_losses

    def inference(
        self,
        batched_inputs: list[ModelInput],
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> list[ModelOutput] | list[Instances]:
        """Return the instances in every image.

        Args:
            batched_inputs: N inputs.
            detected_instances: Instances with `pred_boxes` and `pred_classes`, in the coordinates
                of the inputs: boxes are not searched, only what else the heads can say of them is
                added.
            do_postprocess: Whether to rescale to the size that each input asks for, and give
                `ModelOutput`s. Otherwise the Instances themselves, in the coordinates of the
                inputs.
        """
        if self.training:
            raise RuntimeError("inference needs the model in eval mode: call model.eval()")
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        if detected_instances is not None:
            given = [instances.to(self.device) for instances in detected_instances]
            results = self.roi_heads.forward_with_given_boxes(features, given)
        else:
            results = self.find_instances(images, features, batched_inputs)
        return rescale_outputs(results, batched_inputs, "instances") if do_postprocess else results

    def find_instances(
        self, images: ImageList, features: dict[str, Tensor], batched_inputs: list[ModelInput]
    ) -> list[Instances]:
        """Return the instances in every image from its features, in the coordinates of the inputs."""
        proposals = self._propose(images, features, batched_inputs)
        results, _ = self.roi_heads(images, features, proposals, None)
        return results

    def detect_boxes(self, batched_inputs: list[ModelInput]) -> list[Instances]:
        """Return boxes, without masks or keypoints, in the coordinates of the inputs."""
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        proposals = self._propose(images, features, batched_inputs)
        return self.roi_heads.predict_boxes_only(images, features, proposals)

    def _propose(
        self, images: ImageList, features: dict[str, Tensor], batched_inputs: list[ModelInput]
    ) -> list[Instances]:
        if self.proposal_generator is None:
            return self.take_field(batched_inputs, "proposals")
        proposals, _ = self.proposal_generator(images, features, None)
        return proposals


@META_ARCH_REGISTRY.register()
@declare_architecture(branches=["MODEL.LOAD_PROPOSALS"])
class ProposalNetwork(Detector):
    """A backbone and a proposal generator, and nothing else."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        proposal_generator: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        """Put the parts together.

        Args:
            backbone: Images to features by name.
            proposal_generator: Features to proposals.
            pixel_mean: See `Detector`.
            pixel_std: See `Detector`.
            memory_format: See `Detector`.

        Raises:
            ValueError: There is no proposal generator.
        """
        super().__init__(
            backbone=backbone,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            memory_format=memory_format,
        )
        if proposal_generator is None:
            raise ValueError(
                "ProposalNetwork is nothing without a proposal generator:"
                " MODEL.PROPOSAL_GENERATOR.NAME must not be PrecomputedProposals"
            )
        self.proposal_generator = proposal_generator

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Map config keys to arguments."""
        arguments = super().from_config(cfg)
        return {
            **arguments,
            "proposal_generator": build_proposal_generator(
                cfg, arguments["backbone"].output_shape()
            ),
        }

    def losses(self, batched_inputs: list[ModelInput]) -> dict[str, Tensor]:
        """Return the losses of the proposal generator by name, for inputs with `instances`."""
        images = self.preprocess_image(batched_inputs)
        targets = self.take_field(batched_inputs, "instances")
        # The proposals are of no use here, and finding them costs top-k and NMS: but what is not
        # finite shows in them.
        _, losses = self.proposal_generator(images, self.backbone(images.tensor), targets)
        return losses

    def inference(self, batched_inputs: list[ModelInput]) -> list[ModelOutput]:
        """Return the proposals for every image, best first."""
        images = self.preprocess_image(batched_inputs)
        proposals, _ = self.proposal_generator(images, self.backbone(images.tensor), None)
        return rescale_outputs(proposals, batched_inputs, "proposals")
