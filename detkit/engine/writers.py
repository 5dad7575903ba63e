"""The writers of a run's metrics, by the names of the key WRITERS.

Console, `metrics.json` and TensorBoard are in `utils/events`; here are a CSV file and the services
that track experiments, Weights & Biases and MLflow.
"""

import csv
import logging
import math
import os
import re
import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from detkit.checkpoint.safe_save import atomic_write
from detkit.config import CfgNode
from detkit.engine.checkpoint_records import flat_settings
from detkit.utils.errors import ConfigError, MissingPackageError
from detkit.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    LineWriter,
    TensorboardXWriter,
    get_event_storage,
)
from detkit.utils.file_io import PathManager
from detkit.utils.text import did_you_mean, printable

logger = logging.getLogger(__name__)

# Writers whose package of the same name does not come with detkit.
_OPTIONAL_PACKAGES = frozenset({"wandb", "mlflow"})
_HEADER = ["iteration", "name", "value"]
# Parameters of one request at most, by MLflow's own limit; metrics may be more.
_BATCH = 100
_FOREIGN_CHARACTER = re.compile(r"[^\w/. -]")


class CSVWriter(LineWriter):
    """Appends a row `iteration,name,value` per new scalar.

    Not a column per scalar: new ones appear at any iteration, such as scores of an evaluation.
    """

    header = ",".join(_HEADER) + "\n"

    def write(self) -> None:
        scalars = get_event_storage().latest_with_smoothing_hint(self._window_size)
        new = sorted(
            (i, printable(name), value)
            for name, (value, i) in scalars.items()
            if i > self._last_write
        )
        csv.writer(self._open(), lineterminator="\n").writerows(new)
        self._open().flush()
        self._last_write = max([self._last_write, *(i for i, _, _ in new)])

    @staticmethod
    def iteration_of(line: str) -> float:
        try:
            cells = next(csv.reader([line]), [])
        except csv.Error:
            return math.inf
        is_whole = line.endswith("\n") and len(cells) == len(_HEADER) and cells[0].isdecimal()
        return int(cells[0]) if is_whole else math.inf


class TrackingWriter(EventWriter):
    """Base of the writers to a run of a tracking service, which a resumed run goes on with.

    The services cannot take back what they have: steps that a killed run logged behind its
    checkpoint are left out when they come again.
    """

    def __init__(
        self, output_dir: str, settings: Mapping[str, Any] | None = None, window_size: int = 20
    ) -> None:
        """Set what to write; the run begins with `open`.

        Args:
            output_dir: Its last part names a new run. wandb's own files go to `wandb` in there.
            settings: Of the run, as plain values.
            window_size: Values in the median of scalars with a smoothing hint.
        """
        self._folder = Path(output_dir)
        self._settings = dict(settings or {})
        self._window_size = window_size
        self._run_id: str | None = None
        self._last_write = -1

    def open(self) -> None:
        self._open()

    @abstractmethod
    def _open(self) -> Any:
        """Begin or continue the run where that has not been done, and return it."""

    def write(self) -> None:
        run = self._open()
        new = get_event_storage().new_by_iteration(self._last_write, self._window_size)
        if new:
            self._last_write = max(new)
            self._log(run, new)

    @abstractmethod
    def _log(self, run: Any, new: Mapping[int, Mapping[str, float]]) -> None:
        """Send scalars by iteration and name; `_last_write` is the last iteration."""

    def state_dict(self) -> dict[str, Any]:
        return {"run_id": self._run_id, "last_write": self._last_write}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._run_id = state_dict["run_id"]
        self._last_write = state_dict["last_write"]


class WandbWriter(TrackingWriter):
    """Logs scalars, and once the settings, to a run of Weights & Biases.

    The server tells which steps it has; a run that is offline notes them in `OUTPUT_DIR/wandb`.
    After `kill -9` the files of an offline run lack the rows of the last seconds, which wandb 0.31
    holds back (some 15 s). wandb's own variables choose the run: WANDB_PROJECT, WANDB_MODE,
    WANDB_NAME and so on.
    """

    _run: Any = None

    def _open(self) -> Any:
        if self._run is not None:
            return self._run
        import wandb

        (self._folder / "wandb").mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "detkit"),
            name=os.environ.get("WANDB_NAME", self._folder.resolve().name),
            id=self._run_id,
            resume="allow",
            dir=str(self._folder),
            config=self._settings,
        )
        self._run_id = self._run.id
        logged = self._run.step - 1
        if self._run.offline:
            logged = int(self._note.read_text(encoding="utf-8")) if self._note.exists() else -1
        self._last_write = max(self._last_write, logged)
        return self._run

    def _log(self, run: Any, new: Mapping[int, Mapping[str, float]]) -> None:
        if run.offline:
            # Before the steps themselves: after a kill in between they are missing, which is better
            # than having them twice.
            with atomic_write(str(self._note)) as file:
                file.write(str(self._last_write).encode())
        for iteration, scalars in new.items():
            # Without `commit` wandb keeps the last row back, for more values of its step.
            run.log(scalars, step=iteration, commit=True)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish(exit_code=int(sys.exc_info()[0] is not None))

    @property
    def _note(self) -> Path:
        return self._folder / "wandb" / f"{self._run_id}.last_step"


