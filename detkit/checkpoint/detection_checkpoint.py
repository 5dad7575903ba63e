"""`DetectionCheckpointer`: saves and loads a model and the states of its training."""

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from detkit.checkpoint.foreign import differing_settings, fitted_to_model, translate_for
from detkit.checkpoint.key_matching import (
    LoadReport,
    check_depth,
    match_weights,
    strip_wrapper_prefixes,
    unusual_values,
)
from detkit.checkpoint.resume_file import newest_whole_checkpoint, remove_half_written
from detkit.checkpoint.run_folder import LAST_CHECKPOINT, recorded_run
from detkit.checkpoint.safe_load import CheckpointError, checked_weights, load_checkpoint_file
from detkit.checkpoint.safe_save import atomic_write, loadable_metadata, save_checkpoint_file
from detkit.checkpoint.torchvision_weights import published_file_name
from detkit.utils import comm
from detkit.utils.errors import ConfigError, UserError
from detkit.utils.file_io import PathManager, take_handlers
from detkit.utils.logger import FILE_ONLY
from detkit.utils.sharded import is_sharded, own_share, whole
from detkit.utils.text import listed

logger = logging.getLogger(__name__)

_MAX_NAME = 255


class Checkpointable(Protocol):
    """An object with a state to save beside the model: an optimizer, a scheduler, a trainer."""

    def state_dict(self) -> Any:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Restore a state."""
        ...


@runtime_checkable
class HasInitialWeights(Protocol):
    """A part of a model with published weights to start from, such as a backbone of torchvision."""

    def load_initial_weights(self) -> str:
        """Load the weights and return a description; "" if it starts from random weights."""
        ...


class IncompatibleKeys(NamedTuple):
    """What did not fit when weights were loaded, in the form of fvcore's checkpointer."""

    missing_keys: list[str]
    unexpected_keys: list[str]
    incorrect_shapes: list[tuple[str, Any, Any]]


class SharedFolderError(UserError, RuntimeError):
    """A folder that only some processes of a run can see."""


