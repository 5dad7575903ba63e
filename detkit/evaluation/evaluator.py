"""The loop that runs a model over a data set, and the interface of evaluators."""

import datetime
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from detkit.layers import PreparedWeights
from detkit.structures import ModelInput, ModelOutput
from detkit.utils import comm
from detkit.utils.errors import ConfigError
from detkit.utils.logger import FILE_ONLY, progress_bar
from detkit.utils.module_state import preserved_modes
from detkit.utils.sharded import gathered

logger = logging.getLogger(__name__)

# The first batches compile kernels, fill caches and start workers; they would spoil the estimate.
_NUM_WARMUP = 5
_LOG_INTERVAL_SECONDS = 5.0


class DatasetEvaluator:
    """Scores the outputs of a model on one data set.

    Called in the order `reset`, `process` per batch, `evaluate`: see `inference_on_dataset`.

    Example:
        >>> class Counter(DatasetEvaluator):
        ...     def reset(self):
        ...         self.count = 0
        ...
        ...     def process(self, inputs, outputs):
        ...         self.count += sum(len(output["instances"]) for output in outputs)
        ...
        ...     def evaluate(self):
        ...         return {"detections": {"count": self.count}}
        >>> batches = [[{"image_id": 1}], [{"image_id": 2}]]
        >>> inference_on_dataset(lambda batch: [{"instances": [0, 0]}], batches, Counter())
        {'detections': {'count': 4}}
    """

    def check_files(self) -> None:
        """Look into files that are read image by image, for their errors before a training run."""

    def reset(self) -> None:
        """Remove what was processed."""
        raise NotImplementedError

    def process(self, inputs: Sequence[ModelInput], outputs: Sequence[ModelOutput]) -> None:
        """Process one batch.

        Args:
            inputs: The inputs of the model.
            outputs: Its outputs, one per input, in the same order.
        """
        raise NotImplementedError

    def evaluate(self) -> dict[str, Any] | None:
        """Score what all processes of the run have processed. Each of them calls this.

        Returns:
            Task -> metric -> number in the main process, e.g. `{"bbox": {"AP50": 80.0}}`; empty or
            None in the others.
        """
        raise NotImplementedError


def output_of(output: ModelOutput, key: str, metric: str) -> Any:
    """Return what a metric needs from the output of a model.

    Raises:
        ConfigError: The output has no such key.
    """
    if key not in output:
        raise ConfigError(
            f"{metric} needs {key!r} in the model's outputs, got the keys {sorted(output)}"
        )
    return output[key]


class DatasetEvaluators(DatasetEvaluator):
    """Several evaluators as one."""

    def __init__(self, evaluators: Iterable[DatasetEvaluator]) -> None:
        self._evaluators = list(evaluators)

    def check_files(self) -> None:
        """Have every evaluator look into its files."""
        for evaluator in self._evaluators:
            evaluator.check_files()

    def reset(self) -> None:
        """Reset every evaluator."""
        for evaluator in self._evaluators:
            evaluator.reset()

    def process(self, inputs: Sequence[ModelInput], outputs: Sequence[ModelOutput]) -> None:
        """Pass one batch to every evaluator."""
        for evaluator in self._evaluators:
            evaluator.process(inputs, outputs)

    def evaluate(self) -> dict[str, Any]:
        """Return the results of all evaluators in one dict.

        Raises:
            ValueError: Two evaluators score the same task.
        """
        results: OrderedDict[str, Any] = OrderedDict()
        for evaluator in self._evaluators:
            for task, metrics in (evaluator.evaluate() or {}).items():
                if task in results:
                    raise ValueError(
                        f"two evaluators give results for task {task!r}, the second is"
                        f" {type(evaluator).__name__}: run them one after the other"
                    )
                results[task] = metrics
        return results


