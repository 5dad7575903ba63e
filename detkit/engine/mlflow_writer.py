"""`MlflowWriter`: metrics to MLflow."""

import logging
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detkit.engine.checkpoint_records import flat_settings
from detkit.utils.events import EventWriter, get_event_storage

logger = logging.getLogger(__name__)

# Parameters of one request at most, by MLflow's own limit; metrics may be more.
_BATCH = 100
_FOREIGN_CHARACTER = re.compile(r"[^\w/. -]")


class MlflowWriter(EventWriter):
    """Logs scalars, and once the settings as parameters, to a run of MLflow, which a resumed run goes on with.

    MLflow keeps both of two values of one step. So what its run has already, logged by a killed run
    behind its checkpoint, is left out when it comes again. A server that fails during training
    costs rows, with a warning, not the training.

    Where the run goes is said by MLflow's own variables, such as MLFLOW_TRACKING_URI,
    MLFLOW_EXPERIMENT_NAME and MLFLOW_RUN_NAME.
    """

    def __init__(
        self, output_dir: str, settings: Mapping[str, Any] | None = None, window_size: int = 20
    ) -> None:
        """Remember what to write; the run begins with `open`.

        Args:
            output_dir: Its last part names a new run.
            settings: Of the run, as plain values.
            window_size: Values in the median of scalars with a smoothing hint.
        """
        self._run_name = os.environ.get("MLFLOW_RUN_NAME", Path(output_dir).resolve().name)
        self._settings = settings
        self._window_size = window_size
        self._run_id: str | None = None
        self._client: Any = None
        self._logged: dict[str, int] = {}
        self._last_write = -1

    def open(self) -> None:
        self._open()

    def _open(self) -> Any:
        if self._client is not None:
            return self._client
        import mlflow

        is_new = self._run_id is None
        run = mlflow.start_run(run_id=self._run_id, run_name=self._run_name if is_new else None)
        self._run_id = run.info.run_id
        self._client = mlflow.MlflowClient()
        self._logged = {name: self._last_step(name) for name in run.data.metrics}
        if is_new:
            self._log_settings()
        return self._client

    def write(self) -> None:
        client = self._open()
        new = get_event_storage().new_by_iteration(self._last_write, self._window_size)
        if not new:
            return
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        now = int(1000 * time.time())
        named = [
            (_name(name), value, step)
            for step, scalars in new.items()
            for name, value in scalars.items()
        ]
        metrics = [
            Metric(name, value, now, step)
            for name, value, step in named
            if step > self._logged.get(name, -1)
        ]
        self._last_write = max(new)
        try:
            for start in range(0, len(metrics), _BATCH):
                client.log_batch(self._run_id, metrics=metrics[start : start + _BATCH])
        except MlflowException as error:
            logger.warning(
                "MLflow did not take the metrics up to iteration %d: %s", self._last_write, error
            )

    def state_dict(self) -> dict[str, Any]:
        return {"run_id": self._run_id, "last_write": self._last_write}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._run_id = state_dict["run_id"]
        self._last_write = state_dict["last_write"]

    def close(self) -> None:
        if self._client is not None:
            import mlflow

            mlflow.end_run("FINISHED" if sys.exc_info()[0] is None else "FAILED")

    def _last_step(self, name: str) -> int:
        return max(metric.step for metric in self._client.get_metric_history(self._run_id, name))

    def _log_settings(self) -> None:
        from mlflow.entities import Param

        settings = flat_settings(dict(self._settings)) if self._settings else {}
        params = [Param(name, str(value)) for name, value in settings.items()]
        for start in range(0, len(params), _BATCH):
            self._client.log_batch(self._run_id, params=params[start : start + _BATCH])


def _name(scalar: str) -> str:
    """Return a scalar's name in the characters that MLflow takes; class names may hold any."""
    return _FOREIGN_CHARACTER.sub(lambda match: f"_{ord(match[0]):x}_", scalar)