class MlflowWriter(TrackingWriter):
    """Logs scalars, and once the settings as parameters, to a run of MLflow.

    A server that fails during training costs rows, with a warning, not the training. MLflow's own
    variables choose the run: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, MLFLOW_RUN_NAME.
    """

    _client: Any = None

    def _open(self) -> Any:
        if self._client is not None:
            return self._client
        import mlflow
        from mlflow.entities import Param

        is_new = self._run_id is None
        name = os.environ.get("MLFLOW_RUN_NAME", self._folder.resolve().name)
        run = mlflow.start_run(run_id=self._run_id, run_name=name if is_new else None)
        self._run_id = run.info.run_id
        self._client = mlflow.MlflowClient()
        # MLflow keeps both of two values of one step: what a killed run has logged already, perhaps
        # for some of the scalars of a step, must not be sent again.
        self._logged: dict[str, int] = {}
        for scalar in run.data.metrics:
            history = self._client.get_metric_history(self._run_id, scalar)
            self._logged[scalar] = max(metric.step for metric in history)
        if is_new and self._settings:
            params = [Param(key, str(v)) for key, v in flat_settings(self._settings).items()]
            for start in range(0, len(params), _BATCH):
                self._client.log_batch(self._run_id, params=params[start : start + _BATCH])
        return self._client

    def _log(self, run: Any, new: Mapping[int, Mapping[str, float]]) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        now = int(1000 * time.time())
        metrics = []
        for step, scalars in new.items():
            for scalar, value in scalars.items():
                # In the characters that MLflow takes; names of classes may hold any.
                name = _FOREIGN_CHARACTER.sub(lambda match: f"_{ord(match[0]):x}_", scalar)
                if step > self._logged.get(name, -1):
                    metrics.append(Metric(name, value, now, step))
        try:
            for start in range(0, len(metrics), _BATCH):
                run.log_batch(self._run_id, metrics=metrics[start : start + _BATCH])
        except MlflowException as error:
            logger.warning(
                "MLflow did not take the metrics up to iteration %d: %s", self._last_write, error
            )

    def close(self) -> None:
        if self._client is not None:
            import mlflow

            mlflow.end_run("FINISHED" if sys.exc_info()[0] is None else "FAILED")


def build_writers(
    names: Sequence[str],
    output_dir: str,
    max_iter: int | None = None,
    settings: CfgNode | None = None,
    iterations_per_epoch: float | None = None,
) -> list[EventWriter]:
    """Build the writers that the names select, in their order.

    Args:
        names: Of console, json (`metrics.json`), csv (`metrics.csv`), tensorboard, wandb, mlflow.
        output_dir: Folder of the files; made if absent.
        max_iter: Iterations of the run, for the remaining time.
        settings: Those of the run, which wandb and mlflow show beside the metrics.
        iterations_per_epoch: For the epoch on the console.

    Raises:
        MissingPackageError: wandb or mlflow is named, and not installed.
        ConfigError: A name is unknown, or there twice.
    """
    # Plain dicts, lists and numbers, as the services take them.
    plain = {} if settings is None else yaml.safe_load(settings.dump())
    folder = Path(output_dir)
    known: dict[str, Callable[[], EventWriter]] = {
        "console": lambda: CommonMetricPrinter(max_iter, iterations_per_epoch=iterations_per_epoch),
        "json": lambda: JSONWriter(str(folder / "metrics.json")),
        "csv": lambda: CSVWriter(str(folder / "metrics.csv")),
        "tensorboard": lambda: TensorboardXWriter(output_dir),
        "wandb": lambda: WandbWriter(output_dir, plain),
        "mlflow": lambda: MlflowWriter(output_dir, plain),
    }
    for name in names:
        if name not in known:
            raise ConfigError(
                f"WRITERS must be of {', '.join(known)}; got"
                f" {name!r}.{did_you_mean(str(name), known)}"
            )
    if len(set(names)) < len(names):
        raise ConfigError(f"WRITERS names a writer twice: {list(names)}")
    for name in _OPTIONAL_PACKAGES.intersection(names):
        spec = find_spec(name)
        # A folder of that name, such as wandb creates, can be imported as well: as an empty
        # namespace package, without an origin.
        if spec is None or spec.origin is None:
            raise MissingPackageError(
                f"WRITERS names {name}, which is not installed: pip install {name}"
            )
    PathManager.mkdirs(output_dir)
    return [known[name]() for name in names]
