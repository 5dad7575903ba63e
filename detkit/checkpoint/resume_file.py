"""The checkpoint from which a run resumes: the newest one that is undamaged."""

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


def newest_whole_checkpoint(last: str, paths: Iterable[str]) -> str:
    """Return the last checkpoint or, if it is damaged, the newest undamaged one before it.

    Args:
        last: The one that the run has recorded as its last.
        paths: All checkpoints of the folder; only numbered ones are considered.

    Raises:
        CheckpointError: All are damaged.
        MissingFileError: `last` does not exist, and there is no other.
    """
    candidates = [last, *checkpoints_before(last, paths)]
    for path in candidates:
        damage = damage_of(path)
        if not damage:
            if path != last:
                logger.warning("going on from %s, the newest checkpoint before that is whole", path)
            return path
        logger.error("%s %s", path, damage)
    if len(candidates) == 1:
        load_checkpoint_file(last)  # raises the better error if it is missing
        raise CheckpointError(f"{last} {damage_of(last)}, and there is no checkpoint before it")
    raise CheckpointError(
        f"none of {len(candidates)} checkpoints is whole: {', '.join(candidates)}"
    )


def checkpoints_before(last: str, paths: Iterable[str]) -> list[str]:
    """Return the checkpoints with a number below that of `last`, newest first.

    If `last` has no number, all that have one.
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
    """Return what is wrong with a file that detkit wrote as a checkpoint, or "" if nothing is."""
    # The zip format has a checksum of each tensor, which torch does not check: a file whose end was
    # written and whose middle was not would load, as weights of zeros.
    try:
        local = Path(PathManager.get_local_path(path))
        if zipfile.is_zipfile(local):
            return _damage_of_zip(local)
        load_checkpoint_file(path)
    except FileNotFoundError:
        return "is gone"
    except CheckpointError as error:
        return str(error).removeprefix(f"{path} ")
    return ""


def _damage_of_zip(local: Path) -> str:
    try:
        with zipfile.ZipFile(local) as file:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
                return "is compressed, as no checkpoint is"
            damaged = file.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError) as error:
        return f"is damaged: {error}"
    return f"is damaged: the checksum of {damaged} is wrong" if damaged is not None else ""


def remove_half_written(folder: str, names: Sequence[str]) -> None:
    """Delete the temporary files of killed processes; those of running processes stay."""
    for name in names:
        match = _TEMPORARY.fullmatch(name)
        if match and not _is_running(int(match[1])):
            logger.info("removing %s, which was never finished", name)
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
