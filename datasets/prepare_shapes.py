"""Write the generated data set "shapes", for example with more images than training generates.

python datasets/prepare_shapes.py --num-train 5000
"""

import argparse
import time

from detkit.data.datasets.shapes import generate_shapes
from detkit.utils.file_io import dataset_root


def main() -> None:
    """Generate the set that the command line describes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        help="folder to write (default: shapes, or shapes_rotated, in the folder of data sets)",
    )
    parser.add_argument(
        "--rotated", action="store_true", help="flat shapes at any angle, with rotated boxes"
    )
    parser.add_argument(
        "--num-train", type=int, default=800, help="training images (default: %(default)s)"
    )
    parser.add_argument(
        "--num-val", type=int, default=100, help="validation images (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="equal seeds give equal files (default: %(default)s)"
    )
    args = parser.parse_args()
    name = "shapes_rotated" if args.rotated else "shapes"
    start = time.perf_counter()
    try:
        folder = generate_shapes(
            args.output or dataset_root() / name,
            num_train=args.num_train,
            num_val=args.num_val,
            seed=args.seed,
            rotated=args.rotated,
        )
    except ValueError as error:
        parser.error(str(error))
    print(
        f"{folder}: {args.num_train} + {args.num_val} images, {time.perf_counter() - start:.1f} s"
    )


if __name__ == "__main__":
    main()
