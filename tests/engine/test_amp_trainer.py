import pytest
import torch
from torch import nn

from detkit.config import get_cfg
from detkit.engine import AMPTrainer, DefaultTrainer, SimpleTrainer
from detkit.modeling import build_model
from detkit.solver import maybe_add_gradient_clipping
from tests.engine.toy import Toy, group_norm_cfg, labelled_images

STEPS = 20
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def toy_trainer(trainer_class, model=None, steps=30):
    model = model or Toy()
    data = torch.randn(steps, 4, 2, generator=torch.Generator().manual_seed(0))
    return trainer_class(model, data, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def test_amp_trains_in_bfloat16_on_the_cpu_and_keeps_float32_weights():
    types = []

    class Spy(Toy):
        def forward(self, batch):
            types.append(self.fc(batch).dtype)
            return super().forward(batch)

    trainer = toy_trainer(AMPTrainer, Spy())
    trainer.train(0, 30)
    assert types[0] == torch.bfloat16
    assert trainer.model.fc.weight.dtype == torch.float32
    assert (
        trainer.storage.latest()["total_loss"][0]
        < trainer.storage.history("total_loss").values()[0][0] / 2
    )


def test_scale_is_stored_when_asked_for():
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    batches = torch.zeros(2, 4, 2)
    trainer = AMPTrainer(
        model, batches, optimizer, grad_scaler=scaler, precision=None, log_grad_scaler=True
    )
    trainer.train(0, 2)
    assert trainer.storage.latest()["[metric]grad_scaler"] == (512.0, 1)


def test_amp_resumes_from_a_run_in_full_precision():
    trainer = toy_trainer(AMPTrainer)
    full_precision = toy_trainer(SimpleTrainer)
    full_precision.train(0, 2)
    trainer.load_state_dict(full_precision.state_dict())
    assert trainer.iter == full_precision.iter


def test_gradients_are_clipped_after_unscaling():
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.5
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = maybe_add_gradient_clipping(cfg, torch.optim.SGD(model.parameters(), lr=1.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer = AMPTrainer(model, [torch.tensor(4.0)], optimizer, grad_scaler=scaler)
    trainer.compute_losses = lambda batch: {"loss": (model.weight * batch).sum()}
    trainer.train(0, 1)
    assert model.weight.item() == -0.5


def overflowing_trainer(init_scale, **kwargs):
    """The gradients of the second of four steps are infinite."""

    class Overflows(Toy):
        def forward(self, batch):
            y = self.fc(batch)
            losses = super().forward(batch)
            if bool((batch == 9).all()):
                losses["other"] = (y * 0).abs().sqrt().mean()
            return losses

    model = Overflows()
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale) if init_scale else None
    data = torch.randn(4, 4, 2)
    data[1] = 9
    return AMPTrainer(
        model, data, torch.optim.SGD(model.parameters(), lr=0.1), grad_scaler=scaler, **kwargs
    )


def test_scaler_may_be_the_fourth_argument():
    model, scaler = Toy(), torch.amp.GradScaler("cpu")
    trainer = AMPTrainer(model, [], torch.optim.SGD(model.parameters(), lr=0.1), scaler)
    assert trainer.grad_scaler is scaler
    assert trainer.gather_metric_period == 1


def test_overflow_of_scaled_gradients_is_left_to_the_scaler():
    trainer = overflowing_trainer(1024.0)
    trainer.train(0, 4)
    assert trainer.num_skipped == 0
    assert "skipped_steps" not in trainer.storage.latest()
    assert trainer.grad_scaler.get_scale() == 512.0
    assert trainer.model.fc.weight.isfinite().all()


@pytest.mark.parametrize(
    "init_scale", [pytest.param(None, id="bfloat16"), pytest.param(1.0, id="scaled-down-to-1")]
)
def test_gradients_that_are_not_scaled_up_must_be_finite(init_scale):
    with pytest.raises(FloatingPointError, match="the gradient is not finite at iteration 1"):
        overflowing_trainer(init_scale).train(0, 4)
    trainer = overflowing_trainer(init_scale, max_skipped_steps=1)
    trainer.train(0, 4)
    assert trainer.num_skipped == 1


def test_loss_that_is_not_finite_is_not_left_to_the_scaler():
    model = Toy()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = AMPTrainer(model, [torch.full((4, 2), torch.inf)], optimizer, grad_scaler=scaler)
    with pytest.raises(FloatingPointError, match="loss is not finite at iteration 0"):
        trainer.train(0, 1)


def total_losses(trainer_class, device="cpu", **kwargs):
    torch.manual_seed(0)
    cfg = group_norm_cfg()
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN, cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 400, 200
    cfg.MODEL.DEVICE = device
    model = build_model(cfg)
    types = set()
    model.proposal_generator.register_forward_hook(
        lambda m, i, o: types.update(p.proposal_boxes.tensor.dtype for p in o[0])
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)
    trainer = trainer_class(model, [labelled_images(2)] * STEPS, optimizer, **kwargs)
    trainer.train(0, STEPS)
    assert types == {torch.float32}
    return torch.tensor([value for value, _ in trainer.storage.history("total_loss").values()])


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_losses_in_bfloat16_follow_those_in_float32(device):
    full = total_losses(SimpleTrainer, device)
    half = total_losses(AMPTrainer, device, precision=torch.bfloat16)
    assert half.isfinite().all()
    assert full[-1] < 0.8 * full[0]
    assert float(abs(half.mean() / full.mean() - 1)) < 0.02
    # Of a single step, less can be said: which proposals are kept hangs on the last digits of their scores.
    assert float((half / full - 1).abs().max()) < 0.1


@pytest.mark.parametrize(
    ("dtype", "precision"), [("auto", torch.bfloat16), ("bf16", torch.bfloat16)]
)
def test_key_selects_the_precision(tiny_cfg, dtype, precision):
    tiny_cfg.SOLVER.AMP.ENABLED, tiny_cfg.SOLVER.AMP.DTYPE = True, dtype
    assert DefaultTrainer(tiny_cfg)._trainer.precision == precision


def test_float16_without_cuda_is_an_error(tiny_cfg):
    tiny_cfg.SOLVER.AMP.ENABLED, tiny_cfg.SOLVER.AMP.DTYPE = True, "fp16"
    with pytest.raises(
        ValueError, match=r"SOLVER\.AMP\.DTYPE fp16 needs MODEL\.DEVICE cuda, .* on cpu: use bf16"
    ):
        DefaultTrainer(tiny_cfg)
