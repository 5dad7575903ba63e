"""Import of the user's own modules, which registers the parts in them."""

import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from detkit.utils.errors import UserError

logger = logging.getLogger(__name__)


class MissingModuleError(UserError, ModuleNotFoundError):
    """A module of IMPORTS that cannot be found."""


def import_user_modules(names: Sequence[str]) -> None:
    """Import the modules in IMPORTS; the working directory is searched first.

    This runs code of the user, which merging a YAML file does not.

    Raises:
        MissingModuleError: A module is not found.
    """
    if not names:
        return
    here = str(Path.cwd())
    if here not in sys.path:
        # Python puts the folder of a script, not the working directory, first on the path.
        sys.path.insert(0, here)
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise  # the module exists; one that it imports does not
            raise MissingModuleError(
                f"IMPORTS names {name!r}, which is not found in the working directory {here} or on"
                " the Python path. Write it as in an import statement: my_package.my_backbone."
            ) from error
        logger.info("imported %s", name)
