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
    """Import the modules that IMPORTS names; the working directory is searched first.

    This runs the user's own code. Merging a YAML file never does.

    Raises:
        MissingModuleError: A module is not found; the message says where it was searched.
    """
    if not names:
        return
    here = str(Path.cwd())
    if here not in sys.path:
        # A script in tools/ or an installed command has its own folder first on the path.
        sys.path.insert(0, here)
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise  # it is found; something that it imports is not
            raise MissingModuleError(
                f"IMPORTS names {name!r}, which is not found. Looked in the working directory"
                f" {here} and on the Python path. Write it as in an import statement:"
                " my_package.my_backbone, without .py."
            ) from error
        logger.info("imported %s", name)
