"""The smallest models that a trainer takes, and a trainer of them."""

import torch
from torch import nn

from detkit.config import get_cfg
from detkit.engine import SimpleTrainer, TrainerBase, hooks
from detkit.structures import Boxes, Instances


class IdleTrainer(TrainerBase):
    """Does nothing in a step: for hooks."""

    def run_step(self):
        pass


class Toy(nn.Module):
    """Gives a loss of a batch of numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(2, 1)

    def forward(self, batch):
        return {"loss": self.fc(batch).pow(2).mean()}


class TwoLosses(Toy):
    """Gives two losses of a batch of numbers."""

    def forward(self, batch):
        y = self.fc(batch)
        return {"loss_a": y.pow(2).mean(), "loss_b": 0.5 * y.abs().mean()}


def batches(start=0):
    """Endless; batch i depends on i alone."""
    i = start
    while True:
        yield torch.randn(4, 2, generator=torch.Generator().manual_seed(i))
        i += 1


def toy_trainer(model=None, data=None, trainer_class=SimpleTrainer, lr=0.1, **kwargs):
    model = model or TwoLosses()
    return trainer_class(
        model, data or batches(), torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), **kwargs
    )


def with_schedule(trainer):
    trainer.scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.9)
    trainer.register_hooks([hooks.LRScheduler(trainer.optimizer, trainer.scheduler)])
    return trainer


def group_norm_cfg():
    """Faster R-CNN with group norm, whose images do not depend on each other."""
    cfg = get_cfg()
    cfg.merge_from_file("detkit://Base-RCNN-FPN.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.FREEZE_AT = "cpu", 0
    resnets = cfg.MODEL.RESNETS
    resnets.DEPTH, resnets.NORM, resnets.RES2_OUT_CHANNELS = 18, "GN", 64
    resnets.STRIDE_IN_1X1 = False
    cfg.MODEL.FPN.NORM, cfg.MODEL.FPN.OUT_CHANNELS = "GN", 32
    # Every anchor and proposal is sampled.
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 100000
    cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION = 1.0
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 3, 32
    return cfg


def labelled_images(count):
    generator = torch.Generator().manual_seed(4)
    batch = []
    for i in range(count):
        corner = torch.randint(0, 20, (2, 2), generator=generator)
        boxes = Boxes(torch.cat([corner, corner + 30 + i], 1).float())
        instances = Instances((64, 64), gt_boxes=boxes, gt_classes=torch.tensor([i % 3, 2]))
        image = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": 64, "width": 64})
    return batch
