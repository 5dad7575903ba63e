"""The writers of a run's metrics, by the names of the key WRITERS."""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import yaml

from detkit.config import CfgNode
from detkit.engine.mlflow_writer import MlflowWriter
from detkit.engine.wandb_writer import WandbWriter
from detkit.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter, get_event_storage
from detkit.utils.file_io import PathManager
from detkit.utils.near_miss import did_you_mean

# Writers whose package of the same name does not come with detkit.
_OPTIONAL_PACKAGES = frozenset({"wandb", "mlflow"})
_HEADER = ["iteration", "name", "value"]


class CSVWriter(EventWriter):
    """Appends a row `iteration,name,value` per new scalar: they come at times of their own, columns would not hold."""

    def __init__(self, csv_file: str, window_size: int = 20) -> None:
        """Remember where to write; the file is opened at the first write, for appending.

        Args:
            csv_file: Path; its folder is made if absent.
            window_size: Values in the median of scalars with a smoothing hint.
        """
        self._path = Path(csv_file)
        self._file: TextIO | None = None
        self._window_size = window_size
        self._last_write = -1

    def write(self) -> None:
        scalars = get_event_storage().latest_with_smoothing_hint(self._window_size)
        new = sorted((i, name, value) for name, (value, i) in scalars.items() if i > self._last_write)
        csv.writer(self._open(), lineterminator="\n").writerows(new)
        self._open().flush()
        self._last_write = max([self._last_write, *(i for i, _, _ in new)])

    def state_dict(self) -> dict[str, Any]:
        return {"last_write": self._last_write}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on behind the rows of the checkpoint: those that a killed run wrote after it are dropped."""
        self._last_write = state_dict["last_write"]
        if not self._path.exists():
            return
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines[1:] if _iteration_of(line) <= self._last_write]
        if kept != lines[1:]:
            # Not in place: a second kill must not cost the rows of a run of days.
            temporary = self._path.with_name(f".{self._path.name}.tmp")
            temporary.write_text("".join([",".join(_HEADER) + "\n", *kept]), encoding="utf-8")
            temporary.replace(self._path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self) -> TextIO:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8", newline="")
            if self._path.stat().st_size == 0:
                self._file.write(",".join(_HEADER) + "\n")
        return self._file


def build_writers(
    names: Sequence[str], output_dir: str, max_iter: int | None = None, settings: CfgNode | None = None
) -> list[EventWriter]:
    """Give the writers that the names select, in their order.

    Args:
        names: Of console, json (`metrics.json`), csv (`metrics.csv`), tensorboard, wandb, mlflow.
        output_dir: Folder of the files; made if absent.
        max_iter: Iterations of the run, for the remaining time.
        settings: Those of the run, which wandb and mlflow show beside the metrics.

    Raises:
        ImportError: wandb or mlflow is named, and not installed.
        ValueError: An unknown name, or one twice.
    """
    plain = {} if settings is None else yaml.safe_load(settings.dump())
    folder = Path(output_dir)
    known: dict[str, Callable[[], EventWriter]] = {
        "console": lambda: CommonMetricPrinter(max_iter),
        "json": lambda: JSONWriter(str(folder / "metrics.json")),
        "csv": lambda: CSVWriter(str(folder / "metrics.csv")),
        "tensorboard": lambda: TensorboardXWriter(output_dir),
        "wandb": lambda: WandbWriter(output_dir, plain),
        "mlflow": lambda: MlflowWriter(output_dir, plain),
    }
    for name in names:
        if name not in known:
            raise ValueError(f"WRITERS must be of {', '.join(known)}; got {name!r}.{did_you_mean(str(name), known)}")
    if len(set(names)) < len(names):
        raise ValueError(f"WRITERS names a writer twice: {list(names)}")
    for name in _OPTIONAL_PACKAGES.intersection(names):
        spec = find_spec(name)
        # A folder of the name, as wandb itself makes them, can be imported, too: as a package of nothing.
        if spec is None or spec.origin is None:
            raise ImportError(
                f'WRITERS names {name}, which is not installed: pip install "detkit[{name}]", or pip install {name}'
            )
    PathManager.mkdirs(output_dir)
    return [known[name]() for name in names]


def _iteration_of(line: str) -> float:
    """The iteration of a row; infinity for one that a kill has torn, which is a last one."""
    cells = next(csv.reader([line]), [])
    is_whole = line.endswith("\n") and len(cells) == len(_HEADER) and cells[0].isdigit()
    return int(cells[0]) if is_whole else math.inf
