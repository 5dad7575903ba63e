"""The YAML files that one stands for: those it names in `_BASE_`, and theirs."""

from pathlib import Path
from typing import Any

from detkit.config.yaml_loader import YamlFile, load_yaml
from detkit.utils.file_io import packaged_configs

BASE_KEY = "_BASE_"
PACKAGED_PREFIX = "detkit://"
# The paths inside these lists of mappings are relative to the file that says them.
_PATH_FIELDS = {
    "DATASETS.REGISTER": (
        "images",
        "annotations",
        "root",
        "split",
        "labels",
        "segments",
        "instances",
    )
}
# Bases that name a base twice, which names another twice, ... stand for 2^n files.
_MAX_FILES = 100


def files_with_bases(cfg_filename: str) -> list[YamlFile]:
    """Return a file behind all of its bases, in the order in which they are merged, with paths in them made absolute.

    Args:
        cfg_filename: A path, `detkit://NAME` or `~/...`; see `CfgNode.merge_from_file`.

    Raises:
        FileNotFoundError: The file or one of its bases is not there.
        ValueError: One is no YAML, or bases go in a circle or are too many.
    """
    files = _with_bases(_resolve(cfg_filename, Path.cwd()), ())
    for file in files:
        _anchor_paths(file)
    return files


def _with_bases(path: Path, below: tuple[Path, ...]) -> list[YamlFile]:
    """A file after all of its bases, in the order in which they are merged."""
    if path in below:
        circle = " -> ".join(str(p) for p in (*below[below.index(path) :], path))
        raise ValueError(f"{BASE_KEY} goes in a circle: {circle}")
    if len(below) >= _MAX_FILES:
        raise ValueError(
            f"{below[0]} has more than {_MAX_FILES} files below each other as {BASE_KEY}"
        )
    try:
        file = load_yaml(path)
    except FileNotFoundError as error:
        said_in = f", named as {BASE_KEY} in {below[-1]}" if below else ""
        raise FileNotFoundError(f"{error}{said_in}") from error
    bases = file.tree.pop(BASE_KEY, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(
            f"{file.where(BASE_KEY)}: {BASE_KEY} must be a path or a list of paths, got {bases!r}"
        )
    merged: list[YamlFile] = []
    for base in bases:
        merged += _with_bases(_resolve(base, path.parent), (*below, path))
        if len(merged) >= _MAX_FILES:
            raise ValueError(
                f"{path} stands for more than {_MAX_FILES} files once {BASE_KEY} is followed"
            )
    return [*merged, file]


def _resolve(name: str, folder: Path) -> Path:
    if str(name).startswith(PACKAGED_PREFIX):
        return packaged_configs() / str(name)[len(PACKAGED_PREFIX) :]
    try:
        return (folder / Path(name).expanduser()).resolve()
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # links in a circle, no such user, a null byte
        raise FileNotFoundError(f"no config file {name!r}: {error}") from error


def _anchor_paths(file: YamlFile) -> None:
    """Make absolute the paths that exist beside the file; the others are looked for under
    `$DETKIT_DATASETS` later.
    """
    for full_key, fields in _PATH_FIELDS.items():
        entries: Any = file.tree
        for part in full_key.split("."):
            entries = entries.get(part, []) if isinstance(entries, dict) else []
        for entry in entries if isinstance(entries, list) else []:
            for name in fields:
                value = entry.get(name) if isinstance(entry, dict) else None
                if not isinstance(value, str) or (name == "split" and not value.endswith(".txt")):
                    continue  # a split is a file, or a bare name that a folder may happen to share
                beside = file.path.parent / Path(value).expanduser()
                if _exists(beside):
                    entry[name] = str(beside.resolve())


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long a name, say: whoever uses the path tells
        return False
