"""Errors in what a user provides: settings, files, command lines.

The command line prints such an error as one message and exits with status 2; other exceptions are
shown with their traceback. Each class is also the built-in error of its kind, for `except
ValueError`. Code that is called with values instead of a config (structures, layers, heads) raises
the built-in errors, as the mistake is then in the calling code.
"""

import importlib
from typing import Any


class UserError(Exception):
    """Base class; the message says what was required, what was given, and where."""

    def __str__(self) -> str:
        # Not as KeyError, which shows the repr of the message, or OSError, which adds an errno.
        return str(self.args[0]) if self.args else ""


class ConfigError(UserError, ValueError):
    """An invalid setting, or an invalid combination of settings."""


class ContractError(ValueError, AssertionError):
    """A wrong call which Detectron2 answers with an AssertionError, for code that expects one."""


class WrongTypeError(TypeError, AssertionError):
    """A value of a wrong type, likewise."""


class TakenNameError(ConfigError, ContractError):
    """A data set, or a value of its metadata, that exists already with other contents."""


class UnknownNameError(UserError, KeyError):
    """An unknown name: of a config key, a part of a model, a data set."""


class DataError(UserError, ValueError):
    """An image, an annotation or a file of predictions with invalid content."""


class WeightsError(UserError, ValueError):
    """A checkpoint or a file of weights that cannot be read, or does not fit the model."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that does not exist."""


class MissingPackageError(UserError, ImportError):
    """An optional package that is needed and not installed."""


def import_package(name: str, message: str) -> Any:
    """Import an optional package, or raise a `MissingPackageError` with this message."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(message) from error
