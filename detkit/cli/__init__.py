"""The commands: `detkit train`, `detkit predict`, `detkit benchmark`; one module each, with a
`main`.
"""

from detkit.cli.command import main

__all__ = ["main"]
