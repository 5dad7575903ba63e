"""The metrics of a run: a storage for scalars and pictures, and writers to files and the console.

Scalars may be tensors on any device. They are copied to the host together, when a writer reads
them, so that a training step never waits for the device just to log its losses.
"""

import datetime
import json
import logging
import math
import sys
import time
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from fvcore.common.history_buffer import HistoryBuffer
from torch import Tensor
from tqdm import tqdm

__all__ = [
    "CommonMetricPrinter",
    "EventStorage",
    "EventWriter",
    "JSONWriter",
    "ProgressBar",
    "TensorboardXWriter",
    "get_event_storage",
    "has_event_storage",
]

_storages: list["EventStorage"] = []
# Values of each scalar in a checkpoint: the writers' medians are over this many.
_KEPT_VALUES = 20
# Pictures that wait to be written. Without TensorBoard nobody reads them, and a run must not
# collect them for days.
_KEPT_IMAGES = 32
# Scalars that wait to be copied to the host. Only writers read them, which the main process alone
# has; the others would collect them for ever.
_MAX_PENDING = 10_000
# Values kept of a scalar: all of a run of days could take gigabytes.
_MAX_VALUES = 10_000


def get_event_storage() -> "EventStorage":
    """Return the storage of the innermost `with EventStorage(...)` that is active.

    Raises:
        RuntimeError: None is active.
    """
    if not _storages:
        raise RuntimeError(
            "get_event_storage() needs an active EventStorage: wrap the code in `with"
            " EventStorage(0):`"
        )
    return _storages[-1]


def has_event_storage() -> bool:
    """Return whether a storage is active; layers log only then."""
    return bool(_storages)


