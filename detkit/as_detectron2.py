"""`import detectron2` gives detkit, for code that was written for Detectron2 and stays as it is.

Three ways, for a script, a command and a tool that cannot be edited:

```
import detkit.as_detectron2                      # above the first import of detectron2
python -m detkit.as_detectron2 train_net.py ...  # or -m package.module
DETKIT_AS_DETECTRON2=1 python train_net.py ...   # where detkit is installed
```

Each `detectron2.x.y` is the module `detkit.x.y`; `detkit.utils.detectron2_names` has the table of
modules that are called otherwise here, and what is left out.
"""

import importlib
import importlib.util
import logging
import os
import runpy
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from detkit.utils.detectron2_names import names_of

# The version of Detectron2 that the names follow, for scripts that test for it.
DETECTRON2_VERSION = "0.6"

_PROJECTS = "detectron2.projects"
# Tells the processes of `multiprocessing` which script they belong to.
_SCRIPT = "DETKIT_AS_DETECTRON2_SCRIPT"


class AliasError(ImportError):
    """A real detectron2 is in the way."""


class _Alias(MetaPathFinder, Loader):
    """Finds `detectron2.x.y` as `detkit.x.y`, the same module under a second name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "detectron2":
            return ModuleSpec(fullname, self, is_package=True)
        if fullname.partition(".")[0] == "panopticapi":
            return self._find_panopticapi(fullname)
        if not fullname.startswith("detectron2."):
            return None
        if fullname == _PROJECTS:
            spec = ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = _project_folders()
            return spec
        if fullname.startswith(_PROJECTS + "."):
            return _project_beside(fullname, path)
        own_name = "detkit" + fullname.removeprefix("detectron2")
        try:
            module = importlib.import_module(own_name)
        except ModuleNotFoundError as error:
            if error.name != own_name:
                raise
            return None
        # Modules in it that are loaded are not to be found one by one: the import system would put
        # each in the place of what its package has under its name, such as layers.roi_align.
        for name, loaded in list(sys.modules.items()):
            if name.startswith(own_name + "."):
                alias = "detectron2" + name.removeprefix("detkit")
                if sys.modules.setdefault(alias, loaded) is loaded:
                    _share_logger(alias, name)
                    _list_names(loaded)
        _share_logger(fullname, own_name)
        return ModuleSpec(
            fullname, self, loader_state=module, is_package=hasattr(module, "__path__")
        )

    def _find_panopticapi(self, fullname: str) -> ModuleSpec | None:
        """Give projects its two functions of colours and ids, where it is not installed."""
        # It is not on PyPI.
        if PathFinder.find_spec("panopticapi") is not None:
            return None
        if fullname == "panopticapi.utils":
            module = importlib.import_module("detkit.utils.colormap")
            return ModuleSpec(fullname, self, loader_state=module)
        return ModuleSpec(fullname, self, is_package=True) if fullname == "panopticapi" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module = spec.loader_state
        if module is not None:
            # The import system is about to replace it; `exec_module` puts it back.
            spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "detectron2":
            vars(module)["__version__"] = DETECTRON2_VERSION
            module.__file__ = str(Path(__file__).with_name("__init__.py"))  # scripts print it
            module.__doc__ = "detkit, under the name of Detectron2."
            return
        if module.__name__ == "panopticapi":
            return
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state
        _list_names(module)


def install() -> None:
    """Make `import detectron2` give detkit from now on; a second call does nothing.

    Raises:
        AliasError: A real detectron2 has been imported.
    """
    # By name: `python -m` loads this module a second time, as the main program.
    if any(type(finder).__name__ == _Alias.__name__ for finder in sys.meta_path):
        return
    real = sys.modules.get("detectron2")
    if real is not None:
        raise AliasError(
            f"a real detectron2 is imported already, from {getattr(real, '__file__', None)}:"
            " import detkit.as_detectron2 above it, or do without the alias"
        )
    installed = PathFinder.find_spec("detectron2")
    # A folder without __init__.py, such as one of projects, is no Detectron2.
    if installed is not None and installed.origin is not None:
        warnings.warn(
            f"detectron2 is detkit from now on; the one in {installed.origin} is not used",
            stacklevel=3,
        )
    sys.meta_path.insert(0, _Alias())
    # What users' code logs as detectron2.x is shown like detkit's own, and the level that they set
    # for Detectron2 holds here.
    _share_logger("detectron2", "detkit")


def _list_names(module: ModuleType) -> None:
    """Let `from module import *` bind Detectron2's names too."""
    own = vars(module).get("__all__") or [name for name in vars(module) if name[0] != "_"]
    names = names_of(module.__name__.removeprefix("detkit."))
    if names:
        vars(module)["__all__"] = sorted({*own, *names})


def _share_logger(name: str, own_name: str) -> None:
    """Make `logging.getLogger(name)` the logger `own_name`."""
    known, own = logging.root.manager.loggerDict, logging.getLogger(own_name)
    earlier = known.get(name)
    if isinstance(earlier, logging.Logger) and earlier is not own:
        earlier.parent = own  # somebody holds it
    known[name] = own


def _project_folders() -> list[str]:
    """Return the folders on the path that are `detectron2/projects`."""
    folders = [Path(entry or ".") / "detectron2" / "projects" for entry in sys.path]
    return [str(folder) for folder in folders if folder.is_dir()]


def _project_beside(fullname: str, path: Sequence[str] | None) -> ModuleSpec | None:
    """Find a project as Detectron2 does: installed, or as `projects/Any-Name/project` beside."""
    if (found := PathFinder.find_spec(fullname, path)) is not None:
        return found
    if fullname.count(".") > 2:
        return None
    name = fullname.rpartition(".")[2]
    for entry in sys.path:
        root = Path(entry or ".")
        # A script may lie in the checkout, in its tools, or in the folder of another project.
        places = ("projects/*", "../projects/*", "../../projects/*", "*")
        for folder in (root, *(found for place in places for found in root.glob(place))):
            if (folder / name / "__init__.py").is_file():
                return PathFinder.find_spec(fullname, [str(folder)])
    return None


def _run_script(script: str, names: dict[str, Any]) -> None:
    """Run a file in a module's names, as the main program or as what a new process repeats."""
    names["__file__"] = script
    exec(compile(Path(script).read_bytes(), script, "exec"), names)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1:] == ["-m"]:
        sys.exit("usage: python -m detkit.as_detectron2 SCRIPT|-m MODULE [ARGUMENTS ...]")
    importlib.import_module("detkit.as_detectron2")
    # For other Python processes that it starts, where detkit is installed: pytest's workers, say.
    os.environ["DETKIT_AS_DETECTRON2"] = "1"
    if sys.argv[1] == "-m":
        del sys.argv[:2]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        del sys.argv[0]
        os.environ[_SCRIPT] = str(Path(sys.argv[0]).resolve())
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
        _run_script(sys.argv[0], globals())
elif __name__ == "__mp_main__":
    importlib.import_module("detkit.as_detectron2")
    _run_script(os.environ[_SCRIPT], globals())
else:
    install()
