"""`python -m detkit` is the command `detkit`."""

import sys

from detkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