def inference_on_dataset(
    model: nn.Module | Any,
    data_loader: Iterable[Sequence[ModelInput]],
    evaluator: DatasetEvaluator | Sequence[DatasetEvaluator] | None,
) -> dict[str, Any]:
    """Run a model over a data set, and evaluate its outputs.

    In a run of several processes each of them calls this, with its own share of the data in its
    loader.

    Args:
        model: Returns one output per input of a batch. A module runs in eval mode, and its parts
            return to the modes they were in; any other callable is called as it is.
        data_loader: The batches. If it has a length, the remaining time is logged.
        evaluator: One, several, or None to run the model only (to measure its speed).

    Returns:
        The evaluator's results; empty without one and in all processes but the main one.
    """
    if not isinstance(evaluator, DatasetEvaluator):
        evaluator = DatasetEvaluators(evaluator or [])
    num_batches = len(data_loader) if isinstance(data_loader, Sized) else None
    logger.info(
        "start inference on %s batches",
        "an unknown number of" if num_batches is None else num_batches,
    )
    evaluator.reset()
    progress = _Progress(num_batches)
    # Not `inference_mode`: what a model keeps between calls, such as anchors, must still be usable
    # in training.
    with progress.bar, inference_context(model), torch.no_grad(), gathered(model):
        for inputs in data_loader:
            progress.data_ready()
            outputs = model(inputs)
            # CUDA kernels run asynchronously: without this, their time would count as the
            # evaluator's, which waits for them anyway when it copies the boxes.
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            progress.outputs_ready()
            evaluator.process(inputs, outputs)
            progress.batch_done()
    progress.log_total()
    # The main process's evaluator gathers from the others, so wait until all are done.
    comm.synchronize()
    results = evaluator.evaluate()
    return {} if results is None else results


@contextmanager
def inference_context(model: nn.Module | Any) -> Iterator[None]:
    """Run the block with a model in eval mode, and put every module back into its mode at the end.

    Within the block, layers keep what they compute from their weights
    (`detkit.layers.PreparedWeights`). Gradients are left to the caller.

    Args:
        model: A module, or any other callable, which has no modes.
    """
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(preserved_modes(model))
            model.eval()
        stack.enter_context(PreparedWeights().in_use())
        yield


class _Progress:
    """Measures and logs data, compute and evaluation time per batch, and the remaining time."""

    def __init__(self, num_batches: int | None) -> None:
        hidden = not comm.is_main_process()
        self.bar = progress_bar(total=num_batches, desc="evaluation", leave=False, disable=hidden)
        self._num_batches = num_batches
        self._done = 0
        self._measured = 0
        self._seconds = {"dataloading": 0.0, "inference": 0.0, "eval": 0.0}
        self._first_start = self._last = self._last_logged = time.perf_counter()
        self._measured_from = self._first_start

    def data_ready(self) -> None:
        if self._done == _NUM_WARMUP:
            self._measured = 0
            self._seconds = dict.fromkeys(self._seconds, 0.0)
            self._measured_from = self._last
        self._lap("dataloading")

    def outputs_ready(self) -> None:
        self._lap("inference")

    def batch_done(self) -> None:
        self._lap("eval")
        self._done += 1
        self._measured += 1
        self.bar.update()
        if self._last - self._last_logged <= _LOG_INTERVAL_SECONDS:
            return
        self._last_logged = self._last
        count, eta = f"{self._done}", ""
        if self._num_batches is not None:
            per_batch = (self._last - self._measured_from) / max(self._measured, 1)
            count = f"{self._done}/{self._num_batches}"
            eta = f" eta {_duration(per_batch * max(self._num_batches - self._done, 0))}"
        shown = None if self.bar.disable else FILE_ONLY
        logger.info("inference %s: %s%s", count, self._rates(), eta, extra=shown)

    def log_total(self) -> None:
        seconds = _duration(time.perf_counter() - self._first_start)
        done = f"inference done: {self._done} batches in {seconds} ({self._rates()})"
        without = "" if self._done <= _NUM_WARMUP else f", without the first {_NUM_WARMUP}"
        logger.info("%s%s", done, without, extra={"console": done})

    def _lap(self, stage: str) -> None:
        now = time.perf_counter()
        self._seconds[stage] += now - self._last
        self._last = now

    def _rates(self) -> str:
        count = max(self._measured, 1)
        stages = ", ".join(
            f"{stage} {seconds / count:.4f}" for stage, seconds in self._seconds.items()
        )
        return f"{stages}, total {sum(self._seconds.values()) / count:.4f} s/batch"


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
