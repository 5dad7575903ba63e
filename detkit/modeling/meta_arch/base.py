"""What every model does with its input and output: normalise, pad and batch; rescale results.

Legend: N images, C channels, H x W pixels of an image.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detkit.config import CfgNode
from detkit.modeling.backbone import Backbone, build_backbone
from detkit.modeling.postprocessing import detector_postprocess
from detkit.structures import ImageList, Instances, ModelInput, ModelOutput
from detkit.utils.errors import DataError
from detkit.utils.overriding import overridable


class Detector(nn.Module):
    """A backbone, and the handling of images. A subclass has `training_losses` and `inference`."""

    backbone: Backbone
    pixel_mean: Tensor
    pixel_std: Tensor
    # `torch.save` of a whole model cannot hold the format itself.
    _is_channels_last = False

    def __init__(
        self,
        backbone: Backbone | None = None,
        pixel_mean: Sequence[float] | None = None,
        pixel_std: Sequence[float] | None = None,
        *,
        input_format: str | None = None,
        vis_period: int = 0,
    ) -> None:
        """Keep the backbone and the numbers that images are normalised with.

        Args:
            backbone: Images to features by name. None, with `pixel_mean` and `pixel_std`, sets
                nothing: models for Detectron2 call `super(GeneralizedRCNN, self).__init__()`, which
                is `nn.Module`'s there, and set all of it themselves.
            pixel_mean: C numbers to subtract.
            pixel_std: C numbers to divide by.
            input_format: For subclasses written for Detectron2, which draw; see
                `visualize_training`.
            vis_period: Likewise.

        Raises:
            TypeError: Some of the first three are missing.
            ValueError: `pixel_mean` and `pixel_std` differ in length.
            ValueError: A number of `pixel_std` is not positive.
        """
        super().__init__()
        self.input_format, self.vis_period = input_format, vis_period
        if backbone is None and pixel_mean is None and pixel_std is None:
            return
        if backbone is None or pixel_mean is None or pixel_std is None:
            raise TypeError("a detector needs backbone, pixel_mean and pixel_std")
        if len(pixel_mean) != len(pixel_std):
            raise ValueError(
                "pixel_mean and pixel_std must have a number per channel each, got"
                f" {len(pixel_mean)} and {len(pixel_std)}"
            )
        if not all(std > 0 for std in pixel_std):
            raise ValueError(f"pixel_std must be positive, got {list(pixel_std)}")
        self.backbone = backbone
        # Not persistent: they are settings, and Detectron2's checkpoints do not hold them.
        # As floats: of whole numbers, torch would make integers, which do not divide in place.
        mean = torch.tensor([float(value) for value in pixel_mean])
        std = torch.tensor([float(value) for value in pixel_std])
        self.register_buffer("pixel_mean", mean.view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", std.view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Map config keys to the arguments of this base class."""
        return {
            "backbone": build_backbone(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def device(self) -> torch.device:
        """Device of the model, to which images are moved."""
        return self.pixel_mean.device

    def _move_to_current_device(self, x: Tensor) -> Tensor:
        """Return a tensor on the model's device, for a subclass that prepares images itself."""
        return x.to(self.device)

    @property
    def memory_format(self) -> torch.memory_format:
        """Layout of the batch."""
        return torch.channels_last if self._is_channels_last else torch.contiguous_format

    def batch_in(self, memory_format: torch.memory_format) -> None:
        """Set the layout of the batch; fastest is that of the convolutions' weights."""
        # No argument: a subclass with a constructor of its own need not know it.
        self._is_channels_last = memory_format == torch.channels_last

    @overridable
    def visualize_training(self, batched_inputs: list[ModelInput], *args: Any) -> None:
        """Do nothing: `VIS_PERIOD` draws by a hook.

        For subclasses written for Detectron2, which override it or call it. Of the models here,
        `GeneralizedRCNN` calls it, as there.
        """

    @overridable
    def forward(self, batched_inputs: list[ModelInput]) -> Any:
        """Return `training_losses` in training, else `inference`."""
        return (
            self.training_losses(batched_inputs)
            if self.training
            else self.inference(batched_inputs)
        )

    def training_losses(self, batched_inputs: list[ModelInput]) -> dict[str, Tensor]:
        """Return scalar losses by name; their sum is minimised."""
        raise NotImplementedError(f"{type(self).__name__} does not implement training_losses")

    def inference(self, batched_inputs: list[ModelInput]) -> Any:
        """Return the output for each image."""
        raise NotImplementedError(f"{type(self).__name__} does not implement inference")

    @overridable
    def preprocess_image(self, batched_inputs: list[ModelInput]) -> ImageList:
        """Normalise the images, pad them as the backbone needs, and batch them on the device.

        Args:
            batched_inputs: N inputs with `image` (C, H, W), in the channel order of `pixel_mean`.
                Not changed.

        Raises:
            DataError: An image is not (C, H, W) with the C of `pixel_mean`.
        """
        images = [
            self._normalise(x["image"], i, x.get("file_name")) for i, x in enumerate(batched_inputs)
        ]
        return ImageList.from_tensors(
            images,
            self.backbone.size_divisibility,
            padding_constraints=self.backbone.padding_constraints,
            memory_format=self.memory_format,
        )

    def _normalise(self, image: Tensor, index: int, file_name: str | None) -> Tensor:
        channels = len(self.pixel_mean)
        if image.dim() != 3 or image.shape[0] != channels:
            raise DataError(
                f"images must be (C, H, W) with C = {channels}, the length of MODEL.PIXEL_MEAN;"
                f" image {index} of the batch ({file_name or 'no file name'}) has shape"
                f" {tuple(image.shape)}"
            )
        # Moved as bytes, a quarter of the size of floats. Only the subtraction makes a new tensor.
        image = image.to(self.device, non_blocking=True)
        if not self.pixel_mean.is_floating_point():
            # A subclass has set whole numbers itself.
            return (image - self.pixel_mean) / self.pixel_std
        if image.is_contiguous() or not image.permute(1, 2, 0).is_contiguous():
            return (image - self.pixel_mean).div_(self.pixel_std)
        # Interleaved channels: as rows of W * C numbers, since a CPU is slow in loops over 3 (10
        # against 2 ms for 800 x 1067).
        height, width = image.shape[1:]
        mean, std = (values.flatten().repeat(width) for values in (self.pixel_mean, self.pixel_std))
        rows = (image.permute(1, 2, 0).reshape(height, -1) - mean).div_(std)
        return rows.view(height, width, channels).permute(2, 0, 1)

    def take_field(self, batched_inputs: list[ModelInput], name: str) -> list[Instances]:
        """Return `instances` or `proposals` of every input, on the model's device.

        Raises:
            DataError: An input has none.
        """
        taken: list[Instances] = []
        for i, x in enumerate(batched_inputs):
            if name not in x:
                mode = "training" if self.training else "inference"
                raise DataError(
                    f"{type(self).__name__} needs {name!r} in {mode}: image {i} of the batch has"
                    f" only {sorted(x)}"
                )
            # The device need not have caught up: what follows is queued behind the copy.
            taken.append(x[name].to(self.device, non_blocking=True))
        return taken


def rescale_outputs(
    results: Sequence[Instances], batched_inputs: Sequence[ModelInput], key: str
) -> list[ModelOutput]:
    """Rescale results to the `height` and `width` of each input, else to the size of its image.

    Args:
        results: Per image, in the coordinates of the network's input.
        batched_inputs: The inputs they belong to.
        key: Their name in the output: `instances` or `proposals`.
    """
    outputs: list[ModelOutput] = []
    for result, x in zip(results, batched_inputs, strict=True):
        height, width = x.get("height", result.image_size[0]), x.get("width", result.image_size[1])
        rescaled = detector_postprocess(result, height, width)
        outputs.append({"proposals": rescaled} if key == "proposals" else {"instances": rescaled})
    return outputs
