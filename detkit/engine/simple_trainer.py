"""`SimpleTrainer`: the step of supervised learning, in full or mixed precision."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from detkit.data import HasState, TrainingStream
from detkit.engine.nonfinite import NonFiniteGuard, Pass
from detkit.engine.step_metrics import StepMetrics
from detkit.engine.train_loop import TrainerBase
from detkit.utils import comm
from detkit.utils.env import random_state
from detkit.utils.errors import ConfigError, UserError, WeightsError
from detkit.utils.events import get_event_storage
from detkit.utils.overriding import is_overridden, overridable
from detkit.utils.sharded import own_optimizer_state, whole
from detkit.utils.text import listed

logger = logging.getLogger(__name__)


class SimpleTrainer(TrainerBase):
    """Trains a model with an optimizer: a batch, its losses, their gradients, a step.

    Losses and gradients are checked before the optimizer steps: a step with infinite or nan ones
    is skipped or stops the run, with weights, buffers and optimizer as they were before it.

    Source: mixed precision as in Micikevicius et al. 2017, arXiv 1710.03740.

    Example:
        >>> from torch import nn
        >>> class Net(nn.Linear):
        ...     def forward(self, batch):
        ...         return {"loss": super().forward(batch).square().mean()}
        >>> model = Net(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> trainer = SimpleTrainer(model, [torch.ones(4, 2)] * 3, optimizer)
        >>> trainer.train(0, 3)
        >>> trainer.iter
        3
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        data_loader: Iterable[Any] = (),
        optimizer: Optimizer | None = None,
        gather_metric_period: int = 1,
        accum_steps: int = 1,
        max_skipped_steps: int = 0,
        dump_dir: str | None = None,
        precision: torch.dtype | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        *,
        zero_grad_before_forward: bool = True,
        async_write_metrics: bool = False,
    ) -> None:
        """Keep the parts and set the model to training mode.

        Args:
            model: Takes a batch, returns a loss or a dict of losses, which are added. None is for
                trainers that get their parts later, such as subclasses of `DefaultTrainer` with an
                `__init__` of their own, which set `_trainer`.
            data_loader: Endless.
            optimizer: Steps once per iteration.
            gather_metric_period: Iterations between two gatherings of the metrics of all processes.
                Each iteration's values are stored under its own number; until gathered, they are
                not in the storage.
            accum_steps: Batches per iteration. Their gradients are averaged, as those of as many
                processes would be.
            max_skipped_steps: How many steps with non-finite losses or gradients are skipped before
                one stops the run.
            dump_dir: Folder for the file that explains the stop; None writes none.
            precision: Type of convolutions and matrix products under autocast; parameters stay
                float32. None trains in full precision.
            grad_scaler: Scales the loss; None takes torch's, enabled for float16 only.
            zero_grad_before_forward: Detectron2's; gradients are always cleared before.
            async_write_metrics: Detectron2's; metrics never wait for the device.

        Raises:
            ValueError: `gather_metric_period` or `accum_steps` is below 1.
            ValueError: `max_skipped_steps` is below 0.
            TypeError: There is a model without an optimizer, or the other way round.
            ConfigError: `precision` is float16 and the model is not on CUDA.
        """
        super().__init__()
        if model is None and optimizer is None:
            return
        if model is None or optimizer is None:
            raise TypeError("a trainer needs a model and an optimizer")
        if accum_steps < 1:
            raise ValueError(f"accum_steps must be at least 1, got {accum_steps}")
        if gather_metric_period < 1:
            raise ValueError(f"gather_metric_period must be at least 1, got {gather_metric_period}")
        device_type = device_type_of(model)
        if precision == torch.float16 and device_type != "cuda":
            # Gradients in float16 need what only GPUs do fast and in full.
            raise ConfigError(
                "SOLVER.AMP.DTYPE fp16 needs MODEL.DEVICE cuda, the model is on"
                f" {device_type}: use bf16 there"
            )
        model.train()
        self.model = model
        self.data_loader = data_loader
        self.optimizer = optimizer
        self.gather_metric_period = gather_metric_period
        self.accum_steps = accum_steps
        self.precision = precision
        # bfloat16 has the range of float32: there is nothing to scale. A scaler that is not enabled
        # passes loss and step through.
        self.grad_scaler = grad_scaler or torch.amp.GradScaler(
            device_type, enabled=precision == torch.float16
        )
        self.guard = NonFiniteGuard(
            _unwrapped(model), optimizer, max_skipped=max_skipped_steps, dump_dir=dump_dir
        )
        self._batches: Iterator[Any] | None = None
        self._metrics = StepMetrics()
        self._is_graph_checked = False

    def run_step(self) -> None:
        """Train one iteration.

        Raises:
            NonFiniteError: A loss or a gradient is infinite or nan, and no more steps may be
                skipped.
            FloatingPointError: The model raised it while other processes wait in its layers, as in
                those of SyncBN.
            RuntimeError: The model is in eval mode.
            RuntimeError: The data loader has ended.
        """
        if not self.model.training:
            raise RuntimeError(
                f"{type(self.model).__name__} is in eval mode; some hook did not set it back to"
                " training"
            )
        self.guard.begin()
        self.optimizer.zero_grad()
        passes = [
            self._forward_backward(is_last=k + 1 == self.accum_steps)
            for k in range(self.accum_steps)
        ]
        self.after_backward()
        self.was_skipped = not self.guard.accepts(passes, self)
        if self.was_skipped:
            self._gather_if_due()
            return
        losses: Mapping[str, float | Tensor] = self.guard.losses
        if is_overridden(self._write_metrics):
            # Detectron2's are tensors, and users' methods call `detach` or `item`.
            losses = {
                name: torch.tensor(loss, dtype=torch.float64)
                for name, loss in self.guard.losses.items()
            }
        self._write_metrics(losses, sum(p.data_time for p in passes))
        self.step_optimizer()

    def _forward_backward(self, *, is_last: bool) -> Pass:
        """Take a batch and add its share to the gradients, which the last pass exchanges."""
        batch, data_time = self._next_batch()
        random = random_state()  # dropout and sampling of a replay must draw the same
        model = self.model
        # DistributedDataParallel exchanges the sum of all passes, in the last one.
        is_wrapped = isinstance(model, DistributedDataParallel)
        with model.no_sync() if is_wrapped and not is_last else nullcontext():
            losses, error = self.guard.compute_losses(self.compute_losses, batch)
            self.backward(sum_losses(losses) / self.accum_steps)
        self._require_whole_graph()
        detached = {name: loss.detach() for name, loss in losses.items()}
        return Pass(batch, detached, data_time, random, error)

    def compute_losses(self, batch: Any) -> dict[str, Tensor]:
        """Return the model's losses of a batch by name."""
        if self.precision is None:
            losses = self.model(batch)
        else:
            with torch.autocast(device_type_of(self.model), dtype=self.precision):
                losses = self.model(batch)
        return {"total_loss": losses} if isinstance(losses, Tensor) else losses

    def compute_losses_alone(self, batch: Any) -> dict[str, Tensor]:
        """Return the losses of a batch without the other processes."""
        model, self.model = self.model, _unwrapped(self.model)
        try:
            return self.compute_losses(batch)
        finally:
            self.model = model

    def gradients_may_overflow(self) -> bool:
        """Return whether the loss is scaled up: the scaler skips such steps, and scales less.

        At a scale of 1 or below it is not the scale that overflows, and the scaler would skip steps
        for ever.
        """
        return self.grad_scaler.is_enabled() and self.grad_scaler.get_scale() > 1

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients."""
        self.grad_scaler.scale(loss).backward()

    def step_optimizer(self) -> None:
        """Change the weights."""
        # Clipping hangs on the optimizer's step, behind the unscaling: see
        # detkit.solver.build.
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    @property
    def num_skipped(self) -> int:
        """Steps skipped so far, including those of the runs that this one resumes."""
        return self.guard.num_skipped

    def reset_data_loader(self, data_loader: Iterable[Any] | Callable[[], Iterable[Any]]) -> None:
        """Go on with another loader, or with what a function returns, from the next step on."""
        # As in Detectron2, the loader that is replaced may be freed before the other one is built.
        self.data_loader = []
        self.data_loader = data_loader() if callable(data_loader) else data_loader
        self._batches = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the run, and those of optimizer and loss scaler."""
        return {
            **super().state_dict(),
            "optimizer": whole(self.optimizer.state_dict()),
            "grad_scaler": self.grad_scaler.state_dict(),
            "skipped_steps": self.guard.num_skipped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state returned by `state_dict`."""
        super().load_state_dict(state_dict)
        _require_same_kind(self.optimizer, state_dict["optimizer"])
        state = own_optimizer_state(self.optimizer, state_dict["optimizer"])
        self.optimizer.load_state_dict(state)
        # Empty where the run so far needed no scaling, absent in older files of full precision.
        if self.grad_scaler.is_enabled() and state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self.guard.num_skipped = state_dict.get("skipped_steps", 0)  # absent in older files

    def rank_state_dict(self) -> dict[str, Any]:
        """Return what only this process knows, with its data position and ungathered metrics."""
        state = {**super().rank_state_dict(), "ungathered": self._metrics.state()}
        if isinstance(self.data_loader, HasState):
            state["data"] = self.data_loader.state_dict()
        if not comm.is_main_process():
            # Statistics and the like, which DistributedDataParallel does not make alike. Those of
            # the main process are saved with the model.
            parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
            state["buffers"] = {
                name: value.cpu()
                for name, value in self.model.state_dict().items()
                if isinstance(value, Tensor) and name not in parameters
            }
        return state

    def load_rank_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `rank_state_dict` returned in the process of this number."""
        super().load_rank_state_dict(state_dict)
        self._metrics.load_state(state_dict["ungathered"])
        # In the main process all tensors came with the model; a second, empty load would reset what
        # a model grows in training, such as RetinaNet's normaliser.
        if "buffers" in state_dict:
            self.model.load_state_dict(state_dict["buffers"], strict=False)  # without parameters
        if "data" in state_dict and isinstance(self.data_loader, HasState):
            self.data_loader.load_state_dict(state_dict["data"])
            self._batches = None  # a running iterator has read ahead
        else:
            _warn_of_data_without_position()

    def share_out_rank_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Take over the data position of a run with another number of processes."""
        super().share_out_rank_states(states)
        positions = [state["data"] for state in states if "data" in state]
        if positions and isinstance(self.data_loader, TrainingStream):
            self.data_loader.move_to_share(positions)
            self._batches = None
        else:
            _warn_of_data_without_position()

    @property
    def _data_loader_iter(self) -> Iterator[Any]:
        """The running iterator over the data: workers start with training, not before."""
        if self._batches is None:
            self._batches = iter(self.data_loader)
        return self._batches

    def _next_batch(self) -> tuple[Any, float]:
        """Return the next batch, and the seconds spent waiting for it."""
        start = time.perf_counter()
        try:
            batch = next(self._data_loader_iter)
        except StopIteration:
            raise RuntimeError(
                f"the training data ended at iteration {self.iter}; a training loader must be"
                " endless, as with TrainingSampler"
            ) from None
        return batch, time.perf_counter() - start

    @overridable
    def _write_metrics(
        self, loss_dict: Mapping[str, float | Tensor], data_time: float, prefix: str = ""
    ) -> None:
        """Store the losses as means over the processes, their sum and the longest data time."""
        values = {prefix + name: float(value) for name, value in loss_dict.items()}
        self._metrics.put(self.iter, values, data_time)
        self._gather_if_due(prefix)

    def _gather_if_due(self, prefix: str = "") -> None:
        # Also after a skipped step: all processes gather at the same iterations.
        if (self.iter + 1) % self.gather_metric_period == 0 or self.iter + 1 == self.max_iter:
            self._metrics.gather(get_event_storage(), prefix)

    def _require_whole_graph(self) -> None:
        """Check once that every parameter has a gradient.

        DistributedDataParallel would hang, or fail without naming those that have none.
        """
        model = self.model
        is_first, self._is_graph_checked = not self._is_graph_checked, True
        if not is_first or not isinstance(model, DistributedDataParallel):
            return
        if model.find_unused_parameters:
            return
        parameters = model.module.named_parameters()
        idle = [name for name, p in parameters if p.requires_grad and p.grad is None]
        if idle:
            raise NoGradientError(
                f"{len(idle)} parameters took no part in the losses: {listed(idle, 8)}. With"
                " several processes each trained parameter must: freeze these (requires_grad=False,"
                " MODEL.BACKBONE.FREEZE_AT), leave their outputs out (MODEL.RESNETS.OUT_FEATURES),"
                " or wrap the model with create_ddp_model(model, find_unused_parameters=True)."
            )


class NoGradientError(UserError, RuntimeError):
    """A trained parameter has no gradient in a run of several processes."""


class AMPTrainer(SimpleTrainer):
    """A `SimpleTrainer` in mixed precision: float16 on GPUs, bfloat16 elsewhere, unless told."""

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
        *,
        zero_grad_before_forward: bool = True,
        log_grad_scaler: bool = False,
        async_write_metrics: bool = False,
    ) -> None:
        """Build a `SimpleTrainer`; `precision` None takes `default_precision(model)`.

        The keyword arguments are Detectron2's. `log_grad_scaler` stores the scale of each step as
        `[metric]grad_scaler`; the others change nothing here.
        """
        # Up to Detectron2 0.6, the scaler is the fourth argument.
        if isinstance(gather_metric_period, torch.amp.GradScaler):
            gather_metric_period, grad_scaler = 1, gather_metric_period
        self.log_grad_scaler = log_grad_scaler
        super().__init__(
            model,
            data_loader,
            optimizer,
            gather_metric_period,
            accum_steps,
            max_skipped_steps,
            dump_dir,
            precision or default_precision(model),
            grad_scaler,
        )

    def step_optimizer(self) -> None:
        """Change the weights."""
        if self.log_grad_scaler:
            scale = self.grad_scaler.get_scale()
            get_event_storage().put_scalar("[metric]grad_scaler", scale)
        super().step_optimizer()


def default_precision(model: nn.Module) -> torch.dtype:
    """Return the type of mixed precision for the model's device: float16 on CUDA, else bfloat16."""
    return torch.float16 if device_type_of(model) == "cuda" else torch.bfloat16


def device_type_of(model: nn.Module) -> str:
    """Return the type of the device that the model's parameters are on, such as `cuda`."""
    return next((parameter.device.type for parameter in model.parameters()), "cpu")


def sum_losses(losses: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of the losses.

    Raises:
        ValueError: There is no loss.
        ValueError: A loss is not a scalar tensor.
    """
    if not losses:
        raise ValueError("the model gave no losses in training mode")
    for name, loss in losses.items():
        if not isinstance(loss, Tensor):
            raise ValueError(f"loss {name!r} must be a scalar tensor, got a {type(loss).__name__}")
        if loss.dim() != 0:
            raise ValueError(
                f"loss {name!r} must be a scalar tensor, got shape {tuple(loss.shape)}"
            )
    # In float32, whatever the precision of the passes: bfloat16 keeps three digits of a sum.
    return torch.stack([loss.float() for loss in losses.values()]).sum()


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model without DistributedDataParallel, which exchanges gradients."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _warn_of_data_without_position() -> None:
    logger.warning(
        "the position in the training data is not known: they are seen from the start again."
        " Loaders of build_detection_train_loader have one, unless over an IterableDataset"
    )


def _require_same_kind(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Raise where a state is that of another optimizer: torch would fail at the next step only."""
    # Not all settings: newer versions of torch have more of them, and fill them in.
    telling = {"momentum", "betas"} & set(optimizer.defaults)
    lacking = sorted(telling - set(saved["param_groups"][0])) if saved["param_groups"] else []
    if lacking:
        raise WeightsError(
            f"the checkpoint's optimizer is not {type(optimizer).__name__}: its state has no"
            f" {', '.join(lacking)}. Resume with the SOLVER.OPTIMIZER of the run so far, or start"
            " anew from its weights (MODEL.WEIGHTS)"
        )
