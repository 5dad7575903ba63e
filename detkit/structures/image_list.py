"""A batch of images of different sizes, padded into one tensor.

Legend: N images, C channels, H and W the padded height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from detkit.utils.errors import ContractError, WrongTypeError


class ImageList:
    """Images in the top left corners of one padded tensor, with their sizes without padding.

    Attributes:
        tensor: (N, C, H, W), or (N, H, W) for images without a channel dimension.
        image_sizes: N times `(height, width)`; in an exported graph an (N, 2) tensor.

    Example:
        >>> images = ImageList.from_tensors([torch.ones(3, 4, 6), torch.ones(3, 5, 5)])
        >>> images.tensor.shape, images.image_sizes
        (torch.Size([2, 3, 5, 6]), [(4, 6), (5, 5)])
    """

    image_sizes: Any

    def __init__(self, tensor: Tensor, image_sizes: Sequence[tuple[int, int]] | Tensor) -> None:
        """Hold a padded batch.

        Raises:
            ValueError: There is not one size per image.
        """
        self.tensor = tensor
        if isinstance(image_sizes, Tensor):
            self.image_sizes = image_sizes
            return
        if tensor.shape[0] != len(image_sizes):
            raise ValueError(
                f"need one size per image: got {len(image_sizes)} sizes, {tensor.shape[0]} images"
            )
        self.image_sizes = list(image_sizes)

    def __len__(self) -> int:
        return len(self.image_sizes)

    def __getitem__(self, index: int) -> Tensor:
        """Return a view of one image without its padding, ([C,] height, width)."""
        height, width = self.image_sizes[index]
        return self.tensor[index, ..., :height, :width]

    @property
    def device(self) -> torch.device:
        """The device that holds the batch."""
        return self.tensor.device

    def to(self, *args: Any, **kwargs: Any) -> ImageList:
        """Return the batch on another device, or of another dtype, by `Tensor.to`."""
        return ImageList(self.tensor.to(*args, **kwargs), self.image_sizes)

    @staticmethod
    def from_tensors(
        tensors: Sequence[Tensor],
        size_divisibility: int = 0,
        pad_value: float = 0.0,
        padding_constraints: Mapping[str, int] | None = None,
        *,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> ImageList:
        """Pad images at the right and the bottom to one size, and batch them.

        Args:
            tensors: N images (C, height, width) or (height, width), of one dtype, device and number
                of channels; with further dimensions before C, clips of a video.
            size_divisibility: H and W become multiples of this, unless it is 0.
            pad_value: Value of the padding.
            padding_constraints: Constraints of a backbone: `size_divisibility` replaces the
                argument of that name, `square_size` above 0 sets H and W before the rounding.
            memory_format: Memory format of the batch. A conversion afterwards is one more copy.

        Raises:
            ValueError: There are no images.
            ValueError: They differ in more than height and width.
            ValueError: An image is larger than `square_size`.
            TypeError: An image is not a tensor.
        """
        _check_images(tensors)
        image_sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in tensors]
        height, width = padded_size(image_sizes, size_divisibility, padding_constraints or {})
        first = tensors[0]
        batch = torch.empty(
            (len(tensors), *first.shape[:-2], height, width),
            dtype=first.dtype,
            device=first.device,
            memory_format=memory_format,
        )
        for index, (height_i, width_i) in enumerate(image_sizes):
            padded, image = batch[index], tensors[index]
            padded[..., :height_i, :width_i] = image
            # Only the padding is filled, so that no pixel is written twice.
            padded[..., height_i:, :] = pad_value
            padded[..., :height_i, width_i:] = pad_value
        return ImageList(batch, image_sizes)


def _check_images(tensors: Sequence[Tensor]) -> None:
    if len(tensors) == 0:
        raise ContractError("need at least one image to make a batch")
    for index, image in enumerate(tensors):
        if not isinstance(image, Tensor):
            raise WrongTypeError(f"images are tensors: image {index} is {type(image).__name__}")
        if image.dim() < 2:
            shape = tuple(image.shape)
            raise ValueError(f"images are ([C,] H, W): image {index} has shape {shape}")
        if image.shape[:-2] != tensors[0].shape[:-2]:
            shapes = f"{tuple(tensors[0].shape)} and image {index} {tuple(image.shape)}"
            raise ContractError(
                f"images of a batch differ in height and width only: image 0 has shape {shapes}"
            )


def padded_size(
    image_sizes: Sequence[tuple[int, int]], size_divisibility: int, constraints: Mapping[str, int]
) -> tuple[int, int]:
    """Return height and width of the batch for images of these sizes; see `from_tensors`."""
    height, width = (max(sides) for sides in zip(*image_sizes, strict=True))
    square_size = constraints.get("square_size", 0)
    if square_size > 0:
        if max(height, width) > square_size:
            raise ValueError(
                f"images are padded to a square of {square_size}: got one of {height} x {width}"
            )
        height = width = square_size
    stride = max(1, constraints.get("size_divisibility", size_divisibility))
    # Not by division of negative numbers, which an exported graph would round towards 0.
    height, width = ((side + stride - 1) // stride * stride for side in (height, width))
    return height, width
