"""What tests of models need: a model without weights, boxes, a picture, and a comparison."""

import numpy as np
import torch
from torch import Tensor, nn

from detkit.config import CfgNode
from detkit.data import DatasetCatalog
from detkit.data.datasets.shapes.scene import draw_scene
from detkit.model_zoo.model_zoo import get_config
from detkit.modeling import build_model
from detkit.structures import Boxes, Instances, ROIMasks
from detkit.utils.errors import UserError
from detkit.utils.image import read_image


def get_model_no_weights(config_path: str) -> nn.Module:
    """Return the model of a packaged config with random weights; on the CPU without a GPU."""
    cfg: CfgNode = get_config(config_path, trained=False)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg)


def random_boxes(num_boxes: int, max_coord: float = 100, device: str = "cpu") -> Tensor:
    """Return (num_boxes, 4) XYXY boxes in [1, max_coord], at least 1 wide and high."""
    boxes = (torch.rand(num_boxes, 4, device=device) * (max_coord * 0.5)).clamp_(min=1.0)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def get_sample_coco_image(tensor: bool = True) -> Tensor | np.ndarray:
    """Return a picture of COCO where its files are at hand, else one that is drawn.

    Args:
        tensor: Whether to return (C, H, W) instead of an (H, W, C) array; both BGR, uint8.
    """
    try:
        pixels = read_image(DatasetCatalog.get("coco_2017_val_100")[0]["file_name"], format="BGR")
    except (UserError, OSError):
        pixels = draw_scene(np.random.default_rng(0)).image[:, :, ::-1]
    pixels = np.ascontiguousarray(pixels)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy()) if tensor else pixels


def assert_instances_allclose(
    input: Instances,
    other: Instances,
    *,
    rtol: float = 1e-5,
    msg: str = "",
    size_as_tensor: bool = False,
) -> None:
    """Raise an AssertionError unless two sets of instances have equal fields.

    Args:
        input: Compared with the other.
        other: Boxes and numbers may differ from it by `rtol` of its largest, masks not.
        rtol: Tolerance.
        msg: Start of the message.
        size_as_tensor: Whether sizes of images are compared as tensors.
    """
    sizes = [x.image_size for x in (input, other)]
    same = torch.equal(*map(torch.as_tensor, sizes)) if size_as_tensor else sizes[0] == sizes[1]
    assert same, f"{msg} image sizes {sizes[0]} and {sizes[1]}"
    fields = sorted(input.get_fields())
    assert fields == sorted(other.get_fields()), f"{msg} fields {fields} and others"
    for name in fields:
        first, second = input.get(name), other.get(name)
        if isinstance(first, Boxes | ROIMasks):
            first, second = first.tensor, second.tensor
        assert isinstance(first, Tensor), f"{msg} {name} is a {type(first).__name__}"
        assert first.shape == second.shape, f"{msg} {name}: {first.shape} and {second.shape}"
        if first.numel() and first.is_floating_point():
            close = (first - second).abs().max() <= second.abs().max() * rtol
            assert close, f"{msg} {name} differs by {(first - second).abs().max()}"
        else:
            assert torch.equal(first, second), f"{msg} {name} differs"