class EventStorage:
    """Scalars and pictures of a run, by name and iteration. Active inside its own `with` block."""

    def __init__(self, start_iter: int = 0) -> None:
        self.iter = start_iter
        self._history: dict[str, HistoryBuffer] = defaultdict(partial(HistoryBuffer, _MAX_VALUES))
        self._smoothed: dict[str, bool] = {}
        self._latest: dict[str, tuple[float, int]] = {}
        self._pending: list[tuple[str, float | Tensor, int]] = []
        self._images: deque[tuple[str, Any, int]] = deque(maxlen=_KEPT_IMAGES)
        self._prefix = ""

    def put_scalar(
        self,
        name: str,
        value: float | Tensor,
        *,
        smoothing_hint: bool = True,
        cur_iter: int | None = None,
    ) -> None:
        """Add a scalar under a name, at the current iteration.

        Args:
            name: For example `loss_cls`; TensorBoard groups `a/b` under a.
            value: A number, or a tensor of one element, which is read later.
            smoothing_hint: Whether the console shows a median of the last values, for a noisy loss,
                or the last one, for a rate.
            cur_iter: Iteration of the value, if not the current one.

        Raises:
            ValueError: A tensor has more than one element.
            ValueError: The name had another smoothing hint before.
        """
        name = self._prefix + name
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"scalar {name!r} must have one element, got shape {tuple(value.shape)}"
                )
            # A clone, as the tensor may change in place before it is read.
            value = value.detach().reshape(()).clone()
        if self._smoothed.setdefault(name, smoothing_hint) != smoothing_hint:
            raise ValueError(
                f"scalar {name!r} was put with smoothing_hint={not smoothing_hint} before"
            )
        self._pending.append((name, value, self.iter if cur_iter is None else cur_iter))
        if len(self._pending) == _MAX_PENDING:
            self._fetch()

    def put_scalars(
        self, *, smoothing_hint: bool = True, cur_iter: int | None = None, **values: float | Tensor
    ) -> None:
        """Add several scalars at once: `put_scalars(loss_cls=..., loss_box_reg=...)`."""
        for name, value in values.items():
            self.put_scalar(name, value, smoothing_hint=smoothing_hint, cur_iter=cur_iter)

    def put_image(self, name: str, image: Any) -> None:
        """Add a picture for TensorBoard.

        Args:
            name: Tag of the picture.
            image: (C, H, W) tensor or array, uint8 in [0, 255] or float in [0, 1], RGB.
        """
        self._images.append((self._prefix + name, image, self.iter))

    def images(self) -> list[tuple[str, Any, int]]:
        """Return the last 32 pictures since `clear_images`, as (name, picture, iteration)."""
        return list(self._images)

    def clear_images(self) -> None:
        """Drop the pictures, once they are written."""
        self._images.clear()

    def history(self, name: str) -> HistoryBuffer:
        """Return the last 10,000 values of a scalar; their `global_avg` is over all values.

        Raises:
            KeyError: No scalar has that name.
        """
        self._fetch()
        if name not in self._history:
            raise KeyError(f"no scalar {name!r} was put; there are {sorted(self._history)}")
        return self._history[name]

    def histories(self) -> dict[str, HistoryBuffer]:
        """Return the histories of all scalars, by name."""
        self._fetch()
        return dict(self._history)

    def latest(self) -> dict[str, tuple[float, int]]:
        """Return the last value of each scalar, with its iteration."""
        self._fetch()
        return dict(self._latest)

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, tuple[float, int]]:
        """Return `latest`, with the median of `window_size` values for scalars to be smoothed."""
        shown = self.latest()
        for name, (_, iteration) in shown.items():
            if self._smoothed[name]:
                shown[name] = (self._history[name].median(window_size), iteration)
        return shown

    def new_by_iteration(self, after: int, window_size: int = 20) -> dict[int, dict[str, float]]:
        """Return the values of `latest_with_smoothing_hint` after an iteration, by iteration."""
        by_iter: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in self.latest_with_smoothing_hint(window_size).items():
            if iteration > after:
                by_iter[iteration][name] = value
        return dict(sorted(by_iter.items()))

    def state_dict(self) -> dict[str, Any]:
        """Return what the next lines of the writers need; pictures are not included."""
        return {
            name: {
                "values": [list(value) for value in history.values()[-_KEPT_VALUES:]],
                "latest": list(self._latest[name]),
                "smoothed": self._smoothed[name],
            }
            for name, history in self.histories().items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state; nothing may have been put before."""
        for name, scalar in state_dict.items():
            for value, iteration in scalar["values"]:
                self._history[name].update(value, iteration)
            self._smoothed[name] = scalar["smoothed"]
            self._latest[name] = tuple(scalar["latest"])

    def step(self) -> None:
        """Advance to the next iteration."""
        self.iter += 1

    @contextmanager
    def name_scope(self, name: str) -> Iterator[None]:
        """Prefix every name inside the block with `name/`."""
        before = self._prefix
        self._prefix = name.rstrip("/") + "/"
        try:
            yield
        finally:
            self._prefix = before

    def _fetch(self) -> None:
        """Copy waiting scalars to the host, those of a device with one copy."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        by_device: dict[torch.device, list[int]] = defaultdict(list)
        for i, (_, value, _) in enumerate(pending):
            if isinstance(value, Tensor):
                by_device[value.device].append(i)
        numbers = [0.0 if isinstance(value, Tensor) else float(value) for _, value, _ in pending]
        for device, where in by_device.items():
            dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
            fetched = torch.stack(
                [torch.as_tensor(pending[i][1]).to(dtype) for i in where]
            ).tolist()
            for i, number in zip(where, fetched, strict=True):
                numbers[i] = number
        for (name, _, iteration), number in zip(pending, numbers, strict=True):
            self._history[name].update(number, iteration)
            self._latest[name] = (number, iteration)

    def __enter__(self) -> "EventStorage":
        _storages.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        if not _storages or _storages[-1] is not self:
            raise RuntimeError("EventStorage blocks must close in the reverse order of opening")
        _storages.pop()


class EventWriter(ABC):
    """Writes the metrics of the active storage, each time `write` is called."""

    @abstractmethod
    def write(self) -> None:
        """Write what is new in the active storage."""

    def open(self) -> None:  # noqa: B027 - optional
        """Get ready, after `load_state_dict` and before the first step: errors come early."""

    def close(self) -> None:  # noqa: B027 - optional
        """Release files and connections."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the output, so that a resumed run writes nothing twice."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # noqa: B027 - optional
        """Continue from a saved position, and remove what a killed run has written after it."""


class LineWriter(EventWriter):
    """Appends a line per iteration to a text file; on resume, drops lines after the checkpoint.

    Attributes:
        header: First line of the file; empty for none.
    """

    header = ""

    def __init__(self, path: str, window_size: int = 20) -> None:
        """Set the file; it is opened for appending at the first write.

        Args:
            path: Of the file; its folder is created if missing.
            window_size: Values in the median of scalars with a smoothing hint.
        """
        self._path = Path(path)
        self._file: TextIO | None = None
        self._window_size = window_size
        self._last_write = -1

    @staticmethod
    @abstractmethod
    def iteration_of(line: str) -> float:
        """Return the iteration of a line; infinity for an incomplete one, as a kill leaves it."""

    def state_dict(self) -> dict[str, Any]:
        return {"last_write": self._last_write}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._last_write = state_dict["last_write"]
        if not self._path.exists():
            return
        head = [self.header] if self.header else []
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)[len(head) :]
        kept = [line for line in lines if self.iteration_of(line) <= self._last_write]
        if kept != lines:
            # Not in place: a second kill would lose the lines of a run of days.
            temporary = self._path.with_name(f".{self._path.name}.tmp")
            temporary.write_text("".join([*head, *kept]), encoding="utf-8")
            temporary.replace(self._path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self) -> TextIO:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8", newline="")
            if self._path.stat().st_size == 0:
                self._file.write(self.header)
        return self._file


class JSONWriter(LineWriter):
    """Appends a line `{"iteration": i, name: value, ...}` per iteration; null for nan and inf."""

    def __init__(self, json_file: str, window_size: int = 20) -> None:
        """Set the file; see `LineWriter`."""
        super().__init__(json_file, window_size)

    def write(self) -> None:
        new = get_event_storage().new_by_iteration(self._last_write, self._window_size)
        for iteration, scalars in new.items():
            line: dict[str, float | None] = {"iteration": iteration}
            for name, value in scalars.items():
                # JSON has no nan, which is the AP of a class without ground truth.
                line[name] = value if math.isfinite(value) else None
            self._open().write(json.dumps(line, sort_keys=True) + "\n")
            self._last_write = iteration
        self._open().flush()

    @staticmethod
    def iteration_of(line: str) -> float:
        try:
            return json.loads(line)["iteration"]
        except (ValueError, KeyError, TypeError):
            return math.inf


class TensorboardXWriter(EventWriter):
    """Writes scalars and pictures for TensorBoard, through `torch.utils.tensorboard`."""

    def __init__(self, log_dir: str, window_size: int = 20) -> None:
        """Set the folder; the file is opened at the first write.

        Args:
            log_dir: Folder of the event files.
            window_size: Values in the median of scalars with a smoothing hint.
        """
        self._log_dir = log_dir
        self._purge_step: int | None = None
        self._window_size = window_size
        self._writer: Any = None
        self._last_write = -1

    def write(self) -> None:
        storage = get_event_storage()
        new = storage.new_by_iteration(self._last_write, self._window_size)
        for iteration, scalars in new.items():
            for name, value in scalars.items():
                self._open().add_scalar(name, value, iteration)
            self._last_write = iteration
        for name, image, iteration in storage.images():
            self._open().add_image(name, image, iteration)
        storage.clear_images()

    def _open(self) -> Any:
        if self._writer is None:
            # The import takes a second, which only runs that write should pay.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._log_dir, purge_step=self._purge_step)
        return self._writer

    def state_dict(self) -> dict[str, Any]:
        return {"last_write": self._last_write}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._last_write = state_dict["last_write"]
        # From there on TensorBoard ignores what the killed run has written.
        self._purge_step = self._last_write + 1

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class CommonMetricPrinter(EventWriter):
    """Logs a line with iteration, remaining time, losses, times, learning rate and memory."""

    def __init__(self, max_iter: int | None = None, window_size: int = 20) -> None:
        """Set the length of the run.

        Args:
            max_iter: Iterations of the whole run, for the remaining time; None leaves it out.
            window_size: Values in the medians shown.
        """
        self._logger = logging.getLogger("detkit.train")
        self._max_iter = max_iter
        self._window_size = window_size
        self._last: tuple[int, float] | None = None

    def write(self) -> None:
        storage = get_event_storage()
        if self._max_iter is not None and storage.iter >= self._max_iter:
            return  # hooks that run after training write too; the last line is already there
        shown = storage.latest_with_smoothing_hint(self._window_size)
        of = "" if self._max_iter is None else f"/{self._max_iter}"
        parts = [f"iter: {storage.iter + 1}{of}"]
        seconds = self._remaining_seconds(storage)
        if seconds is not None:
            storage.put_scalar("eta_seconds", seconds, smoothing_hint=False)
            parts.append(f"eta: {datetime.timedelta(seconds=int(seconds))}")
        for name, (value, _) in shown.items():
            # `val/loss_cls` and the like are scores of an evaluation, not of this iteration.
            if "loss" in name and "/" not in name:
                parts.append(f"{name}: {value:.4g}")
        for name in ("time", "data_time"):
            if name in shown:
                parts.append(f"{name}: {shown[name][0]:.4f}s")
        if "lr" in shown:
            parts.append(f"lr: {shown['lr'][0]:.5g}")
        parts.append(f"max_mem: {peak_memory_mb():.0f}M")
        self._logger.info("  ".join(parts))

    def _remaining_seconds(self, storage: EventStorage) -> float | None:
        if self._max_iter is None:
            return None
        remaining = self._max_iter - storage.iter - 1
        histories = storage.histories()
        if "time" in histories:
            return histories["time"].median(1000) * remaining
        # A loop of the user's own without the timing hook: the time between two lines.
        now, last = time.perf_counter(), self._last
        self._last = (storage.iter, now)
        if last is None or storage.iter == last[0]:
            return None
        return (now - last[1]) / (storage.iter - last[0]) * remaining


class ProgressBar(EventWriter):
    """A progress bar with speed and remaining time on a terminal, and nothing elsewhere.

    It reads no scalars, so writing it at every step does not wait for the device.
    """

    def __init__(self, max_iter: int) -> None:
        """Create a bar of `max_iter` iterations."""
        self._bar = tqdm(
            total=max_iter,
            file=sys.stdout,
            disable=not sys.stdout.isatty(),
            unit="it",
            dynamic_ncols=True,
        )

    def write(self) -> None:
        # Not counted: a resumed run begins in the middle.
        self._bar.n = min(get_event_storage().iter + 1, self._bar.total)
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


def peak_memory_mb() -> float:
    """Return the peak memory of the process in MiB: of the CUDA device, or else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, Linux KiB
