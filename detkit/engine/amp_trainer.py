"""`AMPTrainer`: the step of supervised learning in mixed precision."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from detkit.engine.simple_trainer import SimpleTrainer


class AMPTrainer(SimpleTrainer):
    """A `SimpleTrainer` in mixed precision: float16 with loss scaling on GPUs, bfloat16 on CPUs.

    Source: Micikevicius et al. 2017, arXiv 1710.03740.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: Optimizer,
        gather_metric_period: int = 1,
        grad_scaler: torch.amp.GradScaler | None = None,
        precision: torch.dtype | None = None,
        accum_steps: int = 1,
        max_skipped_steps: int = 0,
        dump_dir: str | None = None,
    ) -> None:
        """Keep the parts.

        Args:
            model: As in `SimpleTrainer`; its parameters stay float32.
            data_loader: As in `SimpleTrainer`.
            optimizer: As in `SimpleTrainer`.
            gather_metric_period: As in `SimpleTrainer`.
            grad_scaler: Scales the loss; None takes torch's, which is idle but for float16.
            precision: Type of convolutions and matrix products; None takes float16 on CUDA and
                bfloat16 elsewhere.
            accum_steps: As in `SimpleTrainer`.
            max_skipped_steps: As in `SimpleTrainer`.
            dump_dir: As in `SimpleTrainer`.

        Raises:
            ValueError: float16 where there is no CUDA: gradients in it need what only GPUs do fast
                and in full.
        """
        super().__init__(
            model,
            data_loader,
            optimizer,
            gather_metric_period,
            accum_steps,
            max_skipped_steps,
            dump_dir,
        )
        self.device_type = next(model.parameters()).device.type
        self.precision = precision or (
            torch.float16 if self.device_type == "cuda" else torch.bfloat16
        )
        if self.precision == torch.float16 and self.device_type != "cuda":
            raise ValueError(
                "SOLVER.AMP.DTYPE fp16 needs MODEL.DEVICE cuda, the model is on"
                f" {self.device_type}: use bf16 there"
            )
        # bfloat16 has the range of float32: there is nothing to scale.
        self.grad_scaler = grad_scaler or torch.amp.GradScaler(
            self.device_type, enabled=self.precision == torch.float16
        )

    def compute_losses(self, batch: Any) -> dict[str, Tensor]:
        with torch.autocast(self.device_type, dtype=self.precision):
            return super().compute_losses(batch)

    def backward(self, loss: Tensor) -> None:
        self.grad_scaler.scale(loss).backward()

    def gradients_may_overflow(self) -> bool:
        """Whether the loss is scaled up: the scaler leaves out such steps, and scales less.

        At a scale of 1 or below it is not the scale that overflows, and the scaler would leave out
        steps for ever.
        """
        return self.grad_scaler.is_enabled() and self.grad_scaler.get_scale() > 1

    def step_optimizer(self) -> None:
        # Clipping hangs on the optimizer's step, behind the unscaling: see
        # detkit.solver.gradient_clipping.
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if state_dict.get(
            "grad_scaler"
        ):  # absent when the run so far was in full precision, empty for bfloat16
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
