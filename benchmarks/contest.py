"""Time the same task done by two programs, in turn and in processes of their own."""

import math
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

IMAGE_SIZE = (480, 640)


@dataclass(frozen=True)
class Setting:
    """How the contests are run.

    Attributes:
        device: Of the models; loading, scoring and imports run on the CPU.
        quick: Smaller inputs and fewer rounds.
        dtype: Of mixed precision in the contests of models; float32 for none.
    """

    device: torch.device
    quick: bool = False
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Contest:
    """The same task done by detkit and by another program.

    Attributes:
        name: Of the contest.
        task: What is done in one round.
        opponent: The other program.
        ours: Does it once with detkit, and returns when it is done, on a GPU as well.
        theirs: Does it once with the other program.
        target: How many times faster detkit is meant to be on two CPU cores; None for no target.
        rounds: How often to measure.
        check: Called once with the results of `ours` and `theirs`; raises where they did not do
            the same task.
        is_part: Whether the other side's work is a part of detkit's: what detkit adds to it counts
            then, and `target` is in seconds.
        has_warm_up: Whether a first round, whose results are checked, does not count.
        shares: Returns by side where the time of a round goes: kind of operator -> seconds.
    """

    name: str
    task: str
    opponent: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    target: float | None
    rounds: int
    check: Callable[[Any, Any], None] | None = None
    is_part: bool = False
    has_warm_up: bool = True
    shares: Callable[[], dict[str, dict[str, float]]] | None = None


@dataclass(frozen=True)
class Measurement:
    """Seconds of every round of a contest, detkit's and the other side's.

    Attributes:
        contest: What was measured.
        ours: Seconds by the clock, of detkit.
        theirs: Of the other side.
        our_cpu: Seconds of processor time, of all threads; less disturbed by a busy machine.
        their_cpu: Of the other side.
    """

    contest: Contest
    ours: list[float]
    theirs: list[float]
    our_cpu: list[float]
    their_cpu: list[float]

    @property
    def ratio(self) -> float:
        """How many times faster detkit is, by the medians."""
        return statistics.median(self.theirs) / statistics.median(self.ours)

    @property
    def cpu_ratio(self) -> float:
        """The same in processor time; nan where the clock is too coarse."""
        ours = statistics.median(self.our_cpu)
        return statistics.median(self.their_cpu) / ours if ours else math.nan


def measure(contest: Contest, rounds: int) -> Measurement:
    """Run both sides in turn: once as a warm-up, then `rounds` times with the clock."""

    def timed(function: Callable[[], object]) -> tuple[object, tuple[float, float]]:
        start, cpu = time.perf_counter(), processor_seconds()
        result = function()
        seconds = time.perf_counter() - start
        if isinstance(function, OwnProcess):
            return result, (seconds, function.cpu_seconds)
        return result, (seconds, processor_seconds() - cpu)

    ours, theirs = [], []
    # In turn, so that a machine that becomes slower slows down both sides.
    for number in range(rounds + contest.has_warm_up):
        our_result, our_seconds = timed(contest.ours)
        their_result, their_seconds = timed(contest.theirs)
        if number == 0 and contest.check is not None:
            contest.check(our_result, their_result)
        if number > 0 or not contest.has_warm_up:
            ours.append(our_seconds)
            theirs.append(their_seconds)
    (our_wall, our_cpu), (their_wall, their_cpu) = (
        zip(*side, strict=True) for side in (ours, theirs)
    )
    return Measurement(contest, *map(list, (our_wall, their_wall, our_cpu, their_cpu)))


def processor_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def format_table(measurements: Iterable[Measurement], tablefmt: str = "simple") -> str:
    """Return a table of medians, fastest and slowest rounds, the ratios and the target.

    Args:
        measurements: A row each.
        tablefmt: As in `tabulate`; "pipe" is Markdown.
    """
    rows = []
    for m in measurements:
        target = "" if m.contest.target is None else f"{m.contest.target:.1f}x"
        rounds = [theirs / ours for ours, theirs in zip(m.ours, m.theirs, strict=True)]
        ratios = [
            f"{m.ratio:.2f}x ({min(rounds):.2f} to {max(rounds):.2f})",
            f"{m.cpu_ratio:.2f}x",
        ]
        if m.contest.is_part:
            target = f"+{m.contest.target} s"
            ratios = [_added(m.ours, m.theirs), _added(m.our_cpu, m.their_cpu)]
        sides = [_spread(m.ours), _spread(m.theirs)]
        rows.append([m.contest.name, m.contest.opponent, *sides, *ratios, target])
    headers = ["contest", "against", "detkit", "other", "faster", "in CPU time", "target"]
    return tabulate(rows, headers=headers, disable_numparse=True, tablefmt=tablefmt)


