"""SOLVER.ACCUM_STEPS: gradients of several passes in one step, against those of one larger batch."""

import logging

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from detkit.engine import DefaultTrainer, SimpleTrainer
from detkit.modeling import build_model
from tests.engine.toy import Toy, group_norm_cfg, labelled_images


def trained(model, data, steps, **kwargs):
    trainer = SimpleTrainer(
        model, data, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **kwargs
    )
    trainer.train(0, steps)
    return trainer


def test_steps_and_losses_equal_those_of_the_whole_batch():
    data = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(1))
    whole = trained(Toy(), list(data), 3)
    parts = trained(Toy(), [row[None] for batch in data for row in batch], 3, accum_steps=4)
    torch.testing.assert_close(parts.model.state_dict(), whole.model.state_dict())
    losses = [
        [value for value, _ in t.storage.history("total_loss").values()] for t in (parts, whole)
    ]
    assert losses[0] == pytest.approx(losses[1])


def test_loss_that_is_not_finite_names_the_images_of_its_pass():
    class Breaks(Toy):
        def forward(self, batch):
            return {"loss": super().forward(batch[0]["x"])["loss"] * batch[0]["factor"]}

    factors = {"a.jpg": 1.0, "b.jpg": float("nan"), "c.jpg": 1.0}
    data = [
        [{"x": torch.ones(1, 2), "factor": factor, "file_name": name}]
        for name, factor in factors.items()
    ]
    with pytest.raises(FloatingPointError, match=r"iteration 0.*Images of the batch: b\.jpg\."):
        trained(Breaks(), data, 1, accum_steps=3)


def test_fewer_passes_than_one_are_an_error():
    with pytest.raises(ValueError, match=r"accum_steps must be at least 1, got 0"):
        trained(Toy(), [], 1, accum_steps=0)


def test_processes_exchange_gradients_once_per_iteration(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    exchanges = []

    def count(state, bucket):
        exchanges.append(bucket.buffer().clone())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    try:
        model = DistributedDataParallel(Toy())
        model.register_comm_hook(None, count)
        data = list(torch.randn(8, 1, 2, generator=torch.Generator().manual_seed(1)))
        trained(model, data, 2, accum_steps=4)
    finally:
        torch.distributed.destroy_process_group()
    assert len(exchanges) == 2
    alone = trained(Toy(), data, 2, accum_steps=4)
    torch.testing.assert_close(model.module.state_dict(), alone.model.state_dict())


def few_proposals_cfg():
    """As many proposals in each image, and none dropped: nothing is drawn at random."""
    cfg = group_norm_cfg()
    cfg.MODEL.RPN.NMS_THRESH, cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 1.0, 1000
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 12
    return cfg


def gradients(data, accum_steps):
    torch.manual_seed(0)
    model = build_model(few_proposals_cfg())
    trainer = SimpleTrainer(
        model, data, torch.optim.SGD(model.parameters(), lr=0.0), accum_steps=accum_steps
    )
    trainer.train(0, 1)
    return {name: p.grad for name, p in model.named_parameters()}, trainer.storage.latest()


def test_four_single_images_give_the_gradients_of_a_batch_of_four_with_group_norm():
    images = labelled_images(4)
    whole, losses = gradients([images], 1)
    parts, losses_of_parts = gradients([[image] for image in images], 4)
    assert losses["loss_box_reg"][0] > 0
    for name in ("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"):
        assert losses_of_parts[name][0] == pytest.approx(losses[name][0], rel=1e-5)
    for name, gradient in whole.items():
        assert (parts[name] - gradient).norm() <= 1e-5 * max(1.0, float(gradient.norm())), name


def test_key_sets_the_passes_and_the_effective_batch_is_logged(tiny_cfg, caplog):
    tiny_cfg.DATASETS.TEST = ()
    tiny_cfg.SOLVER.ACCUM_STEPS, tiny_cfg.SOLVER.MAX_ITER = 3, 2
    with caplog.at_level(logging.INFO, logger="detkit"):
        trainer = DefaultTrainer(tiny_cfg)
    assert (
        "effective batch: 6 images per iteration (3 x SOLVER.IMS_PER_BATCH=2, on 1 x cpu)"
        in caplog.text
    )
    seen = []
    trainer.model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    trainer.train()
    assert seen == [2] * 6
