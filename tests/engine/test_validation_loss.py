import random

import numpy as np
import pytest
import torch
from torch import nn

from detkit.data import DatasetCatalog
from detkit.engine import DefaultTrainer
from detkit.engine.validation_loss import build_validation_loader, validation_losses


class Net(nn.Module):
    """Draws, drops out, keeps statistics and a normaliser that appears with the first batch."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(2))
        self.register_buffer("normalizer", None)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, batch):
        assert self.training
        assert not any(m.training for m in (*self.backbone.modules(), *self.head))
        self.normalizer = torch.ones(1)
        self.steps += 1
        random.random(), np.random.rand(), torch.rand(1)
        x = self.head(self.backbone(torch.stack(batch)))
        return {"loss_a": x.pow(2).mean(), "loss_b": torch.rand(()) * 0 + 2.0}


IMAGES = list(torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(1)))


def test_losses_are_means_over_images_however_they_are_batched():
    one = validation_losses(Net().eval(), [[image] for image in IMAGES])
    torch.manual_seed(0)
    model = Net()
    singles = validation_losses(model, [[image] for image in IMAGES])
    batches = validation_losses(model, [IMAGES[:3], IMAGES[3:]])
    assert singles == pytest.approx(batches)
    assert singles["total_loss"] == pytest.approx(singles["loss_a"] + 2.0)
    assert set(one) == {"loss_a", "loss_b", "total_loss"}


def test_modes_buffers_and_random_numbers_are_as_before():
    model = Net().train()
    model.head[1].eval()  # held in eval mode on purpose
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = [random.random(), np.random.rand(), torch.rand(1).item()]
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    validation_losses(model, [IMAGES])
    assert [random.random(), np.random.rand(), torch.rand(1).item()] == expected
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.normalizer is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_everything_is_restored_when_a_batch_fails():
    model = Net().eval()
    with pytest.raises(TypeError):
        validation_losses(model, [[None]])
    assert not any(module.training for module in model.modules())


def test_no_images_are_an_error():
    with pytest.raises(ValueError, match=r"TEST\.COMPUTE_LOSS: there are no images"):
        validation_losses(Net(), [])


def losses_of_run(cfg):
    trainer = DefaultTrainer(cfg)
    trainer.train()
    return trainer, [value for value, _ in trainer.storage.history("total_loss").values()]


def test_key_puts_the_losses_beside_the_scores_and_changes_nothing_in_training(tiny_cfg):
    tiny_cfg.TEST.EVAL_PERIOD = 2
    plain, expected = losses_of_run(tiny_cfg)
    tiny_cfg.TEST.COMPUTE_LOSS = True
    trainer, found = losses_of_run(tiny_cfg)
    assert found == expected
    for name, value in plain.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name
    latest = trainer.storage.latest()
    assert latest["val/total_loss"][0] == pytest.approx(
        latest["val/loss_cls"][0] + latest["val/loss_box_reg"][0]
    )
    assert [iteration for _, iteration in trainer.storage.history("val/loss_cls").values()] == [
        1,
        3,
        6,
    ]
    assert "val/total_loss" not in plain.storage.latest()


def test_several_data_sets_are_told_apart(tiny_cfg):
    tiny_cfg.TEST.COMPUTE_LOSS, tiny_cfg.DATASETS.TEST = True, ("tiny_val", "tiny_train")
    latest = losses_of_run(tiny_cfg)[0].storage.latest()
    assert latest["val/tiny_val/loss_cls"][0] == pytest.approx(latest["val/tiny_train/loss_cls"][0])


def test_data_set_without_ground_truth_is_an_error(tiny_cfg):
    DatasetCatalog.register(
        "bare", lambda: [{"file_name": "a.png", "height": 4, "width": 4, "image_id": 0}]
    )
    try:
        with pytest.raises(
            ValueError,
            match=r"COMPUTE_LOSS needs ground truth: data set 'bare' has none for a\.png",
        ):
            build_validation_loader(tiny_cfg, "bare")
    finally:
        DatasetCatalog.remove("bare")
