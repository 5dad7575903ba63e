"""Train and evaluate a model as a config describes it; the same as `detkit train`."""

import sys

from detkit.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
