"""Metrics of a run: a storage for scalars and images, and writers to files and the console.

Scalars may be tensors on any device. They are copied to the host in one batch when a writer reads
them: logging a loss does not synchronize with the device.
"""

import datetime
import functools
import itertools
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

from detkit.utils.errors import ContractError
from detkit.utils.logger import progress_bar
from detkit.utils.text import printable

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

logger = logging.getLogger(__name__)

_storages: list["EventStorage"] = []
# Values per scalar in a checkpoint: the default window of the writers' medians.
_KEPT_VALUES = 20
# Images that wait for a writer; without TensorBoard, none reads them.
_KEPT_IMAGES = 32
# Scalars that wait for their copy to the host; only the main process has writers that read them.
_MAX_PENDING = 10_000
# Values kept per scalar: all values of a long run could take gigabytes.
_MAX_VALUES = 10_000
# With the time that the console shows before it, `[12:30:59] `, a line has 120 columns at most.
_CONSOLE_COLUMNS = 109


def get_event_storage() -> "EventStorage":
    """Return the storage of the innermost active `with EventStorage(...)`.

    Raises:
        RuntimeError: No storage is active.
    """
    if not _storages:
        raise RuntimeError(
            "get_event_storage() needs an active EventStorage: use `with EventStorage(0):`"
        )
    return _storages[-1]


def has_event_storage() -> bool:
    """Return whether a storage is active; layers log only then."""
    return bool(_storages)


