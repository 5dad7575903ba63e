"""The smallest backbone with levels, registered as `TwoConvolutions`, and images to train on it."""

import torch
from torch import nn

from detkit.modeling import BACKBONE_REGISTRY, Backbone
from detkit.structures import Boxes, Instances

K = 3
SIZE = (60, 90)


@BACKBONE_REGISTRY.register()
class TwoConvolutions(Backbone):
    """Strides 8 and 16."""

    size_divisibility = 16

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.p3 = nn.Conv2d(input_shape.channels, 32, 8, stride=8)
        self.p4 = nn.Conv2d(32, 32, 2, stride=2)
        self._out_features = ["p3", "p4"]
        self._out_feature_channels = {"p3": 32, "p4": 32}
        self._out_feature_strides = {"p3": 8, "p4": 16}

    def forward(self, x):
        p3 = self.p3(x)
        return {"p3": p3, "p4": self.p4(p3)}


def inputs(*numbers_of_objects, size=SIZE, **fields):
    """Return an image of noise with as many boxes of 20x20 pixels for each number, and fields that all of them have."""
    generator = torch.Generator().manual_seed(1)
    batch = []
    for num in numbers_of_objects:
        corner = torch.rand(num, 2, generator=generator) * 30
        boxes = Boxes(torch.cat([corner, corner + 20], dim=1))
        instances = Instances(size, gt_boxes=boxes, gt_classes=torch.arange(num) % K)
        image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
        batch.append({"image": image, "instances": instances, **fields})
    return batch
