import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from detkit.config import get_cfg
from detkit.layers import ShapeSpec
from detkit.modeling import build_anchor_generator

RATIOS = [[0.5, 1.0, 2.0]]


@pytest.mark.parametrize(
    ("sizes", "strides", "image_size"),
    [
        pytest.param([[32], [64], [128], [256], [512]], [4, 8, 16, 32, 64], (64, 128), id="even"),
        pytest.param(
            [[32], [64], [128], [256], [512]], [4, 8, 16, 32, 64], (96, 160), id="p6-is-rounded-up"
        ),
        pytest.param(
            [[32, 40, 50], [64, 80, 101], [128, 161, 203]],
            [8, 16, 32],
            (96, 64),
            id="several-sizes",
        ),
        pytest.param([[33, 35]], [16], (32, 48), id="corners-halfway-between-pixels"),
    ],
)
def test_anchors_are_torchvisions(sizes, strides, image_size):
    cfg = get_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "TorchvisionAnchorGenerator"
    cfg.MODEL.ANCHOR_GENERATOR.SIZES, cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = sizes, RATIOS
    ours = build_anchor_generator(cfg, [ShapeSpec(stride=stride) for stride in strides])
    features = [torch.zeros(2, 1, -(-image_size[0] // s), -(-image_size[1] // s)) for s in strides]
    images = ImageList(torch.zeros(2, 3, *image_size), [image_size] * 2)
    wanted = AnchorGenerator(tuple(map(tuple, sizes)), tuple(map(tuple, RATIOS * len(sizes))))(
        images, features
    )
    assert torch.equal(torch.cat([boxes.tensor for boxes in ours(features)]), wanted[0])
    assert ours.num_anchors == [3 * len(sizes_i) for sizes_i in sizes]