class EventStorage:
    """Scalars and images of a run, by name and iteration; active inside its `with` block.

    Example:
        >>> from detkit.utils.events import EventStorage, get_event_storage
        >>> with EventStorage(start_iter=7) as storage:
        ...     get_event_storage().put_scalar("loss", 0.5)
        >>> storage.latest()
        {'loss': (0.5, 7)}
    """

    def __init__(self, start_iter: int = 0) -> None:
        self.iter = start_iter
        self._history: dict[str, HistoryBuffer] = defaultdict(partial(HistoryBuffer, _MAX_VALUES))
        self._smoothed: dict[str, bool] = {}
        self._latest: dict[str, tuple[float, int]] = {}
        self._pending: list[tuple[str, float | Tensor, int]] = []
        # Read by users' writers, under these names of Detectron2.
        self._vis_data: deque[tuple[str, Any, int]] = deque(maxlen=_KEPT_IMAGES)
        self._histograms: list[dict[str, Any]] = []
        self._prefix = ""

    def put_scalar(
        self,
        name: str,
        value: float | Tensor,
        smoothing_hint: bool = True,
        cur_iter: int | None = None,
    ) -> None:
        """Add a scalar under a name, at the current iteration.

        Args:
            name: For example `loss_cls`; TensorBoard groups `a/b` under a.
            value: A number or a tensor of one element, which is read later.
            smoothing_hint: Whether writers show a median of the last values, as for a loss, or the
                last one, as for a learning rate.
            cur_iter: Iteration of the value, if not the current one.

        Raises:
            ValueError: A tensor has more than one element.
            ValueError: The name was used with the other smoothing hint.
        """
        name = self._prefix + name
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"scalar {name!r} must have one element, got shape {tuple(value.shape)}"
                )
            # Cloned, as the tensor may be changed in place before it is read.
            value = value.detach().reshape(()).clone()
        if self._smoothed.setdefault(name, smoothing_hint) != smoothing_hint:
            raise ContractError(
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
        """Add an image for TensorBoard.

        Args:
            name: Tag of the image.
            image: (C, H, W) tensor or array, uint8 in [0, 255] or float in [0, 1], RGB.
        """
        self._vis_data.append((self._prefix + name, image, self.iter))

    def images(self) -> list[tuple[str, Any, int]]:
        """Return up to 32 images since `clear_images`, as (name, image, iteration)."""
        return list(self._vis_data)

    def clear_images(self) -> None:
        """Drop the images, once they are written."""
        self._vis_data.clear()

    def put_histogram(self, name: str, values: Tensor, bins: int = 1000) -> None:
        """Add the distribution of values for TensorBoard.

        Args:
            name: Tag of the histogram.
            values: Numbers of any shape.
            bins: Number of bins between the smallest and the largest.
        """
        values = values.detach().cpu().double()
        counts, edges = torch.histogram(values.flatten(), bins)
        self._histograms.append(
            {
                "tag": self._prefix + name,
                "min": values.min().item(),
                "max": values.max().item(),
                "num": values.numel(),
                "sum": values.sum().item(),
                "sum_squares": values.square().sum().item(),
                "bucket_limits": edges[1:].tolist(),
                "bucket_counts": counts.tolist(),
                "global_step": self.iter,
            }
        )

    def histograms(self) -> list[dict[str, Any]]:
        """Return the histograms since `clear_histograms`, for `add_histogram_raw` of torch."""
        return list(self._histograms)

    def clear_histograms(self) -> None:
        """Drop the histograms, once they are written."""
        self._histograms.clear()

    def history(self, name: str) -> HistoryBuffer:
        """Return up to 10,000 last values of a scalar; `global_avg` covers all values.

        Raises:
            KeyError: No scalar has that name.
        """
        self._fetch()
        if name not in self._history:
            raise KeyError(f"no scalar {name!r} was put, only {sorted(self._history)}")
        return self._history[name]

    def histories(self) -> dict[str, HistoryBuffer]:
        """Return the histories of all scalars, by name."""
        self._fetch()
        return dict(self._history)

    def latest(self) -> dict[str, tuple[float, int]]:
        """Return the last value of each scalar, with its iteration."""
        self._fetch()
        return dict(self._latest)

    @property
    def _latest_scalars(self) -> dict[str, tuple[float, int]]:
        """What `latest` returns, as loggers of Detectron2's users read it."""
        return self.latest()

    def smoothing_hints(self) -> dict[str, bool]:
        """Return the `smoothing_hint` of each scalar, by name."""
        return dict(self._smoothed)

    def latest_with_smoothing_hint(self, window_size: int = 20) -> dict[str, tuple[float, int]]:
        """Return `latest`; of smoothed scalars the median over `window_size` iterations."""
        shown = self.latest()
        for name, (_, iteration) in shown.items():
            if self._smoothed[name]:
                num_samples = self.count_samples(name, window_size)
                shown[name] = (self._history[name].median(num_samples), iteration)
        return shown

    def count_samples(self, name: str, window_size: int = 20) -> int:
        """Return the number of values of a scalar in the last `window_size` iterations."""
        values = self.history(name).values()
        first = values[-1][1] - window_size + 1
        return sum(1 for _ in itertools.takewhile(lambda v: v[1] >= first, reversed(values)))

    def new_by_iteration(self, after: int, window_size: int = 20) -> dict[int, dict[str, float]]:
        """Return the values of `latest_with_smoothing_hint` after an iteration, by iteration."""
        by_iter: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in self.latest_with_smoothing_hint(window_size).items():
            if iteration > after:
                by_iter[iteration][name] = value
        return dict(sorted(by_iter.items()))

    def state_dict(self) -> dict[str, Any]:
        """Return the values that the writers need after a resume; images are not included."""
        return {
            name: {
                "values": [list(value) for value in history.values()[-_KEPT_VALUES:]],
                "latest": list(self._latest[name]),
                "smoothed": self._smoothed[name],
            }
            for name, history in self.histories().items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state into a new storage."""
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
        """Copy pending scalars to the host, with one copy per device."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        numbers = [0.0] * len(pending)
        by_device: dict[torch.device, dict[int, Tensor]] = defaultdict(dict)
        for i, (_, value, _) in enumerate(pending):
            if isinstance(value, Tensor):
                by_device[value.device][i] = value
            else:
                numbers[i] = float(value)
        for device, tensors in by_device.items():
            dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
            fetched = torch.stack([tensor.to(dtype) for tensor in tensors.values()]).tolist()
            for i, number in zip(tensors, fetched, strict=True):
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
        """Write the new values of the active storage."""

    def open(self) -> None:  # noqa: B027 - optional
        """Prepare for writing; called after `load_state_dict` and before the first step."""

    def close(self) -> None:  # noqa: B027 - optional
        """Release files and connections."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the output, from which a resumed run continues."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # noqa: B027 - optional
        """Continue from a position, and remove what a killed run wrote after it."""


class LineWriter(EventWriter):
    """Appends a line per iteration to a text file; on resume, drops lines after the checkpoint.

    Attributes:
        header: First line of the file; empty for none.
    """

    header = ""

    def __init__(self, path: str, window_size: int = 20) -> None:
        """Set the file, which is opened at the first write.

        Args:
            path: Path of the file; its folder is created if missing.
            window_size: Number of values in medians.
        """
        self._path = Path(path)
        self._file: TextIO | None = None
        self._window_size = window_size
        self._last_write = -1

    @staticmethod
    @abstractmethod
    def iteration_of(line: str) -> float:
        """Return the iteration of a line, or infinity if a kill left it incomplete."""

    def state_dict(self) -> dict[str, Any]:
        return {"last_write": self._last_write}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._last_write = state_dict["last_write"]
        if not self._path.exists():
            return
        head = [self.header] if self.header else []
        # Bytes that are not UTF-8, which a crash may leave, make their line a damaged one, and are
        # not an error.
        with self._path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            lines = list(file)[len(head) :]
        kept = [line for line in lines if self.iteration_of(line) <= self._last_write]
        if kept != lines:
            # Not in place: a second kill could lose all lines.
            temporary = self._path.with_name(f".{self._path.name}.tmp")
            text = "".join([*head, *kept])
            temporary.write_bytes(text.encode("utf-8", errors="surrogateescape"))
            temporary.replace(self._path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def _file_handle(self) -> TextIO:
        """The open file, for a `write` of a subclass."""
        return self._open()

    def _open(self) -> TextIO:
        if self._file is not None and not self._path.exists():
            logger.warning("%s was deleted while the run goes on: it begins anew", self._path)
            self._file.close()
            self._file = None
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
                # JSON has no nan, which is for example the AP of a class without ground truth.
                line[name] = value if math.isfinite(value) else None
            self._open().write(json.dumps(line, sort_keys=True) + "\n")
            self._last_write = iteration
        self._open().flush()

    @staticmethod
    def iteration_of(line: str) -> float:
        try:
            iteration = json.loads(line)["iteration"]
        except KeyError:
            return -1  # a line of a subclass
        except (ValueError, TypeError, RecursionError):
            return math.inf
        return iteration if type(iteration) is int else math.inf


class TensorboardXWriter(EventWriter):
    """Writes scalars, images and histograms for TensorBoard."""

    def __init__(self, log_dir: str, window_size: int = 20, **kwargs: Any) -> None:
        """Set the folder, whose event file is opened at the first write.

        Args:
            log_dir: Folder of the event files.
            window_size: Number of values in medians.
            **kwargs: For torch's `SummaryWriter`, such as `flush_secs`.
        """
        self._log_dir = log_dir
        self._kwargs = kwargs
        self._purge_step: int | None = None
        self._window_size = window_size
        self._last_write = -1

    @functools.cached_property
    def _writer(self) -> Any:
        # Imported here, as it takes a second.
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self._log_dir, purge_step=self._purge_step, **self._kwargs)

    def write(self) -> None:
        storage = get_event_storage()
        is_there = "://" in self._log_dir or any(Path(self._log_dir).glob("events.out.tfevents.*"))
        if "_writer" in vars(self) and not is_there:
            logger.warning("the events in %s were deleted: they begin anew", self._log_dir)
            # Without it, the thread of the former writer ends the run with an error.
            Path(self._log_dir).mkdir(parents=True, exist_ok=True)
            self.close()
            del self._writer
        new = storage.new_by_iteration(self._last_write, self._window_size)
        for iteration, scalars in new.items():
            for name, value in scalars.items():
                self._writer.add_scalar(printable(name), value, iteration)
            self._last_write = iteration
        for name, image, iteration in storage.images():
            self._writer.add_image(printable(name), image, iteration)
        storage.clear_images()
        for histogram in storage.histograms():
            tag = printable(histogram["tag"])
            self._writer.add_histogram_raw(**{**histogram, "tag": tag})
        storage.clear_histograms()

    def state_dict(self) -> dict[str, Any]:
        return {"last_write": self._last_write}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._last_write = state_dict["last_write"]
        # TensorBoard ignores what a killed run wrote from this step on.
        self._purge_step = self._last_write + 1

    def close(self) -> None:
        if "_writer" in vars(self):
            self._writer.close()


class CommonMetricPrinter(EventWriter):
    """Logs a line with iteration, remaining time, losses, times, learning rate and memory.

    The console shows of it what fits.
    """

    def __init__(
        self,
        max_iter: int | None = None,
        window_size: int = 20,
        *,
        iterations_per_epoch: float | None = None,
    ) -> None:
        """Set the length of the run.

        Args:
            max_iter: Iterations of the whole run; None if unknown, then no remaining time is shown.
            window_size: Number of values in medians.
            iterations_per_epoch: Iterations that go once through the data; None if unknown, then no
                epoch is shown.
        """
        self._iterations_per_epoch = iterations_per_epoch
        self.logger = logging.getLogger(__name__)
        self._max_iter = max_iter
        self._window_size = window_size
        self._last_write: tuple[int, float] | None = None

    def write(self) -> None:
        storage = get_event_storage()
        if self._max_iter is not None and storage.iter >= self._max_iter:
            return  # a loop may write once more after training; the last line is already logged
        shown = storage.latest_with_smoothing_hint(self._window_size)
        of = "" if self._max_iter is None else f"/{self._max_iter}"
        parts = [f"iter: {storage.iter + 1}{of}"]
        if self._iterations_per_epoch:
            parts.append(f"epoch: {(storage.iter + 1) / self._iterations_per_epoch:.2f}")
        eta = self._get_eta(storage)
        if eta is not None:
            parts.append(f"eta: {eta}")
        short = list(parts)
        for name, (value, _) in shown.items():
            # `val/loss_cls` and the like belong to an evaluation, not to this iteration.
            if "loss" in name and "/" not in name:
                parts.append(f"{name}: {value:.4g}")
                short.append(f"{name.removeprefix('loss_')}: {value:.2g}")
        # What users ask to be printed, as in Detectron2.
        parts += [
            f"{name}: {value:.4g}" for name, (value, _) in shown.items() if "[metric]" in name
        ]
        for name in ("time", "data_time"):
            if name in shown:
                parts.append(f"{name}: {shown[name][0]:.4f}s")
        if "lr" in shown:
            parts.append(f"lr: {shown['lr'][0]:.5g}")
            short.append(f"lr: {shown['lr'][0]:.2g}")
        parts.append(f"max_mem: {peak_memory_mb():.0f}M")
        line = short[0]
        for part in short[1:]:
            if len(f"{line}  {part}") <= _CONSOLE_COLUMNS:
                line += f"  {part}"
        self.logger.info("  ".join(parts), extra={"console": line})

    def _get_eta(self, storage: EventStorage) -> str | None:
        """Return the remaining time, if it is known, and put it into the storage."""
        # Detectron2's name, which its users' subclasses override.
        seconds = self._remaining_seconds(storage)
        if seconds is None:
            return None
        storage.put_scalar("eta_seconds", seconds, smoothing_hint=False)
        return str(datetime.timedelta(seconds=int(seconds)))

    def _remaining_seconds(self, storage: EventStorage) -> float | None:
        if self._max_iter is None:
            return None
        remaining = self._max_iter - storage.iter - 1
        histories = storage.histories()
        if "time" in histories:
            return histories["time"].median(1000) * remaining
        # In a custom loop without the timing hook, use the time since the last line.
        now, last = time.perf_counter(), self._last_write
        self._last_write = (storage.iter, now)
        if last is None or storage.iter == last[0]:
            return None
        return (now - last[1]) / (storage.iter - last[0]) * remaining


class ProgressBar(EventWriter):
    """Shows a progress bar if the output is a terminal.

    It reads no scalars: writing it in every iteration does not synchronize with the device.
    """

    def __init__(self, max_iter: int) -> None:
        self._max_iter = max_iter

    def open(self) -> None:
        self._bar = progress_bar(total=self._max_iter, unit="it")

    def write(self) -> None:
        # Set, not incremented: a resumed run starts in the middle.
        done = min(get_event_storage().iter + 1, self._bar.total)
        if not self._bar.n:
            self._bar.initial = done - 1  # what an earlier run has done says nothing of the speed
        self._bar.n = done
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


def peak_memory_mb() -> float:
    """Return the peak memory of the process on its CUDA device, or else in RAM, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, Linux KiB
