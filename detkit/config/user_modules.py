"""Import of the user's own modules, which registers the parts in them."""

import argparse
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detkit.utils.errors import ConfigError, UserError

logger = logging.getLogger(__name__)

_FORBIDDEN = "DETKIT_NO_IMPORTS"


class MissingModuleError(UserError, ModuleNotFoundError):
    """A module of IMPORTS that cannot be found."""


def add_no_imports(parser: argparse.ArgumentParser) -> None:
    """Add the option `--no-imports`, which holds for the process and those that it starts."""

    class Forbid(argparse.Action):
        def __call__(self, *args: Any) -> None:
            os.environ[_FORBIDDEN] = "1"

    parser.add_argument(
        "--no-imports",
        action=Forbid,
        nargs=0,
        help="refuse a config that names Python modules to run (IMPORTS)",
    )


def import_user_modules(names: Sequence[str]) -> None:
    """Import the modules in IMPORTS; the working directory is searched first.

    This runs code of the user, which merging a YAML file does not. It is logged before.

    Raises:
        ConfigError: There are names, and `--no-imports` or `DETKIT_NO_IMPORTS=1` forbids imports.
        ConfigError: A name is relative or no text, or a module ends the program.
        MissingModuleError: A module is not found.
    """
    if not names:
        return
    if os.environ.get(_FORBIDDEN, "") not in ("", "0"):
        raise ConfigError(
            f"the config asks to run the modules {', '.join(map(repr, names))} (IMPORTS), which"
            f" --no-imports or {_FORBIDDEN} forbids: read them first, and allow them if you trust"
            " them, or set IMPORTS '[]' where the config needs none of them"
        )
    here = str(Path.cwd())
    if here not in sys.path:
        # Python puts the folder of a script, not the working directory, first on the path.
        sys.path.insert(0, here)
    for name in names:
        if not isinstance(name, str) or not name or name.startswith(".") or name == "__main__":
            raise ConfigError(
                f"IMPORTS must name modules as an import statement does, such as my_package.heads;"
                f" got {name!r}"
            )
        try:
            found = importlib.util.find_spec(name.partition(".")[0])
            if found is not None and name not in sys.modules:
                where = found.origin or ", ".join(found.submodule_search_locations or ())
                logger.warning("IMPORTS runs code: importing %s from %s", name, where)
            importlib.import_module(name)
        except SystemExit as error:
            raise ConfigError(
                f"the module {name!r} of IMPORTS ends the program when it is imported: put what it"
                ' runs below `if __name__ == "__main__":`, or take it out of IMPORTS'
            ) from error
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise  # the module exists; one that it imports does not
            raise MissingModuleError(
                f"IMPORTS names {name!r}, which is not found in the working directory {here} or on"
                " the Python path. Write it as in an import statement: my_package.my_backbone."
            ) from error
