"""`CallbackHook`: a hook made of functions."""

from collections.abc import Callable
from typing import Any

from detkit.engine.train_loop import HookBase, TrainerBase

Callback = Callable[[TrainerBase], Any]


class CallbackHook(HookBase):
    """Calls the functions it was given, each with the trainer."""

    def __init__(
        self,
        *,
        before_train: Callback | None = None,
        after_train: Callback | None = None,
        before_step: Callback | None = None,
        after_backward: Callback | None = None,
        after_step: Callback | None = None,
    ) -> None:
        """Keep the functions; each is optional."""
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
