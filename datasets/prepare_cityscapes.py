"""Write the label maps of Cityscapes for semantic segmentation, beside those of the download.

python datasets/prepare_cityscapes.py
"""

import argparse

from detkit.data.datasets.cityscapes import write_train_ids
from detkit.utils.file_io import dataset_root


def main() -> None:
    """Convert all label maps below a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gt",
        default=str(dataset_root() / "cityscapes" / "gtFine"),
        help="folder of annotations (default: %(default)s)",
    )
    args = parser.parse_args()
    print(f"{args.gt}: {write_train_ids(args.gt)} label maps")


if __name__ == "__main__":
    main()
