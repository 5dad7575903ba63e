"""`SimpleTrainer`: the step of supervised learning."""

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from detkit.data import HasState, TrainingStream
from detkit.engine.held_buffers import HeldBuffers
from detkit.engine.nonfinite import (
    BrokenStep,
    Pass,
    Verdict,
    explain,
    giving_nan,
    has_stand_in,
    in_short,
    judge,
)
from detkit.engine.step_metrics import StepMetrics, mean_by_name
from detkit.engine.train_loop import TrainerBase
from detkit.utils import comm
from detkit.utils.env import random_state
from detkit.utils.events import get_event_storage

logger = logging.getLogger(__name__)

# Steps whose losses show whether a run diverges.
_RECENT = 20


class SimpleTrainer(TrainerBase):
    """Trains one model with one optimizer: a batch, its losses, their gradients, a step.

    Losses and gradients are looked at before the optimizer steps, so that one that is not finite
    stops the run, or is skipped, with the weights as they were. A step that is skipped leaves
    buffers and optimizer as they were, too.

    Attributes:
        num_skipped: Steps skipped so far, runs that this one resumes included.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: Optimizer,
        gather_metric_period: int = 1,
        accum_steps: int = 1,
        max_skipped_steps: int = 0,
        dump_dir: str | None = None,
    ) -> None:
        """Keep the parts and set the model to training mode.

        Args:
            model: Takes a batch, gives a loss or a dict of losses, which are added.
            data_loader: Endless.
            optimizer: Steps once per iteration.
            gather_metric_period: Iterations between two gatherings of the metrics of all processes.
                Each iteration's values are filed under its own number; until gathered, they are not
                in the storage.
            accum_steps: Batches per iteration. Their gradients are averaged, as those of as many
                processes would be.
            max_skipped_steps: How many steps with losses or gradients that are not finite are left
                out before one stops the run.
            dump_dir: Folder for the file that explains the stop; None writes none.

        Raises:
            ValueError: The period, or the number of batches, is below 1, or the number of steps
                below 0.
        """
        super().__init__()
        if accum_steps < 1:
            raise ValueError(f"SOLVER.ACCUM_STEPS must be at least 1, got {accum_steps}")
        if gather_metric_period < 1:
            raise ValueError(f"gather_metric_period must be at least 1, got {gather_metric_period}")
        if max_skipped_steps < 0:
            raise ValueError(
                f"SOLVER.SKIP_NONFINITE_STEPS must be at least 0, got {max_skipped_steps}"
            )
        model.train()
        self.model = model
        self.data_loader = data_loader
        self.optimizer = optimizer
        self.gather_metric_period = gather_metric_period
        self.accum_steps = accum_steps
        self.max_skipped_steps = max_skipped_steps
        self.num_skipped = 0
        self._dump_dir = dump_dir
        self._buffers_before = HeldBuffers(_bare(model))
        self._recent_losses: deque[float] = deque(maxlen=_RECENT)
        self._num_steps = 0
        self._batches: Iterator[Any] | None = None
        self._metrics = StepMetrics()
        self._is_graph_checked = (
            not isinstance(model, DistributedDataParallel) or model.find_unused_parameters
        )

    def run_step(self) -> None:
        """Train one iteration.

        Raises:
            FloatingPointError: A loss or a gradient is infinite or not a number, once no more steps
                may be skipped; at once where the model says so itself, and has layers such as
                SyncBN in which other processes wait.
            RuntimeError: The model is in eval mode, or the data loader has ended.
        """
        if not self.model.training:
            raise RuntimeError(
                f"{type(self.model).__name__} is in eval mode; some hook did not set it back to"
                " training"
            )
        self._buffers_before.hold()
        self.optimizer.zero_grad()
        passes = [
            self._add_gradients(is_last=k + 1 == self.accum_steps) for k in range(self.accum_steps)
        ]
        self.after_backward()
        verdict = judge([p.losses for p in passes], list(_gradients(self.optimizer)))
        self.was_skipped = self._is_broken(verdict)
        if self.was_skipped:
            self._skip_or_stop(passes, verdict)
            return
        losses = mean_by_name(verdict.losses)
        self._write_metrics(losses, sum(p.data_time for p in passes))
        self.step_optimizer()
        self._num_steps += 1
        self._recent_losses.append(sum(losses.values()))

    def _add_gradients(self, *, is_last: bool) -> Pass:
        """Take a batch, and add its share to the gradients; processes exchange them with the last
        one only.
        """
        batch, data_time = self._next_batch()
        random = random_state()
        model = self.model
        error = ""
        with (
            model.no_sync()
            if isinstance(model, DistributedDataParallel) and not is_last
            else nullcontext()
        ):
            try:
                losses = self.compute_losses(batch)
            except (
                FloatingPointError
            ) as raised:  # a model that looks at its numbers itself, as the RPN does
                if not has_stand_in(_bare(model)):
                    raise
                error = str(raised)
                with giving_nan(_bare(model)):
                    losses = self.compute_losses(batch)
            self.backward(sum_losses(losses) / self.accum_steps)
        self._require_whole_graph()
        return Pass(
            batch, {name: loss.detach() for name, loss in losses.items()}, data_time, random, error
        )

    def _is_broken(self, verdict: Verdict) -> bool:
        """Whether the optimizer must not step; the same in all processes."""
        return verdict.is_loss_broken or (
            verdict.is_gradient_broken and not self.gradients_may_overflow()
        )

    def _skip_or_stop(self, passes: Sequence[Pass], verdict: Verdict) -> None:
        """Leave out a step, as if its batches had not come; or raise, where too many were left out."""
        step = BrokenStep(
            iteration=self.iter,
            passes=passes,
            verdict=verdict,
            model=_bare(self.model),
            optimizer=self.optimizer,
            buffers=self._buffers_before,
            compute_losses=self._compute_losses_alone,
            recent_losses=list(self._recent_losses),
            num_steps=self._num_steps,
            num_skipped=self.num_skipped,
        )
        if self.num_skipped >= self.max_skipped_steps:
            raise FloatingPointError(explain(step, self._dump_dir))
        self._buffers_before.restore()
        self.optimizer.zero_grad()
        self.num_skipped += 1
        get_event_storage().put_scalar("skipped_steps", self.num_skipped, smoothing_hint=False)
        logger.warning(
            "iteration %d is skipped (%d of SOLVER.SKIP_NONFINITE_STEPS=%d): not finite are %s",
            self.iter,
            self.num_skipped,
            self.max_skipped_steps,
            in_short(step),
        )
        self._gather_if_due()

    def compute_losses(self, batch: Any) -> dict[str, Tensor]:
        """Return the model's losses of a batch by name."""
        losses = self.model(batch)
        return {"total_loss": losses} if isinstance(losses, Tensor) else losses

    def _compute_losses_alone(self, batch: Any) -> dict[str, Tensor]:
        """As `compute_losses`, without the other processes."""
        model, self.model = self.model, _bare(self.model)
        try:
            return self.compute_losses(batch)
        finally:
            self.model = model

    def gradients_may_overflow(self) -> bool:
        """Whether gradients that are not finite are to be expected, and dealt with by
        `step_optimizer`.
        """
        return False

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients."""
        loss.backward()

    def step_optimizer(self) -> None:
        """Change the weights."""
        self.optimizer.step()

    def reset_data_loader(self, data_loader: Iterable[Any]) -> None:
        """Go on with another loader from the next step on."""
        self.data_loader = data_loader
        self._batches = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the run, and the optimizer's."""
        return {
            **super().state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "skipped_steps": self.num_skipped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        super().load_state_dict(state_dict)
        _require_same_kind(self.optimizer, state_dict["optimizer"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.num_skipped = state_dict.get(
            "skipped_steps", 0
        )  # absent from checkpoints of before it was counted

    def rank_state_dict(self) -> dict[str, Any]:
        """Return what only this process knows: also its position in the data, and metrics not
        gathered yet.
        """
        state = {**super().rank_state_dict(), "ungathered": self._metrics.state()}
        if isinstance(self.data_loader, HasState):
            state["data"] = self.data_loader.state_dict()
        if not comm.is_main_process():
            state["buffers"] = _buffers(self.model)
        return state

    def load_rank_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `rank_state_dict` gave in the process of this number."""
        super().load_rank_state_dict(state_dict)
        self._metrics.load_state(state_dict["ungathered"])
        self.model.load_state_dict(state_dict.get("buffers", {}), strict=False)
        if "data" in state_dict and isinstance(self.data_loader, HasState):
            self.data_loader.load_state_dict(state_dict["data"])
            self._batches = None
        else:
            _warn_of_data_without_position()

    def share_out_rank_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Take over what can be from a run with another number of processes: about the position in
        the data.
        """
        super().share_out_rank_states(states)
        positions = [state["data"] for state in states if "data" in state]
        if positions and isinstance(self.data_loader, TrainingStream):
            self.data_loader.move_to_share(positions)
            self._batches = None
        else:
            _warn_of_data_without_position()

    @property
    def _data_loader_iter(self) -> Iterator[Any]:
        """The running iterator over the data, made when first needed: workers start with training,
        not before.
        """
        if self._batches is None:
            self._batches = iter(self.data_loader)
        return self._batches

    def _next_batch(self) -> tuple[Any, float]:
        """The next batch, and the seconds spent waiting for it."""
        start = time.perf_counter()
        try:
            batch = next(self._data_loader_iter)
        except StopIteration:
            raise RuntimeError(
                f"the training data ended at iteration {self.iter}; a training loader must be"
                " endless, as with TrainingSampler"
            ) from None
        return batch, time.perf_counter() - start

    def _write_metrics(
        self, loss_dict: Mapping[str, float | Tensor], data_time: float, prefix: str = ""
    ) -> None:
        """Put losses, averaged over the processes, their sum and the longest data time into the
        storage.
        """
        self._metrics.put(
            self.iter, {prefix + name: float(value) for name, value in loss_dict.items()}, data_time
        )
        self._gather_if_due(prefix)

    def _gather_if_due(self, prefix: str = "") -> None:
        if (self.iter + 1) % self.gather_metric_period == 0 or self.iter + 1 == self.max_iter:
            self._metrics.gather(get_event_storage(), prefix)

    def _require_whole_graph(self) -> None:
        """Name the parameters without gradient, once, before DistributedDataParallel hangs or fails
        without names.
        """
        if self._is_graph_checked:
            return
        self._is_graph_checked = True
        parameters = cast(DistributedDataParallel, self.model).module.named_parameters()
        idle = [name for name, p in parameters if p.requires_grad and p.grad is None]
        if idle:
            names = ", ".join(idle[:8]) + (", ..." if len(idle) > 8 else "")
            raise RuntimeError(
                f"{len(idle)} parameters took no part in the losses: {names}. With several"
                " processes each trained parameter must: freeze these (requires_grad=False,"
                " MODEL.BACKBONE.FREEZE_AT), leave their outputs out (MODEL.RESNETS.OUT_FEATURES),"
                " or wrap the model with create_ddp_model(model, find_unused_parameters=True)."
            )


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """What a model saves beside its parameters, such as statistics: DistributedDataParallel does
    not make it alike.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = model.state_dict().items()
    return {
        name: value.cpu()
        for name, value in state
        if isinstance(value, Tensor) and name not in parameters
    }


def _warn_of_data_without_position() -> None:
    logger.warning(
        "the position in the training data is not known: they are seen from the start again."
        " Loaders of build_detection_train_loader have one, unless over an IterableDataset"
    )


def sum_losses(losses: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of the losses.

    Raises:
        ValueError: There is none, or one is not a scalar.
    """
    if not losses:
        raise ValueError("the model gave no losses in training mode")
    for name, loss in losses.items():
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise ValueError(f"loss {name!r} must be a scalar tensor, got {_described(loss)}")
    return torch.stack([loss.float() for loss in losses.values()]).sum()


def _bare(model: nn.Module) -> nn.Module:
    """The model without the wrapper that exchanges gradients."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _gradients(optimizer: Optimizer) -> Iterator[Tensor]:
    return (
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    )


def _require_same_kind(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Raise where a saved state is that of another optimizer: torch would take it, and fail at the
    next step.
    """
    # Not all settings: newer versions of torch have more of them, and fill them in.
    telling = {"momentum", "betas"} & set(optimizer.defaults)
    lacking = sorted(telling - set(saved["param_groups"][0])) if saved["param_groups"] else []
    if lacking:
        raise ValueError(
            f"the checkpoint's optimizer is not {type(optimizer).__name__}: its state has no"
            f" {', '.join(lacking)}. Resume with the SOLVER.OPTIMIZER of the run so far, or start"
            " anew from its weights (MODEL.WEIGHTS)"
        )


def _described(value: Any) -> str:
    return (
        f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    )
