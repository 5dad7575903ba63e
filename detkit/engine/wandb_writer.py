"""`WandbWriter`: metrics to Weights & Biases."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detkit.checkpoint.safe_save import atomic_write
from detkit.utils.events import EventWriter, get_event_storage


class WandbWriter(EventWriter):
    """Logs scalars, and once the settings, to a run of Weights & Biases, which a resumed run goes on with.

    wandb cannot take back what it has: steps that a killed run logged behind its checkpoint are
    left out when they come again. Its server tells which these are; a run that is offline notes
    them in `OUTPUT_DIR/wandb`. After `kill -9` the files of an offline run lack the rows of the
    last seconds, which wandb 0.31 holds back (some 15 s).

    Where the run goes is said by wandb's own variables, such as WANDB_PROJECT, WANDB_MODE and
    WANDB_NAME.
    """

    def __init__(
        self, output_dir: str, settings: Mapping[str, Any] | None = None, window_size: int = 20
    ) -> None:
        """Remember what to write; the run begins with `open`.

        Args:
            output_dir: wandb's own files go to `wandb` in there; its last part names a new run.
            settings: Of the run, as plain values.
            window_size: Values in the median of scalars with a smoothing hint.
        """
        self._folder = Path(output_dir)
        self._settings = settings
        self._window_size = window_size
        self._run_id: str | None = None
        self._run: Any = None
        self._last_write = -1

    def open(self) -> None:
        self._open()

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
            config=dict(self._settings or {}),
        )
        self._run_id = self._run.id
        logged = self._noted_step() if self._run.offline else self._run.step - 1
        self._last_write = max(self._last_write, logged)
        return self._run

    def write(self) -> None:
        run = self._open()
        new = get_event_storage().new_by_iteration(self._last_write, self._window_size)
        if not new:
            return
        self._last_write = max(new)
        if run.offline:
            # Before the steps themselves: after a kill in between, they lack, which is better than
            # having them twice.
            with atomic_write(str(self._note)) as file:
                file.write(str(self._last_write).encode())
        for iteration, scalars in new.items():
            run.log(
                scalars, step=iteration, commit=True
            )  # else wandb keeps the last row back for more of its step

    def state_dict(self) -> dict[str, Any]:
        return {"run_id": self._run_id, "last_write": self._last_write}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._run_id = state_dict["run_id"]
        self._last_write = state_dict["last_write"]

    def close(self) -> None:
        if self._run is not None:
            self._run.finish(exit_code=int(sys.exc_info()[0] is not None))

    @property
    def _note(self) -> Path:
        return self._folder / "wandb" / f"{self._run_id}.last_step"

    def _noted_step(self) -> int:
        return int(self._note.read_text(encoding="utf-8")) if self._note.exists() else -1
