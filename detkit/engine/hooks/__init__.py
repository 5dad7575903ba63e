"""What happens around the steps of training; see `HookBase` for when a hook is called."""

from detkit.engine.hooks.averaging import EMAHook, PreciseBN
from detkit.engine.hooks.checkpointing import PeriodicCheckpointer, StopOnSignal
from detkit.engine.hooks.evaluation import BestCheckpointer, EarlyStop, EvalHook
from detkit.engine.hooks.lr import LRScheduler
from detkit.engine.hooks.timing import (
    AutogradProfiler,
    IterationTimer,
    TorchMemoryStats,
    TorchProfiler,
)
from detkit.engine.hooks.visualization import VisualizationHook
from detkit.engine.hooks.writing import PeriodicWriter, SkippedImages
from detkit.engine.train_loop import CallbackHook, PeriodicHook

__all__ = [
    "AutogradProfiler",
    "BestCheckpointer",
    "CallbackHook",
    "EMAHook",
    "EarlyStop",
    "EvalHook",
    "IterationTimer",
    "LRScheduler",
    "PeriodicCheckpointer",
    "PeriodicHook",
    "PeriodicWriter",
    "PreciseBN",
    "SkippedImages",
    "StopOnSignal",
    "TorchMemoryStats",
    "TorchProfiler",
    "VisualizationHook",
]
