"""Hold the models of all zoo configs against those that Detectron2 builds."""

import sys

from detkit.cli.check_zoo import main

if __name__ == "__main__":
    sys.exit(main())
