"""Find objects in image files, and write pictures of them; the same as `detkit predict`."""

import sys

from detkit.cli.predict import main

if __name__ == "__main__":
    sys.exit(main())
