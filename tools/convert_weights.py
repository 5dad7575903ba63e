"""Bring weights of others under detkit's names; the same as `detkit convert-weights`."""

import sys

from detkit.cli.convert_weights import main

if __name__ == "__main__":
    sys.exit(main())
