"""Print a table of backbones: parameters, and the time of a forward pass relative to R-50."""

import sys

from detkit.cli.benchmark_backbones import main

if __name__ == "__main__":
    sys.exit(main())
