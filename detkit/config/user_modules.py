"""Importing the user's own modules, so that the parts in them are registered before a config names
them.
"""

import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)


def import_user_modules(names: Sequence[str]) -> None:
    """Import the modules that IMPORTS names, looking in the working directory first.

    This runs the user's own code, which is why it is a call of its own: merging a YAML file never
    imports anything.

    Raises:
        ModuleNotFoundError: A module is not there; the message says where it was looked for.
    """
    if not names:
        return
    here = str(Path.cwd())
    if here not in sys.path:
        # A script in tools/ or an installed console command has its own folder first on the path,
        # not the user's.
        sys.path.insert(0, here)
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise  # the module is there; something that it imports is not
            raise ModuleNotFoundError(
                f"IMPORTS names {name!r}, which is not found. Looked in the working directory"
                f" {here} and on the Python path. Write it as in an import statement:"
                " my_package.my_backbone, without .py."
            ) from error
        logger.info("imported %s", name)
