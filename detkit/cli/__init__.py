"""The command line: one module per command, each with a `main`."""

from detkit.cli.command import main

__all__ = ["main"]
