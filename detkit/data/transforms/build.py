"""The augmentations that a config asks for."""

from detkit.config import CfgNode
from detkit.data import transforms as T

# Values of INPUT.RESIZE.
_RESIZES: dict[str, type[T.ResizeShortestEdge]] = {
    "detectron2": T.ResizeShortestEdge,
    "torchvision": T.TorchvisionResizeShortestEdge,
}


def build_augmentation(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """Build the resize and the flip that `INPUT` describes for training, or the resize for testing.

    The random crop is not among them, as in Detectron2: `DatasetMapper.from_config` puts it first.
    """
    if not is_train:
        return [build_test_resize(cfg)]
    resize = _RESIZES[cfg.INPUT.RESIZE]
    augmentations: list[T.Augmentation] = [
        resize(
            cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
        )
    ]
    if cfg.INPUT.RANDOM_FLIP != "none":
        is_horizontal = cfg.INPUT.RANDOM_FLIP == "horizontal"
        augmentations.append(T.RandomFlip(horizontal=is_horizontal, vertical=not is_horizontal))
    return augmentations


def build_test_resize(cfg: CfgNode) -> T.ResizeShortestEdge:
    """Build the resize that `INPUT` describes for testing."""
    return _RESIZES[cfg.INPUT.RESIZE](cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "choice")


def build_crop(cfg: CfgNode) -> T.Augmentation:
    """Build the random crop that `INPUT.CROP` describes."""
    crop = cfg.INPUT.CROP
    if crop.SINGLE_CATEGORY_MAX_AREA < 1:
        return T.RandomCrop_CategoryAreaConstraint(
            crop.TYPE, crop.SIZE, crop.SINGLE_CATEGORY_MAX_AREA, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        )
    return T.RandomCropAroundInstance(crop.TYPE, crop.SIZE)
