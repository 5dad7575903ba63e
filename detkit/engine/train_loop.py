"""The training loop: a trainer that repeats a step, and hooks around each step."""

import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from detkit.utils import comm
from detkit.utils.env import random_state, set_random_state
from detkit.utils.events import EventStorage

logger = logging.getLogger(__name__)


class HookBase:
    """Something that happens around the steps of a trainer.

    A trainer calls its hooks in the order of registration:

    ```python
    hook.before_train()
    for trainer.iter in range(start_iter, max_iter):
        hook.before_step()
        trainer.run_step()  # calls hook.after_backward() before the optimizer steps
        hook.after_step()
    trainer.iter += 1  # trainer.iter == trainer.max_iter means: training was finished
    hook.after_train()  # also when a step raised
    ```

    A hook whose state must survive a resume has `state_dict` and `load_state_dict`. Where a hook
    writes a checkpoint after a step, a resumed run first calls `after_step` of the hooks behind it.
    Where `before_step` or `after_step` raises, a trainer with checkpoints writes one first.

    Attributes:
        trainer: The trainer, from registration on.
        runs_last: Whether the hook is called behind all others, wherever it is registered.
    """

    trainer: "TrainerBase"
    runs_last = False

    def before_train(self) -> None:
        """Run before the first step."""

    def after_train(self) -> None:
        """Run after the last step, or after a step that raised."""

    def before_step(self) -> None:
        """Run before each step."""

    def after_backward(self) -> None:
        """Run between the backward pass and the optimizer's step."""

    def after_step(self) -> None:
        """Run after each step."""

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state returned by `state_dict`."""

    def rank_state_dict(self) -> dict[str, Any]:
        """Return what must survive a resume and differs between the processes of a run."""
        return {}

    def load_rank_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `rank_state_dict` returned in the process of the same number."""


class PeriodicHook(HookBase):
    """Calls `act` every `period` iterations, and at the end of training as told."""

    def __init__(
        self, period: int, *, after_train: bool = True, after_last_step: bool = False
    ) -> None:
        """Set when to act.

        Args:
            period: Iterations between two calls; 0 or less for none before the end.
            after_train: Whether to act in `after_train` of a run that has finished. One that has
                stopped in between has not, and what it has learned may be broken.
            after_last_step: Whether to act in `after_step` of the last iteration, whatever the
                period: before hooks that save in it, for example.
        """
        self._period = period
        self._acts_after_train = after_train
        self._acts_after_last_step = after_last_step

    def act(self) -> None:
        """Do what the hook is for."""
        raise NotImplementedError

    def after_step(self) -> None:
        next_iter = self.trainer.iter + 1
        is_due = self._period > 0 and next_iter % self._period == 0
        # What acts after training would otherwise act twice on the last iteration.
        if next_iter == self.trainer.max_iter:
            is_due = self._acts_after_last_step
        if is_due:
            self.act()

    def after_train(self) -> None:
        if self._acts_after_train and self.trainer.iter >= self.trainer.max_iter:
            self.act()


Callback = Callable[["TrainerBase"], Any]


class CallbackHook(HookBase):
    """Calls functions with the trainer.

    Example:
        >>> hook = CallbackHook(after_step=lambda trainer: print(trainer.iter))
    """

    def __init__(
        self,
        *,
        before_train: Callback | None = None,
        after_train: Callback | None = None,
        before_step: Callback | None = None,
        after_backward: Callback | None = None,
        after_step: Callback | None = None,
    ) -> None:
        """Keep the functions, each of which is optional."""
        self._before_train = before_train
        self._after_train = after_train
        self._before_step = before_step
        self._after_backward = after_backward
        self._after_step = after_step

    def before_train(self) -> None:
        self._call(self._before_train)

    def after_train(self) -> None:
        self._call(self._after_train)

    def before_step(self) -> None:
        self._call(self._before_step)

    def after_backward(self) -> None:
        self._call(self._after_backward)

    def after_step(self) -> None:
        self._call(self._after_step)

    def _call(self, callback: Callback | None) -> None:
        if callback is not None:
            callback(self.trainer)


