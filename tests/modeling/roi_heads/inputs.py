"""What tests of ROI heads on a pyramid of two levels give them."""

import torch

from detkit.structures import Boxes, ImageList, Instances

SIZE = (64, 96)
K = 3


def batch(num_images=2):
    torch.manual_seed(1)
    images = ImageList(torch.zeros(num_images, 3, *SIZE), [SIZE] * num_images)
    features = {"p2": torch.randn(num_images, 4, 16, 24), "p3": torch.randn(num_images, 4, 8, 12)}
    return images, features


def proposals(boxes=((5.0, 5, 25, 25), (30, 10, 90, 60), (0, 0, 96, 64))):
    boxes = torch.as_tensor(boxes)
    return Instances(SIZE, proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(len(boxes)))


def truth(*boxes):
    classes = torch.arange(len(boxes)) % K
    return Instances(SIZE, gt_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)), gt_classes=classes)
