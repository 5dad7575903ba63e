"""Selection of the checkpoint to resume from: the newest undamaged one."""

import logging
import os
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from detkit.checkpoint.safe_load import CheckpointError, load_checkpoint_file
from detkit.utils.file_io import PathManager

logger = logging.getLogger(__name__)

_NUMBERED = re.compile(r"(.+)_(\d{7,})\.pth")
_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")


def newest_whole_checkpoint(last: str, paths: Iterable[str], run: str | None = None) -> str:
    """Return the last checkpoint or, if it is damaged, the newest undamaged one before it.

    Args:
        last: The one that the run has recorded as its last; "" if the record is damaged.
        paths: All checkpoints of the folder; only numbered ones are considered.
        run: Identity of the run, which those before the last one must have; None takes any.

    Raises:
        CheckpointError: All are damaged.
        MissingFileError: `last` does not exist, and there is no other.
    """
    candidates = [*filter(None, [last]), *checkpoints_before(last, paths)]
    for path in candidates:
        damage = damage_of(path)
        if not damage and path != last and run is not None and _run_of(path) != run:
            damage = "is of another run"
        if not damage:
            if path != last:
                logger.warning("resuming from %s, the newest undamaged checkpoint before it", path)
            return path
        logger.error("%s %s", path, damage)
    if not candidates:
        raise CheckpointError(
            "last_checkpoint is damaged, and no checkpoint has a number: write the name of the file"
            " to resume from, such as model_final.pth, into it"
        )
    if len(candidates) == 1:
        load_checkpoint_file(candidates[0])  # raises MissingFileError if the file does not exist
        raise CheckpointError(
            f"{candidates[0]} {damage_of(candidates[0])}, and there is no checkpoint before it"
        )
    raise CheckpointError(
        f"all {len(candidates)} checkpoints are damaged: {', '.join(candidates)} (those of another"
        " run do not count)"
    )


def _run_of(path: str) -> str:
    """Return the identity of the run that wrote a checkpoint; "" if it has none."""
    trainer = load_checkpoint_file(path).get("trainer")
    return trainer.get("run", "") if isinstance(trainer, dict) else ""


def checkpoints_before(last: str, paths: Iterable[str]) -> list[str]:
    """Return the numbered checkpoints before `last`, newest first.

    If `last` has no number (`model_final.pth`), all of them are before it.
    """
    match = _NUMBERED.fullmatch(_name(last))
    limit = int(match[2]) if match else None
    earlier: list[tuple[int, str]] = []
    for path in paths:
        match = _NUMBERED.fullmatch(_name(path))
        if match and path != last and (limit is None or int(match[2]) < limit):
            earlier.append((int(match[2]), path))
    return [path for _, path in sorted(earlier, key=lambda pair: pair[0], reverse=True)]


def damage_of(path: str) -> str:
    """Return what is wrong with a checkpoint that detkit wrote, or "" if nothing is."""
    try:
        local = Path(PathManager.get_local_path(path))
        if not zipfile.is_zipfile(local):
            load_checkpoint_file(path)
            return ""
    except FileNotFoundError:
        return "does not exist"
    except CheckpointError as error:
        return str(error).removeprefix(f"{path} ")
    # The zip format has a checksum for each tensor, which torch does not verify: after a power cut,
    # blocks that were never written would load as zeros.
    try:
        with zipfile.ZipFile(local) as file:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
                return "is compressed, unlike checkpoints"
            damaged = file.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError) as error:
        return f"is damaged: {error}"
    return f"is damaged: the checksum of {damaged} is wrong" if damaged is not None else ""


def remove_half_written(folder: str, names: Sequence[str]) -> None:
    """Delete the temporary files of killed processes; keep those of running processes."""
    for name in names:
        match = _TEMPORARY.fullmatch(name)
        if match and not _is_running(int(match[1])):
            logger.info("removing the incomplete file %s", name)
            (Path(folder) / name).unlink(missing_ok=True)


def _is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1] if "://" in path else Path(path).name