class TrainerBase:
    """Repeats `run_step` from one iteration to another, with hooks around each step.

    Attributes:
        iter: The present iteration.
        start_iter: The first iteration of this call of `train`.
        max_iter: The iteration at which training ends, not included. A hook may lower it.
        storage: What this run measures; active while it trains.
        was_skipped: Whether the last step was skipped, and has changed nothing; set by `run_step`.
        optimizer: Set by a subclass; hooks read it.
        scheduler: Set by a subclass that has one.
    """

    optimizer: Optimizer
    scheduler: LRScheduler

    def __init__(self) -> None:
        self._hooks: list[HookBase] = []
        self.iter = 0
        self.start_iter = 0
        self.max_iter = 0
        self.storage = EventStorage(0)
        self.was_skipped = False
        # By key, those whose `after_step` is yet to be called: a checkpoint is often written by a
        # hook before them.
        self._hooks_to_come: list[str] = []
        self._is_failing = False
        self._loaded: dict[str, Any] | None = None

    def register_hooks(self, hooks: Iterable[HookBase | None]) -> None:
        """Add hooks; None is skipped.

        They run in the order in which they were added, those with `runs_last` behind the others.

        Raises:
            TypeError: A hook is not a `HookBase`.
        """
        for hook in hooks:
            if hook is None:
                continue
            if not isinstance(hook, HookBase):
                raise TypeError(f"a hook must derive from HookBase, got {type(hook).__name__}")
            # Weak, so that trainer and hooks are freed (and with them GPU memory) without waiting
            # for a collection.
            hook.trainer = weakref.proxy(self)
            self._hooks.append(hook)

    def train(self, start_iter: int, max_iter: int) -> None:
        """Run the iterations from `start_iter` up to `max_iter`, which is not run."""
        logger.info("training from iteration %d to %d", start_iter, max_iter)
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage:
            try:
                self.before_train()
                self._continue_interrupted_step()
                for iteration in range(start_iter, max_iter):
                    if iteration >= self.max_iter:  # a hook ends the run earlier
                        break
                    self.iter = iteration
                    self.before_step()
                    self.run_step()
                    # `self._trainer.iter += 1` in a step for Detectron2 counts another trainer's.
                    self.iter = iteration
                    self.after_step()
                self.iter = max(start_iter, self.max_iter)
            except Exception:
                text = f"training stopped at iteration {self.iter}"
                # Where the error ends, Python shows the traceback.
                logger.exception("%s", text, extra={"console": text})
                raise
            finally:
                self.after_train()

    def run_step(self) -> None:
        """Train one iteration."""
        raise NotImplementedError(f"{type(self).__name__} must define run_step()")

    def before_train(self) -> None:
        """Call the hooks before the first step."""
        for hook in self._hooks_in_order():
            hook.before_train()

    def after_train(self) -> None:
        """Call the hooks after the last step: all, even if one raises, so that files are closed."""
        # A loop of a subclass's own, `for self.iter in range(...)`, ends at the last iteration.
        if self.iter + 1 == self.max_iter and sys.exc_info()[0] is None:
            self.iter = self.max_iter
        self.storage.iter = self.iter
        call_all(hook.after_train for hook in self._hooks_in_order())

    def before_step(self) -> None:
        """Call the hooks before a step."""
        # Evaluation and other hooks may step the storage as they like: each iteration starts from
        # the trainer's count.
        self.storage.iter = self.iter
        try:
            for hook in self._hooks_in_order():
                hook.before_step()
        except Exception:
            self._save_on_failure(self.iter - 1, [])
            raise

    def after_backward(self) -> None:
        """Call the hooks between the backward pass and the optimizer's step."""
        for hook in self._hooks_in_order():
            hook.after_backward()

    def after_step(self) -> None:
        """Call the hooks after a step."""
        self._call_after_step(list(self._hooks_by_key()))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the run. All processes must call it: it is gathered from all.

        But not when a hook has failed: the others may wait in it, and for ever.

        It holds the iteration, the states of the hooks, the hooks yet to be called after this
        iteration's step, the last values measured, and `rank_state_dict` of each process.
        """
        own = self.rank_state_dict()
        alone = [own, *({} for _ in range(1, comm.get_world_size()))]
        return {
            "iteration": self.iter,
            "hooks": self._hook_states(lambda hook: hook.state_dict()),
            "hooks_to_come": list(self._hooks_to_come),
            "storage": self.storage.state_dict(),
            "ranks": alone if self._is_failing else comm.gather(own),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state returned by `state_dict`; states of unknown hooks are logged.

        Random numbers and measured values are set when training begins, so that nothing in between
        changes them.
        """
        self.iter = state_dict["iteration"]
        hooks = self._hooks_by_key()
        for key, state in state_dict.get("hooks", {}).items():
            if key in hooks:
                hooks[key].load_state_dict(state)
            elif comm.is_main_process():  # the others have fewer
                logger.warning(
                    "the checkpoint has a state of hook %s, which this run does not use", key
                )
        self._loaded = state_dict
        ranks = state_dict.get("ranks", [])
        if _are_of_all(ranks):
            self.load_rank_state_dict(ranks[comm.get_rank()])
        else:
            self.share_out_rank_states(ranks)

    def rank_state_dict(self) -> dict[str, Any]:
        """Return what only this process knows: its random numbers, and such states of hooks."""
        hooks = self._hook_states(lambda hook: hook.rank_state_dict())
        return {"random": random_state(), "hooks": hooks}

    def load_rank_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `rank_state_dict` returned in the process of this number."""
        hooks = self._hooks_by_key()
        for key, state in state_dict["hooks"].items():
            if key in hooks:
                hooks[key].load_rank_state_dict(state)

    def share_out_rank_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Load what can be loaded from a run with another number of processes."""
        logger.warning(
            "the checkpoint has the states of %d processes, this run has %d: it cannot go on"
            " exactly as it was",
            sum(map(bool, states)),
            comm.get_world_size(),
        )

    def _continue_interrupted_step(self) -> None:
        """Go on where the loaded checkpoint was written: often between two hooks after a step."""
        loaded, self._loaded = self._loaded, None
        # A run that starts elsewhere than behind the checkpoint takes only its states.
        if loaded is None or loaded["iteration"] + 1 != self.start_iter:
            return
        self.iter = self.storage.iter = loaded["iteration"]
        if comm.is_main_process():
            self.storage.load_state_dict(loaded.get("storage", {}))
        ranks = loaded.get("ranks", [])
        # Last before training: building models, loaders and writers draws random numbers, too.
        if _are_of_all(ranks):
            set_random_state(ranks[comm.get_rank()]["random"])
        self._call_after_step(loaded.get("hooks_to_come", []))

    def _call_after_step(self, keys: Sequence[str]) -> None:
        hooks = self._hooks_by_key()
        for k, key in enumerate(keys):
            self._hooks_to_come = list(keys[k + 1 :])
            try:
                if key in hooks:
                    hooks[key].after_step()
            except Exception:
                self._save_on_failure(self.iter, keys[k:])
                raise

    def _save_on_failure(self, iteration: int, hooks_to_come: Sequence[str]) -> None:
        """Save the last whole iteration; a resumed run begins with the hook that has failed."""
        now, self.iter = self.iter, iteration
        self._hooks_to_come, self._is_failing = list(hooks_to_come), True
        try:
            self.save_on_failure()
        except Exception as error:  # the first error is the one to show, and often the cause
            logger.error("iteration %d could not be saved: %s", iteration, error)
        self.iter, self._is_failing = now, False

    def save_on_failure(self) -> None:
        """Save the state, without the other processes, before the error of a hook ends the run."""

    def _hook_states(self, state_of: Callable[[HookBase], dict[str, Any]]) -> dict[str, Any]:
        """Return the states of the hooks that have one."""
        states = {key: state_of(hook) for key, hook in self._hooks_by_key().items()}
        return {key: state for key, state in states.items() if state}

    def _hooks_in_order(self) -> list[HookBase]:
        return sorted(self._hooks, key=lambda hook: hook.runs_last)

    def _hooks_by_key(self) -> dict[str, HookBase]:
        """Return the hooks by class name, numbered from the second of a class on."""
        by_key: dict[str, HookBase] = {}
        counts: dict[str, int] = {}
        for hook in self._hooks_in_order():
            name = type(hook).__qualname__
            counts[name] = counts.get(name, 0) + 1
            by_key[name if counts[name] == 1 else f"{name}#{counts[name]}"] = hook
        return by_key


def _are_of_all(ranks: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether each process of this run finds its own."""
    return len(ranks) == comm.get_world_size() and all(ranks)


def call_all(functions: Iterable[Callable[[], Any]]) -> None:
    """Call each function even if one before it raised, log all errors, and raise the first one."""
    first: Exception | None = None
    for function in functions:
        try:
            function()
        except Exception as error:
            logger.exception("%s failed", getattr(function, "__qualname__", function))
            first = first or error
    if first is not None:
        raise first
