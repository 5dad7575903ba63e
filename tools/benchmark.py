"""Measure detkit's speed beside what its users would use otherwise; the same as `detkit benchmark`."""

import sys

from detkit.cli.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
