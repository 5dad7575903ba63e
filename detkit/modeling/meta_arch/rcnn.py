"""Models on a region proposal network: R-CNN and the proposals alone.

Legend: N images.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from detkit.config import BRANCHES, CfgNode, configurable, declare_architecture
from detkit.modeling.backbone import Backbone
from detkit.modeling.meta_arch.base import Detector, rescale_outputs
from detkit.modeling.meta_arch.build import META_ARCH_REGISTRY
from detkit.modeling.proposal_generator import build_proposal_generator
from detkit.modeling.roi_heads import ROIHeads, build_roi_heads
from detkit.structures import ImageList, Instances, ModelInput, ModelOutput
from detkit.utils.errors import ConfigError
from detkit.utils.events import get_event_storage, has_event_storage
from detkit.utils.overriding import is_overridden, overridable


@META_ARCH_REGISTRY.register()
@declare_architecture(
    num_classes="MODEL.ROI_HEADS.NUM_CLASSES",
    score_thresholds=["MODEL.ROI_HEADS.SCORE_THRESH_TEST"],
    nms_threshold="MODEL.ROI_HEADS.NMS_THRESH_TEST",
    branches=BRANCHES,
)
class GeneralizedRCNN(Detector):
    """A backbone, a proposal generator, and heads that classify and refine the proposals.

    Source: Ren et al. 2015, arXiv 1506.01497; with masks: He et al. 2017, arXiv 1703.06870.

    Example:
        >>> import torch
        >>> from detkit.config import get_cfg
        >>> from detkit.modeling import build_model
        >>> cfg = get_cfg()
        >>> cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.RESNETS.RES2_OUT_CHANNELS", 8])
        >>> model = build_model(cfg).eval()
        >>> (output,) = model([{"image": torch.zeros(3, 64, 64, dtype=torch.uint8)}])
        >>> output["instances"].image_size
        (64, 64)
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        proposal_generator: nn.Module | None,
        roi_heads: ROIHeads,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str | None = None,
        vis_period: int = 0,
    ) -> None:
        """Set the parts. Arguments that are not listed are those of `Detector`.

        Args:
            proposal_generator: See `PROPOSAL_GENERATOR_REGISTRY`. None takes `proposals` from the
                input.
            roi_heads: See `ROIHeads`.
        """
        super().__init__(
            backbone, pixel_mean, pixel_std, input_format=input_format, vis_period=vis_period
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
            "input_format": cfg.INPUT.FORMAT,
            "vis_period": cfg.VIS_PERIOD,
        }

    def training_losses(self, batched_inputs: list[ModelInput]) -> dict[str, Tensor]:
        """Return the losses of the proposal generator and of the heads by name.

        Args:
            batched_inputs: N inputs with `instances`, and `proposals` without a proposal generator.
        """
        images = self.preprocess_image(batched_inputs)
        head_losses, proposal_losses = self.instance_losses(
            images, self.backbone(images.tensor), batched_inputs
        )
        return {**head_losses, **proposal_losses}

    def instance_losses(
        self, images: ImageList, features: dict[str, Tensor], batched_inputs: list[ModelInput]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the losses of the heads, and those of the proposal generator, from features."""
        targets = self.take_field(batched_inputs, "instances")
        if self.proposal_generator is None:
            proposals, proposal_losses = self.take_field(batched_inputs, "proposals"), {}
        else:
            proposals, proposal_losses = self.proposal_generator(images, features, targets)
        if is_overridden(self.visualize_training):
            self._visualize_now_and_then(batched_inputs, proposals)
        # Both are trained at once: the heads on the proposals of the present step.
        _, head_losses = self.roi_heads(images, features, proposals, targets)
        return head_losses, proposal_losses

    def _visualize_now_and_then(
        self, batched_inputs: list[ModelInput], proposals: list[Instances]
    ) -> None:
        due = (
            self.vis_period > 0
            and has_event_storage()
            and get_event_storage().iter % self.vis_period == 0
        )
        if due:
            self.visualize_training(batched_inputs, proposals)

    @overridable
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
                of the inputs. Then no boxes are detected; only masks and keypoints are added.
            do_postprocess: Whether to return `ModelOutput`s, rescaled to the size that each input
                asks for. Otherwise Instances are returned, in the coordinates of the inputs.

        Raises:
            RuntimeError: The model is in training mode.
        """
        if self.training:
            raise RuntimeError("inference needs the model in eval mode: call model.eval()")
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        if detected_instances is not None:
            # The second pass of test-time augmentation: boxes are merged already.
            given = [instances.to(self.device) for instances in detected_instances]
            results = self.roi_heads.forward_with_given_boxes(features, given)
        else:
            results = self.find_instances(images, features, batched_inputs)
        if not do_postprocess:
            return results
        return self._postprocess(results, batched_inputs, images.image_sizes)

    @staticmethod
    @overridable
    def _postprocess(
        instances: Sequence[Instances],
        batched_inputs: Sequence[ModelInput],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[ModelOutput]:
        """Rescale instances to the size that each input asks for.

        For subclasses written for Detectron2, which override it or call it.
        """
        return rescale_outputs(instances, batched_inputs, "instances")

    def find_instances(
        self, images: ImageList, features: dict[str, Tensor], batched_inputs: list[ModelInput]
    ) -> list[Instances]:
        """Return the instances in every image, in the coordinates of the inputs."""
        proposals = self._propose(images, features, batched_inputs)
        results, _ = self.roi_heads(images, features, proposals, None)
        return results

    def _propose(
        self, images: ImageList, features: dict[str, Tensor], batched_inputs: list[ModelInput]
    ) -> list[Instances]:
        if self.proposal_generator is None:
            return self.take_field(batched_inputs, "proposals")
        proposals, _ = self.proposal_generator(images, features, None)
        return proposals


@META_ARCH_REGISTRY.register()
@declare_architecture(branches=["MODEL.ROTATED_BOXES", "MODEL.LOAD_PROPOSALS"])
class ProposalNetwork(Detector):
    """A backbone and a proposal generator, without heads."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        proposal_generator: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        """Set the parts. Arguments that are not listed are those of `Detector`.

        Args:
            proposal_generator: See `PROPOSAL_GENERATOR_REGISTRY`.

        Raises:
            ConfigError: `proposal_generator` is None.
        """
        super().__init__(backbone, pixel_mean, pixel_std)
        if proposal_generator is None:
            raise ConfigError(
                "ProposalNetwork needs a proposal generator: MODEL.PROPOSAL_GENERATOR.NAME must not"
                " be PrecomputedProposals"
            )
        self.proposal_generator = proposal_generator

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Map config keys to arguments."""
        arguments = super().from_config(cfg)
        shapes = arguments["backbone"].output_shape()
        return {**arguments, "proposal_generator": build_proposal_generator(cfg, shapes)}

    def training_losses(self, batched_inputs: list[ModelInput]) -> dict[str, Tensor]:
        """Return the losses of the proposal generator by name, for inputs with `instances`."""
        images = self.preprocess_image(batched_inputs)
        targets = self.take_field(batched_inputs, "instances")
        # The proposals are not used, and cost top-k and NMS. But the generator raises an error if
        # they are not finite.
        _, losses = self.proposal_generator(images, self.backbone(images.tensor), targets)
        return losses

    @overridable
    def inference(self, batched_inputs: list[ModelInput]) -> list[ModelOutput]:
        """Return the proposals for every image, best first."""
        images = self.preprocess_image(batched_inputs)
        proposals, _ = self.proposal_generator(images, self.backbone(images.tensor), None)
        return rescale_outputs(proposals, batched_inputs, "proposals")