class DetectionCheckpointer:
    """Saves and loads a model and everything that a resumed run needs.

    A file contains the weights under `model`, each checkpointable under its own name, `metadata`
    such as class names, and what the caller of `save` adds (`iteration`). Loading runs no code from
    a file: see `safe_load`.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from detkit.checkpoint import DetectionCheckpointer
        >>> checkpointer = DetectionCheckpointer(nn.Linear(2, 1), tempfile.mkdtemp())
        >>> checkpointer.save("model_0000009", iteration=9)
        >>> checkpointer.resume_or_load("", resume=True)["iteration"]
        9
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        metadata: Mapping[str, Any] | None = None,
        **checkpointables: Checkpointable,
    ) -> None:
        """Set what is saved and where.

        Args:
            model: Saved without the wrappers of DistributedDataParallel and torch.compile.
            save_dir: Folder of the checkpoints; empty to only load.
            save_to_disk: Whether this process writes; None lets the main process write.
            metadata: Facts about the model to store in each file, such as `thing_classes`.
            **checkpointables: Objects with `state_dict` and `load_state_dict`, by their name in the
                file.
        """
        self.model = _unwrapped(model)
        # For subclasses written for Detectron2.
        self.logger = logger
        self.save_dir = save_dir
        self.save_to_disk = comm.is_main_process() if save_to_disk is None else save_to_disk
        self.metadata = dict(metadata or {})
        self.checkpointables: dict[str, Checkpointable] = {}
        self.load_report: LoadReport | None = None
        self._loading = ("", False)
        self._class_names: list[str] | None = None
        for key, checkpointable in checkpointables.items():
            self.add_checkpointable(key, checkpointable)

    @property
    def path_manager(self) -> Any:
        """Where users register handlers for addresses, or put a manager that has them."""
        return PathManager

    @path_manager.setter
    def path_manager(self, manager: Any) -> None:
        take_handlers(manager)

    def add_checkpointable(self, key: str, checkpointable: Checkpointable) -> None:
        """Add an object to save and load, under the name `key`.

        Raises:
            KeyError: The name is taken.
            TypeError: The object has no `state_dict`.
        """
        if key in self.checkpointables or key in ("model", "metadata"):
            raise KeyError(f"checkpoints already have an entry {key!r}")
        if not hasattr(checkpointable, "state_dict"):
            raise TypeError(f"{key}={type(checkpointable).__name__} has no state_dict() to save")
        self.checkpointables[key] = checkpointable

    def save(
        self,
        name: str,
        *,
        tag_last: bool = True,
        checkpointables: Iterable[str] | None = None,
        **extra: Any,
    ) -> None:
        """Write `save_dir/name.pth`.

        In a distributed run all processes must call it, as states may be gathered; the main process
        writes.

        Args:
            name: Name of the file, without `.pth`.
            tag_last: Record it as the checkpoint to resume from.
            checkpointables: Names of the objects to save; None saves all. With an empty list, for
                the weights alone, the main process may call it without the others.
            **extra: Further entries of the file, such as `iteration`.

        Raises:
            TypeError: A state or an extra holds an object that could not be loaded safely.
        """
        state = self.model.state_dict()
        checkpoint: dict[str, Any] = {"model": whole(state) if is_sharded(self.model) else state}
        for key in self.checkpointables if checkpointables is None else checkpointables:
            checkpoint[key] = self.checkpointables[key].state_dict()
        checkpoint.update(metadata=loadable_metadata(self.metadata), **extra)
        if not self.save_dir or not self.save_to_disk:
            return
        PathManager.mkdirs(self.save_dir)
        file_name = f"{name}.pth"
        path = _join(self.save_dir, file_name)
        logger.info("saving checkpoint to %s", path)
        save_checkpoint_file(checkpoint, path)
        if tag_last:
            self.tag_last_checkpoint(file_name)

    def load(
        self,
        path: str,
        checkpointables: Iterable[str] | None = None,
        *,
        strict: bool = False,
        averaged: bool = False,
    ) -> dict[str, Any]:
        """Load the weights, and the states of the checkpointables.

        Afterwards, `load_report` lists the tensors that matched and those that did not.

        Args:
            path: File or address; empty loads only published weights, see `load_initial_weights`.
            checkpointables: Names of the objects to load; None loads all, an empty list the weights
                alone.
            strict: Require a value for every learned tensor of the model, as evaluation does.
            averaged: Load the average of the weights that a run with MODEL_EMA.ENABLED saves.

        Returns:
            The other entries of the file (`iteration`, `metadata`, ...); empty without a path.

        Raises:
            CheckpointError: The file is damaged or unsafe.
            CheckpointError: No tensor fits the model, or not all do and `strict` is set.
            MissingFileError: The file does not exist.
            ConfigError: `strict` is set and the path is empty.
        """
        if not path:
            if strict:
                raise ConfigError(
                    "no weights given: set MODEL.WEIGHTS to a checkpoint (detkit eval: --weights)"
                )
            parts = load_initial_weights(self.model)
            logger.info(
                "no checkpoint given: the model%s starts from random weights",
                f", except {', '.join(parts)}," if parts else "",
            )
            return {}
        path, asks_for_heuristics, _ = path.partition("?matching_heuristics=True")
        checkpoint = self._load_file(path)
        if asks_for_heuristics:
            checkpoint["matching_heuristics"] = True
        weights = checkpoint_weights = checkpoint.pop("model")
        if averaged:
            ema = checkpoint.get("ema")
            weights = ema.get("weights") if isinstance(ema, dict) else None
            if not isinstance(weights, dict):
                raise CheckpointError(
                    f"{path} has no averaged weights, which MODEL_EMA.USE_FOR_PREDICTION asks for:"
                    " only a run with MODEL_EMA.ENABLED saves them"
                )
            logger.info("%s: taking the averaged weights", path)
            metadata = getattr(checkpoint_weights, "_metadata", None)
            weights = OrderedDict(checked_weights(weights, path))
            vars(weights)["_metadata"] = metadata
        # The path and whether all is needed are no arguments: see `_load_model`.
        self._loading, self._class_names = (path, strict), None
        self.load_report = None
        incompatible = self._load_model({**checkpoint, "model": weights})
        if self.load_report is None and incompatible is not None:  # a subclass's own way
            self._log_incompatible_keys(incompatible)
        checkpoint.pop("matching_heuristics", None)
        if self._class_names is not None:
            checkpoint.setdefault("metadata", {"thing_classes": self._class_names})
        for key in self.checkpointables if checkpointables is None else checkpointables:
            if key in checkpoint:
                self.checkpointables[key].load_state_dict(checkpoint.pop(key))
            else:
                logger.warning("%s has no state of %r, which starts anew", path, key)
        return checkpoint

    def _load_file(self, path: str) -> dict[str, Any]:
        # A method, as subclasses written for Detectron2 override it to read further formats.
        return load_checkpoint_file(path)

    def _load_model(self, checkpoint: dict[str, Any]) -> "IncompatibleKeys":
        """Load the weights of a checkpoint, its `model`.

        Subclasses written for Detectron2 override it, to put weights into several models, say.
        """
        by_suffix = checkpoint.get("matching_heuristics", False) is True
        self._convert_ndarray_to_tensor(checkpoint["model"])
        path, strict = self._loading
        self._class_names = self._load_weights(
            checkpoint["model"], path, strict=strict, by_suffix=by_suffix
        )
        report = self.load_report
        assert report is not None
        shapes = [(name, *pair) for name, pair in report.mismatched.items()]
        return IncompatibleKeys(list(report.missing), list(report.unexpected), shapes)

    def _convert_ndarray_to_tensor(self, state_dict: dict[str, Any]) -> None:
        """Put tensors in the place of arrays, which a `_load_file` of a subclass may read."""
        for name, value in state_dict.items():
            if isinstance(value, np.ndarray):
                state_dict[name] = torch.from_numpy(value)

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """Log the names that a `_load_model` of a subclass's own returns."""
        for kind in IncompatibleKeys._fields:
            if names := getattr(incompatible, kind):
                logger.warning("%s: %s", kind.replace("_", " "), listed(names, 10))

    def _load_weights(
        self, weights: dict[str, Any], path: str, *, strict: bool, by_suffix: bool
    ) -> list[str] | None:
        """Load the weights, and return the names of their classes if their layout has them."""
        model_state = self.model.state_dict()
        weights = _without_wrappers(weights, model_state)
        translation = translate_for(
            weights, model_state, published_file_name(path), by_suffix=by_suffix
        )
        if translation is not None:
            weights = translation.weights
        fitted, changes = fitted_to_model(weights, model_state)
        if changes:
            weights = fitted
            logger.info("%s: %s", path, "; ".join(changes))
        # Before matching, where a ResNet-50 would fill the first blocks of a ResNet-101.
        check_depth(weights, model_state, path)
        chosen, report = match_weights(weights, model_state)
        if translation is not None:
            layout, renamed = translation.layout, translation.renamed
            report = dataclasses.replace(report, layout=layout, renamed=renamed)
        self.load_report = report
        if not report.matched:
            raise _of_another_model(path, report, weights, model_state)
        # Modules may rename tensors of older versions themselves, in their `_load_from_state_dict`:
        # what is left over goes there too, and what was found shows only when it is loaded.
        if strict and not report.is_complete and not report.unexpected:
            raise _incomplete(path, report)
        left_over = {name: weights[name] for name in report.unexpected}
        state = OrderedDict(
            (name, own_share(value, model_state[name]) if name in model_state else value)
            for name, value in {**chosen, **left_over}.items()
        )
        # Versions of the modules, by which torch converts weights of older versions.
        vars(state)["_metadata"] = getattr(weights, "_metadata", None)
        kept = model_state if strict and not report.is_complete else {}
        before = {name: value.clone() for name, value in kept.items()}
        self.load_report = report = report.as_loaded(
            *self.model.load_state_dict(state, strict=False)
        )
        if strict and not report.is_complete:
            for name, value in before.items():
                model_state[name].copy_(value)
            raise _incomplete(path, report)
        _log_report(path, report, unusual_values(chosen, model_state))
        load_initial_weights(self.model, loaded=report.matched)
        if translation is None:
            return None
        for remark in translation.remarks:
            logger.info("%s: %s", path, remark)
        for difference in differing_settings(translation, self.model):
            logger.warning("%s: %s", path, difference)
        return translation.class_names

    def resume_or_load(
        self, path: str, *, resume: bool = True, strict: bool = False, averaged: bool = False
    ) -> dict[str, Any]:
        """Load the last checkpoint in `save_dir` with all states, or else the weights at `path`.

        If the last checkpoint is damaged, this is logged, and the newest undamaged one is loaded.

        Args:
            path: File or address to start from.
            resume: Look for a checkpoint in `save_dir` first.
            strict: See `load`; checkpoints in `save_dir` are always loaded strictly.
            averaged: See `load`; not for a run that continues training.

        Returns:
            See `load`.

        Raises:
            CheckpointError: All checkpoints in `save_dir` are damaged.
            SharedFolderError: Only some processes of a distributed run see a last checkpoint.
        """
        found = comm.all_gather(self.has_checkpoint()) if resume else [False]
        if len(set(found)) > 1:
            without = [rank for rank, has in enumerate(found) if not has]
            raise SharedFolderError(
                f"processes {without} see no {LAST_CHECKPOINT} in {self.save_dir}, the others do: "
                "OUTPUT_DIR must be a folder that all machines share"
            )
        if found[0]:
            return self.load(self._file_to_resume_from(), strict=True, averaged=averaged)
        return self.load(path, checkpointables=[], strict=strict, averaged=averaged)

    def _file_to_resume_from(self) -> str:
        """Return the newest undamaged checkpoint; the main process chooses it for all."""
        found = ("", "")
        if comm.is_main_process():
            if self.save_to_disk and "://" not in self.save_dir:
                remove_half_written(self.save_dir, PathManager.ls(self.save_dir))
            last, every = self.get_checkpoint_file(), self.get_all_checkpoint_files()
            try:
                run = recorded_run(self.save_dir)
                found = (newest_whole_checkpoint(last, every, run), "")
            except CheckpointError as error:
                found = ("", str(error))
        # Errors are gathered too: otherwise the other processes would wait for ever.
        path, problem = comm.all_gather(found)[0]
        if problem:
            raise CheckpointError(problem)
        return path

    def has_checkpoint(self) -> bool:
        """Return whether a last checkpoint is recorded in `save_dir`."""
        return bool(self.save_dir) and PathManager.exists(_join(self.save_dir, LAST_CHECKPOINT))

    def get_checkpoint_file(self) -> str:
        """Return the path of the last checkpoint, or "" if there is none, or its record damaged."""
        if not self.has_checkpoint():
            return ""
        path = _join(self.save_dir, LAST_CHECKPOINT)
        with PathManager.open(path, "rb") as file:
            name = cast(bytes, file.read()).decode("utf-8-sig", errors="replace").strip()
        # A power cut may leave it empty, or zeros in it.
        if not name or not name.isprintable() or len(name) > _MAX_NAME:
            logger.error("%s names no file: %r", path, name[:_MAX_NAME])
            return ""
        return _join(self.save_dir, name)

    def get_all_checkpoint_files(self) -> list[str]:
        """Return the paths of all checkpoints in `save_dir`, sorted by name."""
        if not self.save_dir or not PathManager.isdir(self.save_dir):
            return []
        names = sorted(name for name in PathManager.ls(self.save_dir) if name.endswith(".pth"))
        return [_join(self.save_dir, name) for name in names if not name.startswith(".")]

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Record a file of `save_dir` as the one to resume from."""
        path = _join(self.save_dir, LAST_CHECKPOINT)
        with atomic_write(path) as file:
            file.write(last_filename_basename.encode())


def _of_another_model(
    path: str, report: LoadReport, weights: Mapping[str, Any], model_state: Mapping[str, Any]
) -> CheckpointError:
    if report.mismatched:
        reason = f"no tensor has the model's shape. {report.summary()}"
    else:
        layout = f" It has the layout of {report.layout}." if report.layout else ""
        reason = (
            f"none of its {len(weights)} names is in the model.{layout} In the file:"
            f" {listed(list(weights), 3)}. In the model: {listed(list(model_state), 3)}."
        )
    return CheckpointError(f"{path} holds weights of another model: {reason}")


def _log_report(path: str, report: LoadReport, odd: Sequence[str]) -> None:
    """Log what was loaded, and the tensors with unusual values."""
    if odd:
        more = f", and {len(odd) - 4} more tensors" if len(odd) > 4 else ""
        logger.warning(
            "%s holds values that no trained model has: %s%s. Export or train it again.",
            path,
            "; ".join(odd[:4]),
            more,
        )
    level = logging.INFO if report.is_complete else logging.WARNING
    logger.log(level, "%s: %s", path, report.summary())
    if not report.is_complete or report.unexpected:
        logger.info("tensors of %s:\n%s", path, report.details(), extra=FILE_ONLY)


def _incomplete(path: str, report: LoadReport) -> CheckpointError:
    return CheckpointError(
        f"{path} does not fill the model: {report.summary()}. Use the config of the"
        " checkpoint; `detkit eval` and `predict` take it with --allow-partial."
    )


def _without_wrappers(weights: dict[str, Any], model_state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights without the prefixes of DistributedDataParallel and torch.compile."""
    renamed = strip_wrapper_prefixes(weights, model_state)
    result = OrderedDict((renamed[name], value) for name, value in weights.items())
    metadata = getattr(weights, "_metadata", None)
    # Its keys are names of modules, which no longer match if a prefix was removed.
    if metadata is not None and list(renamed) == list(renamed.values()):
        vars(result)["_metadata"] = metadata
    return result


