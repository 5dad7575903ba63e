"""Measure detkit on a GPU, beside torchvision in the same run; benchmarks/gpu.sh runs it.

    python benchmarks/gpu.py --budget 300 --json gpu.json
    python benchmarks/gpu.py --device cpu --tiny mask

Each part runs in a process of its own and prints a line per measurement. A part that fails, or does
not end in its time, is reported, and the next one runs. Where the budget ends, so does the run.

What is compared is said in pairs.py. Times are medians of rounds in which the libraries take
turns, the device idle before and after each. `peak` is the share of the rate that a large matrix
product reached in the same precision and process; operations are those of convolutions and matrix
products, forward and backward. `waits` are synchronisations that CUDA reports.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from counts import Traffic, Waits
from pairs import Pair, Task, autocast, config_step
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from detkit.cli.errors import run_command
from detkit.layers import cpu_kernels
from detkit.utils.env import resolve_device
from detkit.utils.errors import UnknownNameError
from detkit.utils.text import did_you_mean

_ROOT = Path(__file__).resolve().parents[1]
# Name in the table -> type under autocast, and precision of float32 products and convolutions.
PRECISIONS = {
    "tf32": (torch.float32, "high"),
    "bf16": (torch.bfloat16, "high"),
    "float32": (torch.float32, "highest"),
}


@dataclass
class Run:
    """Sizes and limits of a part, and the rows that it has measured.

    Attributes:
        task: Device and image size.
        train_batch: Images per training step.
        infer_batches: Images per forward pass, one measurement each.
        rounds: Fewest per measurement.
        seconds: Of rounds per measurement.
        deadline: `time.monotonic()` after which no measurement starts.
        backend: Of torch.compile.
        folder: Takes `rows.jsonl`, traces and tables.
    """

    task: Task
    train_batch: int
    infer_batches: tuple[int, ...]
    rounds: int
    seconds: float
    deadline: float
    backend: str
    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Device of the measurements."""
        return self.task.device

    def add(self, name: str, **values: Any) -> None:
        """Print a row, and keep it in the file that the parent process reads."""
        row = {"name": name, **values}
        self.rows.append(row)
        with (self.folder / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        text = " ".join(f"{key}={_text(value)}" for key, value in values.items())
        print(f"{name:<44} {text}", flush=True)

    def attempt(self, name: str, measure: Callable[[], None]) -> None:
        """Run a measurement; what it raises becomes a row, and the next one can run."""
        if time.monotonic() > self.deadline:
            self.add(name, skipped="no time left")
            return
        try:
            measure()
        except Exception as error:
            traceback.print_exc()
            self.add(name, error=f"{type(error).__name__}: {error}"[:400])
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- Parts ---


def machine(run: Run) -> None:
    """What the chip can do: matrix products, copies, launches."""
    for precision in PRECISIONS:
        run.attempt(
            f"matrix product {precision}",
            lambda p=precision: run.add(
                f"matrix product {p}", tflops=matrix_rate(run.device, p) / 1e12
            ),
        )

    def copy() -> None:
        source = torch.rand(1 << (28 if run.device.type == "cuda" else 18), device=run.device)
        target = torch.empty_like(source)
        seconds = statistics.median(_seconds(lambda: target.copy_(source), run.device, 10))
        run.add("copy", gb_per_s=2 * source.nbytes / seconds / 1e9)

    def launches() -> None:
        x = torch.zeros(1, device=run.device)
        start = time.perf_counter()
        for _ in range(1000):
            x.add_(1)
        run.add("queue an operator", us=(time.perf_counter() - start) * 1e3)

    run.attempt("copy", copy)
    run.attempt("queue an operator", launches)


def detector(kind: str, run: Run) -> None:
    """Inference and training of one kind in both libraries, with waits and profiles."""
    pair = Pair(kind, run.task)
    # Strict float32, which few train in, comes last, where time may have ended.
    for precisions in (("tf32", "bf16"), ("float32",)):
        for precision in precisions:
            for batch in run.infer_batches:
                run.attempt(
                    f"{kind} infer {precision} batch {batch}",
                    lambda p=precision, b=batch: _infer(run, pair, p, b),
                )
        for precision in precisions:
            run.attempt(
                f"{kind} train {precision} batch {run.train_batch}",
                lambda p=precision: _train(run, pair, p),
            )
        if precisions[0] == "tf32":
            run.attempt(f"{kind} graph", lambda: _graph(run, pair))


def compiled(run: Run) -> None:
    """`torch.compile` of the backbone with its pyramid, in inference and training."""
    pair = Pair("faster", run.task)
    plain = pair.backbone.forward
    for precision in ("bf16", "tf32"):
        run.attempt(
            f"faster compiled infer {precision}",
            lambda p=precision: _compiled_infer(run, pair, p),
        )
        pair.backbone.forward = plain
    run.attempt("faster compiled train bf16", lambda: _compiled_train(run, pair))


def transformer(run: Run) -> None:
    """Training steps of ViTDet's Mask R-CNN with ViT-B on squares of 1024 pixels, in bf16."""
    settings: list[Any] = []
    side = 1024
    if run.task.is_tiny:
        side = 64
        settings = ["MODEL.VIT.EMBED_DIM", 32, "MODEL.VIT.DEPTH", 3, "MODEL.VIT.NUM_HEADS", 2]
        settings += ["MODEL.VIT.GLOBAL_BLOCKS", [2], "MODEL.FPN.SQUARE_PAD", side]
        settings += ["MODEL.RPN.POST_NMS_TOPK_TRAIN", 20, "MODEL.FPN.OUT_CHANNELS", 16]
    task = replace(run.task, image_size=(side, side))
    for batch, is_checkpointed in ((1, False), (2, False), (4, False), (4, True)):
        name = f"ViT-B train bf16 batch {batch}{' checkpointed' * is_checkpointed}"
        with_checkpoints = [*settings, "MODEL.VIT.CHECKPOINT", is_checkpointed]
        run.attempt(
            name,
            lambda n=name, s=with_checkpoints, b=batch: _transformer_step(run, n, s, b, task),
        )


def _transformer_step(run: Run, name: str, settings: list[Any], batch: int, task: Task) -> None:
    with _precision("bf16") as dtype:
        before = _start_of_peak(run.device)
        config = "ViTDet/COCO/mask_rcnn_vitdet_b_100ep.yaml"
        step = config_step(config, settings, batch, task, dtype)
        step()
        seconds = _seconds(step, run.device, run.rounds)
        memory = (_peak_memory(run.device) - before) / 2**20
        counter = FlopCounterMode(display=False)
        with counter:
            step()
        middle = statistics.median(seconds)
        rate = counter.get_total_flops() / middle / matrix_rate(run.device, "bf16")
        run.add(
            name,
            ms=middle * 1e3,
            images_per_s=batch / middle,
            peak=rate,
            memory_mb=memory,
            low=min(seconds) * 1e3,
            high=max(seconds) * 1e3,
            rounds=len(seconds),
        )
        if batch == 4 and "checkpointed" not in name:
            _profile(run, name, step)


@dataclass(frozen=True)
class Part:
    """A part of the benchmark, in a process of its own.

    Attributes:
        measure: Adds rows to a run.
        seconds: That it may take on a GPU, from the start of its process.
    """

    measure: Callable[[Run], None]
    seconds: float


# Add a part here: it runs within the budget, after those before it.
PARTS: dict[str, Part] = {
    "machine": Part(machine, 30),
    "mask": Part(lambda run: detector("mask", run), 100),
    "faster": Part(lambda run: detector("faster", run), 75),
    "compiled": Part(compiled, 90),
    "retinanet": Part(lambda run: detector("retinanet", run), 60),
    "vit": Part(transformer, 60),
}


# --- Measurements ---


def _infer(run: Run, pair: Pair, precision: str, batch: int) -> None:
    name = f"{pair.kind} infer {precision} batch {batch}"
    with _precision(precision) as dtype:
        functions = pair.infer(batch, dtype)
        found = {side: function() for side, function in functions.items()}
        objects = {"detkit": sum(map(len, found["detkit"]))}
        objects["torchvision"] = sum(len(output["boxes"]) for output in found["torchvision"])
        rate = matrix_rate(run.device, precision)
        _contest(run, name, functions, rate, images=batch, extra={"objects": objects})
        if precision == "bf16" or batch == 1:
            _profile(run, name, functions["detkit"])


def _train(run: Run, pair: Pair, precision: str) -> None:
    name = f"{pair.kind} train {precision} batch {run.train_batch}"
    with _precision(precision) as dtype:
        functions = pair.train(run.train_batch, dtype)
        rate = matrix_rate(run.device, precision)
        _contest(run, name, functions, rate, images=run.train_batch)
        if precision == "bf16":
            for side, step in functions.items():
                _profile(run, f"{name} {side}", step)
            _with_cudnn_benchmark(run, name, functions["detkit"])


def _with_cudnn_benchmark(run: Run, name: str, step: Callable[[], Any]) -> None:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        step()
        seconds = _seconds(step, run.device, run.rounds, run.seconds / 2)
        run.add(f"{name} detkit CUDNN_BENCHMARK", ms=statistics.median(seconds) * 1e3)
    finally:
        torch.backends.cudnn.benchmark = before


def _contest(
    run: Run,
    name: str,
    functions: dict[str, Callable[[], Any]],
    rate: float,
    images: int,
    extra: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Time functions by library in turn, and add a row for each."""
    values: dict[str, dict[str, Any]] = {}
    for side, function in functions.items():
        function()  # warm-up: kernels are loaded, algorithms chosen
        before = _start_of_peak(run.device)
        counter, traffic = FlopCounterMode(display=False), Traffic()
        with counter, traffic:
            waits = device_waits(function, run.device)
        values[side] = {
            "memory_mb": (_peak_memory(run.device) - before) / 2**20,
            "gflop": counter.get_total_flops() / 1e9,
            "waits": waits.total(),
            "operators": traffic.operators,
            "allocated_mb": traffic.allocated / 2**20,
            "copied_mb": traffic.copied.total() / 2**20,
        }
        if side == "detkit":
            places = ", ".join(f"{count}x {place}" for place, count in waits.most_common(12))
            run.add(f"{name} waits", places=places)
    seconds: dict[str, list[float]] = {side: [] for side in functions}
    start = time.monotonic()
    while len(seconds["detkit"]) < run.rounds or time.monotonic() - start < run.seconds:
        for side, function in functions.items():
            seconds[side] += _seconds(function, run.device, 1)
        if len(seconds["detkit"]) == 30:
            break
    middle = {side: statistics.median(times) for side, times in seconds.items()}
    for side, times in seconds.items():
        others = {key: value[side] for key, value in (extra or {}).items()}
        run.add(
            f"{name} {side}",
            ms=middle[side] * 1e3,
            low=min(times) * 1e3,
            high=max(times) * 1e3,
            rounds=len(times),
            images_per_s=images / middle[side],
            peak=values[side]["gflop"] * 1e9 / middle[side] / rate,
            **values[side],
            **others,
        )
    run.add(f"{name} ratio", torchvision_to_detkit=middle["torchvision"] / middle["detkit"])


def _profile(run: Run, name: str, function: Callable[[], Any]) -> None:
    """Add the share of a call in which the device is idle, and print the longest operators."""
    is_cuda = run.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiler:
        _seconds(function, run.device, 1)
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or []
        if event.device_type.name == "CUDA" and not _is_annotation(event.name)
    ]
    span = statistics.median(
        _seconds(function, run.device, run.rounds)
    )  # without the profiler's own cost
    busy = busy_time(kernels) / 1e6
    run.add(f"{name} profile", kernels=len(kernels), busy_ms=busy * 1e3, idle=1 - busy / span)
    key = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    averages = profiler.key_averages()
    table = averages.table(sort_by=key, row_limit=30, max_name_column_width=70)
    with (run.folder / "profiles.txt").open("a") as file:
        file.write(f"== {name}\n{table}\n")
    operators = [average for average in averages if not _is_annotation(average.key)]
    total = sum(getattr(average, key) for average in operators) or 1
    for average in sorted(operators, key=lambda average: -getattr(average, key))[:14]:
        share = getattr(average, key) / total
        print(f"    {share:6.1%} {average.count:>6}x {average.key[:90]}", flush=True)
    if is_cuda:
        file_name = re.sub(r"\W+", "_", name)
        profiler.export_chrome_trace(str(run.folder / f"trace_{file_name}.json.gz"))


def _is_annotation(name: str) -> bool:
    """Return whether an event of the profiler is a range around others, as that of an optimizer."""
    return "#" in name


def _graph(run: Run, pair: Pair) -> None:
    """Replay the backbone with its pyramid as a CUDA graph, in inference on one image."""
    if run.device.type != "cuda":
        run.add(f"{pair.kind} graph", skipped="needs CUDA")
        return
    backbone = pair.backbone
    plain = backbone.forward
    for precision in ("tf32", "bf16"):
        with _precision(precision) as dtype:
            infer = pair.infer(1, dtype)["detkit"]
            infer()
            static = _input_of(backbone, infer)
            with torch.no_grad(), autocast(run.device, dtype):
                replay = graphed(plain, static)
            times = {"eager": [], "graph": []}
            for _ in range(4 * run.rounds):
                backbone.forward = plain
                times["eager"] += _seconds(infer, run.device, 1)
                backbone.forward = replay
                times["graph"] += _seconds(infer, run.device, 1)
            backbone.forward = plain
            for mode, seconds in times.items():
                name = f"{pair.kind} infer {precision} batch 1 backbone {mode}"
                run.add(name, ms=statistics.median(seconds) * 1e3)


def _input_of(module: torch.nn.Module, function: Callable[[], Any]) -> torch.Tensor:
    """Return a copy of what a module gets when the function runs."""
    seen: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    function()
    hook.remove()
    return seen[0]


def graphed(function: Callable[[torch.Tensor], Any], static: torch.Tensor) -> Callable[..., Any]:
    """Return a function that copies its input into `static` and replays what was recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(static)

    def replay(x: torch.Tensor) -> Any:
        static.copy_(x)
        graph.replay()
        return outputs

    return replay


def _compiled_infer(run: Run, pair: Pair, precision: str) -> None:
    backbone = pair.backbone
    with _precision(precision) as dtype:
        infer = pair.infer(1, dtype)["detkit"]
        _compare_compiled(run, f"faster infer {precision} batch 1", backbone, infer)


def _compiled_train(run: Run, pair: Pair) -> None:
    backbone = pair.backbone
    with _precision("bf16") as dtype:
        step = pair.train(run.train_batch, dtype)["detkit"]
        _compare_compiled(run, f"faster train bf16 batch {run.train_batch}", backbone, step)


def _compare_compiled(
    run: Run, name: str, backbone: torch.nn.Module, function: Callable[[], Any]
) -> None:
    plain = backbone.forward
    compiled_forward = torch.compile(plain, backend=run.backend, dynamic=False)
    function()
    backbone.forward = compiled_forward
    start = time.perf_counter()
    function()
    _synchronize(run.device)
    first = time.perf_counter() - start
    function()
    times: dict[str, list[float]] = {"eager": [], "compiled": []}
    for _ in range(2 * run.rounds):
        for mode, forward in (("eager", plain), ("compiled", compiled_forward)):
            backbone.forward = forward
            times[mode] += _seconds(function, run.device, 1)
    middle = {mode: statistics.median(seconds) * 1e3 for mode, seconds in times.items()}
    run.add(f"{name} backbone compiled", **{f"{k}_ms": v for k, v in middle.items()}, first_s=first)


def matrix_rate(device: torch.device, precision: str) -> float:
    """Return the operations per second of a large matrix product of random numbers."""
    dtype, float32_precision = PRECISIONS[precision]
    side = 8192 if device.type == "cuda" else 256
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(float32_precision)
    try:
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        torch.mm(a, b)
        seconds = _seconds(lambda: torch.mm(a, b), device, 5)
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * side**3 / statistics.median(seconds)


def device_waits(function: Callable[[], Any], device: torch.device) -> Counter[str]:
    """Return how often a call waits for the device, by place: as CUDA tells, else by operator."""
    if device.type != "cuda":
        # The layers' own paths for CPUs are not what a GPU runs.
        with cpu_kernels(False), Waits() as waits:
            function()
        return waits.places
    places: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message):
            path = Path(warning.filename)
            inside = path.is_relative_to(_ROOT)
            name = path.relative_to(_ROOT) if inside else Path(*path.parts[-3:])
            places[f"{name}:{warning.lineno}"] += 1
    return places


def busy_time(intervals: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of intervals.

    Example:
        >>> busy_time([(0, 2), (1, 3), (5, 6)])
        4.0
    """
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _seconds(
    function: Callable[[], Any], device: torch.device, rounds: int, at_most: float = float("inf")
) -> list[float]:
    """Return the times of calls, each from an idle device until it is idle again."""
    times: list[float] = []
    while len(times) < rounds and sum(times) < at_most:
        _synchronize(device)
        start = time.perf_counter()
        function()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _start_of_peak(device: torch.device) -> int:
    """Return the bytes that are allocated, and measure the peak from here on."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


@contextmanager
def _precision(name: str) -> Iterator[torch.dtype]:
    """Set how float32 is multiplied, and yield the type for autocast."""
    dtype, float32_precision = PRECISIONS[name]
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(float32_precision)
    torch.backends.cudnn.allow_tf32 = float32_precision != "highest"
    try:
        yield dtype
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


# --- The processes ---


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 1 where a part failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="|".join(PARTS), help="which (default: all)")
    add("--budget", type=float, default=300, metavar="SECONDS", help="(default: %(default)s)")
    add("--device", default="cuda", help="(default: %(default)s)")
    add("--tiny", action="store_true", help="small images and few rounds: tries the program out")
    add("--json", metavar="FILE", help="write all rows; profiles and traces go beside it")
    add("--alone", metavar="FOLDER", help=argparse.SUPPRESS)  # the child of a part
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Run the parts asked for, or in a child process the one part."""
    for name in args.parts:
        if name not in PARTS:
            hint = did_you_mean(name, PARTS)
            raise UnknownNameError(f"no part {name!r}.{hint} There are: {', '.join(PARTS)}")
    if args.alone:
        _run_alone(args)
        return 0
    return _run_parts(args)


def _run_alone(args: argparse.Namespace) -> None:
    device = resolve_device(args.device)
    torch.manual_seed(0)
    (name,) = args.parts
    size, batches = ((64, 96), (1,)) if args.tiny else ((800, 1333), (1, 8))
    run = Run(
        task=Task(device, size, is_tiny=args.tiny),
        train_batch=2 if args.tiny else 16,
        infer_batches=batches,
        rounds=1 if args.tiny else 3,
        seconds=0.0 if args.tiny else 3.0,
        deadline=time.monotonic() + args.budget,
        backend="eager" if args.tiny else "inductor",
        folder=Path(args.alone),
    )
    PARTS[name].measure(run)


def _run_parts(args: argparse.Namespace) -> int:
    end = time.monotonic() + args.budget
    surroundings = _surroundings(args.device)
    print(", ".join(f"{key} {value}" for key, value in surroundings.items()), flush=True)
    rows: list[dict[str, Any]] = []
    failed = False
    for name in args.parts or PARTS:
        left = end - time.monotonic()
        if left < 15:
            print(f"== {name}: skipped, {left:.0f} s left", flush=True)
            rows.append({"name": name, "skipped": "no time left"})
            continue
        seconds = left if args.tiny else min(PARTS[name].seconds, left)
        start = time.monotonic()
        of_part, error = _run_part(name, seconds, args)
        print(f"== {name}: {error or 'done'}, {time.monotonic() - start:.0f} s", flush=True)
        rows += of_part
        if error:
            failed = True
            rows.append({"name": name, "error": error})
        failed = failed or any("error" in row for row in of_part)
        if args.json:
            Path(args.json).write_text(json.dumps({**surroundings, "rows": rows}, indent=1))
    return int(failed)


def _run_part(
    name: str, seconds: float, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of a part, and how it failed."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # Its own clock ends a little earlier, so that the measurement that runs then can end.
        command = [sys.executable, __file__, name, "--alone", str(folder)]
        command += ["--device", args.device, "--budget", str(max(5.0, seconds - 15))]
        command += ["--tiny"] * args.tiny
        error = ""
        try:
            status = subprocess.run(command, timeout=seconds, check=False).returncode
            error = f"exit status {status}" if status else ""
        except subprocess.TimeoutExpired:
            error = f"not done in {seconds:.0f} s"
        lines = folder / "rows.jsonl"
        rows = (
            [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
        )
        if args.json:
            _keep_files(folder, Path(args.json).parent)
        return rows, error


def _keep_files(folder: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    profiles = folder / "profiles.txt"
    if profiles.exists():
        with (target / "profiles.txt").open("a") as file:
            file.write(profiles.read_text())
    # Traces are large: those of detkit's training steps in half precision are kept.
    for trace in folder.glob("trace_*train*detkit*.json.gz"):
        (target / trace.name).write_bytes(trace.read_bytes())


def _surroundings(device: str) -> dict[str, Any]:
    is_cuda = resolve_device(device).type == "cuda"
    return {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "device": torch.cuda.get_device_name(device) if is_cuda else device,
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
    }


if __name__ == "__main__":
    sys.exit(main())
