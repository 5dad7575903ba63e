"""Measure what activation checkpointing in a ResNet saves in memory, and what it costs in time."""

import sys

from detkit.cli.benchmark_checkpointing import main

if __name__ == "__main__":
    sys.exit(main())
