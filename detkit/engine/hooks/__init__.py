"""What happens around the steps of training; one file per group. See `HookBase` for when a hook is
called.
"""

from detkit.engine.hooks.callback import CallbackHook
from detkit.engine.hooks.checkpointing import BestCheckpointer, PeriodicCheckpointer
from detkit.engine.hooks.early_stop import EarlyStop
from detkit.engine.hooks.ema import EMAHook
from detkit.engine.hooks.evaluation import EvalHook
from detkit.engine.hooks.lr import LRScheduler
from detkit.engine.hooks.precise_bn import PreciseBN
from detkit.engine.hooks.profiling import TorchProfiler
from detkit.engine.hooks.skipped_images import SkippedImages
from detkit.engine.hooks.stopping import StopOnSignal
from detkit.engine.hooks.timing import IterationTimer
from detkit.engine.hooks.visualization import VisualizationHook
from detkit.engine.hooks.writing import PeriodicWriter

__all__ = [
    "BestCheckpointer",
    "CallbackHook",
    "EMAHook",
    "EarlyStop",
    "EvalHook",
    "IterationTimer",
    "LRScheduler",
    "PeriodicCheckpointer",
    "PeriodicWriter",
    "PreciseBN",
    "SkippedImages",
    "StopOnSignal",
    "TorchProfiler",
    "VisualizationHook",
]
