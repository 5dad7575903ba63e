"""The writers of a run's metrics, by the names of the key WRITERS."""

import csv
import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import yaml

from detkit.config import CfgNode
from detkit.engine.tracking_writers import MlflowWriter, WandbWriter
from detkit.utils.errors import ConfigError, UserError
from detkit.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    LineWriter,
    TensorboardXWriter,
    get_event_storage,
)
from detkit.utils.file_io import PathManager
from detkit.utils.near_miss import did_you_mean

# Writers whose package of the same name does not come with detkit.
_OPTIONAL_PACKAGES = frozenset({"wandb", "mlflow"})
_HEADER = ["iteration", "name", "value"]


class MissingPackageError(UserError, ImportError):
    """A setting needs a package that is not installed."""


class CSVWriter(LineWriter):
    """Appends a row `iteration,name,value` per new scalar.

    Not a column per scalar: new ones appear at any iteration, such as scores of an evaluation.
    """

    header = ",".join(_HEADER) + "\n"

    def __init__(self, csv_file: str, window_size: int = 20) -> None:
        """Set the file; see `LineWriter`."""
        super().__init__(csv_file, window_size)

    def write(self) -> None:
        scalars = get_event_storage().latest_with_smoothing_hint(self._window_size)
        new = sorted(
            (i, name, value) for name, (value, i) in scalars.items() if i > self._last_write
        )
        csv.writer(self._open(), lineterminator="\n").writerows(new)
        self._open().flush()
        self._last_write = max([self._last_write, *(i for i, _, _ in new)])

    @staticmethod
    def iteration_of(line: str) -> float:
        cells = next(csv.reader([line]), [])
        is_whole = line.endswith("\n") and len(cells) == len(_HEADER) and cells[0].isdigit()
        return int(cells[0]) if is_whole else math.inf


def build_writers(
    names: Sequence[str],
    output_dir: str,
    max_iter: int | None = None,
    settings: CfgNode | None = None,
) -> list[EventWriter]:
    """Build the writers that the names select, in their order.

    Args:
        names: Of console, json (`metrics.json`), csv (`metrics.csv`), tensorboard, wandb, mlflow.
        output_dir: Folder of the files; made if absent.
        max_iter: Iterations of the run, for the remaining time.
        settings: Those of the run, which wandb and mlflow show beside the metrics.

    Raises:
        MissingPackageError: wandb or mlflow is named, and not installed.
        ConfigError: A name is unknown, or there twice.
    """
    # Plain dicts, lists and numbers, as the services take them.
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
                f'WRITERS names {name}, which is not installed: pip install "detkit[{name}]", or'
                f" pip install {name}"
            )
    PathManager.mkdirs(output_dir)
    return [known[name]() for name in names]
