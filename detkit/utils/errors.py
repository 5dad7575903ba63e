"""Errors that a user can act on: a setting, a file, a command line.

The command line prints such an error as one message and exits with status 2; every other exception
keeps its traceback. Each class is also the built-in error of its kind, so `except ValueError` works
as everywhere in Python. Code that is called with values instead of a config (structures, layers,
heads) raises the plain built-in ones: there the mistake is the programmer's.
"""


class UserError(Exception):
    """Base of errors with a complete message: what was required, what was given, and where."""

    def __str__(self) -> str:
        # KeyError would show the repr of its argument, and OSError would look for an errno.
        return str(self.args[0]) if self.args else ""


class ConfigError(UserError, ValueError):
    """A setting, or a combination of settings, that cannot be used."""


class UnknownNameError(UserError, KeyError):
    """An unknown name: of a config key, a part of a model, a data set."""


class DataError(UserError, ValueError):
    """An image, an annotation or a file of predictions whose content cannot be used."""


class WeightsError(UserError, ValueError):
    """A checkpoint or a file of weights that cannot be read, or does not fit the model."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that does not exist."""


class MissingPackageError(UserError, ImportError):
    """An optional package that a setting or a file needs and that is not installed."""
