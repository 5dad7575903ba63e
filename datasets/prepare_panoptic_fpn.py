"""Write the label maps of stuff for Panoptic FPN, from COCO's panoptic png.

python datasets/prepare_panoptic_fpn.py
"""

import argparse

from detkit.data.datasets import separate_coco_semantic_from_panoptic
from detkit.data.datasets.builtin_meta import coco_panoptic_separated_metadata
from detkit.utils.file_io import dataset_root


def main() -> None:
    """Convert the splits that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--coco", default=str(dataset_root() / "coco"), help="folder of COCO (default: %(default)s)"
    )
    parser.add_argument(
        "--splits", nargs="+", default=["val2017", "train2017"], help="(default: %(default)s)"
    )
    args = parser.parse_args()
    to_contiguous = coco_panoptic_separated_metadata()["stuff_dataset_id_to_contiguous_id"]
    for split in args.splits:
        separate_coco_semantic_from_panoptic(
            f"{args.coco}/annotations/panoptic_{split}.json",
            f"{args.coco}/panoptic_{split}",
            f"{args.coco}/panoptic_stuff_{split}",
            to_contiguous,
        )
        print(f"wrote {args.coco}/panoptic_stuff_{split}")


if __name__ == "__main__":
    main()