def align_and_update_state_dicts(
    model_state_dict: Mapping[str, Any],
    ckpt_state_dict: dict[str, Any],
    c2_conversion: bool = True,
) -> dict[str, Any]:
    """Return the tensors of a checkpoint that fit a model, under the model's names.

    Names match where one is the end of the other; the longest such end decides.

    Args:
        model_state_dict: Name -> tensor of the model.
        ckpt_state_dict: Name -> tensor of the checkpoint. Not changed.
        c2_conversion: Not used: Caffe2's names are recognised.
    """
    weights = _without_wrappers(ckpt_state_dict, model_state_dict)
    translation = translate_for(weights, model_state_dict, by_suffix=True)
    return match_weights(translation.weights if translation else weights, model_state_dict)[0]


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def _join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if "://" in folder else str(Path(folder) / name)


def load_initial_weights(model: nn.Module, loaded: Collection[str] = ()) -> list[str]:
    """Load the published weights of each part that a checkpoint has not filled.

    Called when weights are loaded, not when a model is built: resuming, evaluating and predicting
    from a checkpoint download nothing.

    Args:
        model: Changed in place.
        loaded: Names of the tensors that a checkpoint has filled.

    Returns:
        The names of the parts that have loaded weights.
    """
    parts = []
    for name, module in model.named_modules():
        if not isinstance(module, HasInitialWeights):
            continue
        prefix = f"{name}." if name else ""  # a backbone may be the whole model
        if any(tensor.startswith(prefix) for tensor in loaded):
            continue
        source = module.load_initial_weights()
        if source:
            logger.info("%s starts from %s", name or "the model", source)
            parts.append(name)
    return parts
