"""The buffers of a model as they were: a step that is left out, or a pass beside training, leaves
no trace in them.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn


class HeldBuffers:
    """A copy of all buffers of a model, of statistics and counters in particular.

    In training to be renewed before each step: one statistic that is not a number would stay so for
    all steps to come.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take the model, which is changed by `restore` only. The copy is made by `hold`."""
        self._model = model
        self._held: dict[tuple[nn.Module, str], Tensor | None] = {}

    @torch.no_grad()
    def hold(self) -> None:
        """Copy the buffers as they are."""
        present = self._present()
        alike: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = defaultdict(
            list
        )
        for key, value in present.items():
            held = self._held.get(key)
            if held is not None and value is not None and _is_alike(held, value):
                alike[value.device, value.dtype].append((held, value))
            else:
                self._held[key] = None if value is None else value.clone()
        for key in self._held.keys() - present.keys():
            del self._held[key]
        for pairs in (
            alike.values()
        ):  # one launch for all of a type: a detector has hundreds, all of them small
            onto, values = zip(*pairs, strict=True)
            torch._foreach_copy_(onto, values)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def restore(self) -> None:
        """Return the model's buffers the values that were held; one that has come into being since
        goes.
        """
        for key, present in self._present().items():
            module, name = key
            if key not in self._held:
                del module._buffers[name]
            elif (
                (held := self._held[key]) is not None
                and present is not None
                and _is_alike(held, present)
            ):
                present.copy_(held)
            else:
                module._buffers[name] = None if held is None else held.clone()

    def _present(self) -> dict[tuple[nn.Module, str], Tensor | None]:
        return {
            (module, name): value
            for module in self._model.modules()
            for name, value in module._buffers.items()
        }


def _is_alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