def _added(ours: Sequence[float], theirs: Sequence[float]) -> str:
    return f"+{statistics.median(ours) - statistics.median(theirs):.2f} s"


def format_shares(shares: dict[str, dict[str, float]], tablefmt: str = "simple") -> str:
    """Return a table of milliseconds by kind of operator, and their share, for each side."""
    kinds = sorted(
        {kind for of_side in shares.values() for kind in of_side},
        key=lambda kind: -max(of_side.get(kind, 0) for of_side in shares.values()),
    )
    totals = {side: sum(of_side.values()) for side, of_side in shares.items()}
    rows = [
        [kind]
        + [
            f"{1000 * of_side.get(kind, 0):.0f} ms ({of_side.get(kind, 0) / totals[side]:.0%})"
            for side, of_side in shares.items()
        ]
        for kind in kinds
    ]
    return tabulate(rows, headers=["where the time goes", *shares], tablefmt=tablefmt)


def _spread(seconds: Sequence[float]) -> str:
    unit, factor = ("ms", 1000) if max(seconds) < 1 else ("s", 1)
    low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
    return f"{middle * factor:.3g} {unit} ({low * factor:.3g} to {high * factor:.3g})"


class OwnProcess:
    """A function that lives in another process: called like the result of `build(*args)`.

    Two programs in one process would share the memory allocator with its settings, the caches and
    the threads. Arguments, results and the name of `build` are pickled, so `build` must be a
    function of a module, and its results should be small: sending them is part of the measured
    time. The process ends with this object.

    Attributes:
        cpu_seconds: Processor time of the last call, of all threads there.
    """

    def __init__(self, build: Callable[..., Callable[[], Any]], *args: Any) -> None:
        """Start the process, and wait until everything is built.

        Raises:
            RuntimeError: Something failed there; its traceback is the message.
        """
        # Not a fork: the threads of OpenMP do not survive one.
        context = multiprocessing.get_context("spawn")
        self._pipe, other_end = context.Pipe()
        arguments = (other_end, build, args, torch.get_num_threads())
        context.Process(target=_serve, args=arguments, daemon=True).start()
        other_end.close()
        self.cpu_seconds = 0.0
        self._receive()

    def __call__(self) -> Any:
        """Run the function once, and return its result."""
        self._pipe.send(True)
        return self._receive()

    def _receive(self) -> Any:
        try:
            result, error, self.cpu_seconds = self._pipe.recv()
        except EOFError:
            raise RuntimeError("a process of the benchmark died: out of memory, perhaps") from None
        if error:
            raise RuntimeError(f"a process of the benchmark failed:\n{error}")
        return result


def _serve(
    pipe: Connection,
    build: Callable[..., Callable[[], Any]],
    args: tuple[Any, ...],
    num_threads: int,
) -> None:
    torch.set_num_threads(num_threads)
    try:
        run = build(*args)
        pipe.send((None, "", 0.0))
        while pipe.recv():
            start = processor_seconds()
            result = run()
            pipe.send((result, "", processor_seconds() - start))
    except (EOFError, KeyboardInterrupt):  # the other end was closed: the benchmark is over
        return
    except Exception:
        pipe.send((None, traceback.format_exc(), 0.0))


def example_image() -> np.ndarray:
    """Return a noisy colour field, (480, 640, 3) uint8, as large as a photograph in JPEG."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: IMAGE_SIZE[0], : IMAGE_SIZE[1]]
    waves = [
        127 + 90 * np.sin(x / rng.uniform(20, 90)) * np.cos(y / rng.uniform(20, 90))
        for _ in range(3)
    ]
    noisy = np.stack(waves, axis=2) + rng.normal(0, 6, (*IMAGE_SIZE, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def example_objects(num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ten boxes on that image, (10, 4) XYXY in pixels, and their classes, (10,) int64."""
    rng = np.random.default_rng(1)
    sides = rng.uniform(30, 200, (10, 2))
    corners = rng.uniform(0, 1, (10, 2)) * (np.array(IMAGE_SIZE[::-1]) - sides)
    return np.concatenate([corners, corners + sides], axis=1), rng.integers(0, num_classes, 10)
