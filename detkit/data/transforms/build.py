"""The augmentations that a config asks for."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from detkit.config import CfgNode
from detkit.data import transforms as T
from detkit.data.transforms.augmentation import nested
from detkit.utils.errors import ConfigError, UserError
from detkit.utils.text import did_you_mean

# Values of INPUT.RESIZE.
_RESIZES: dict[str, type[T.ResizeShortestEdge]] = {
    "detectron2": T.ResizeShortestEdge,
    "torchvision": T.TorchvisionResizeShortestEdge,
}
# Fields of an item of INPUT.AUGMENTATIONS that are not arguments of its class.
_OPTIONS = ("name", "p", "until")


def build_augmentation(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """Build the resize and the flip that `INPUT` describes for training, or the resize for testing.

    `INPUT.AUGMENTATIONS`, if there are any, take their place in training. The random crop is not
    among them, as in Detectron2: `DatasetMapper.from_config` puts it first.

    Raises:
        ConfigError: An item of `INPUT.AUGMENTATIONS` is wrong; the message names it.
        ConfigError: `INPUT.RANDOM_FLIP` is unknown.
    """
    if not is_train:
        return [build_test_resize(cfg)]
    if cfg.INPUT.AUGMENTATIONS:
        return named_augmentations(cfg.INPUT.AUGMENTATIONS)
    resize = _RESIZES[resize_rule(cfg)]
    augmentations: list[T.Augmentation] = [
        resize(
            cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
        )
    ]
    if cfg.INPUT.RANDOM_FLIP != "none":
        if cfg.INPUT.RANDOM_FLIP not in ("horizontal", "vertical"):
            raise ConfigError(
                "INPUT.RANDOM_FLIP must be horizontal, vertical or none, got"
                f" {cfg.INPUT.RANDOM_FLIP!r}"
            )
        is_horizontal = cfg.INPUT.RANDOM_FLIP == "horizontal"
        augmentations.append(T.RandomFlip(horizontal=is_horizontal, vertical=not is_horizontal))
    return augmentations


def named_augmentations(
    items: Sequence[Mapping[str, Any]], key: str = "INPUT.AUGMENTATIONS"
) -> list[T.Augmentation]:
    """Build the augmentations that a list describes.

    Args:
        items: Each has the `name` of an augmentation in `AUGMENTATION_REGISTRY`, the arguments of
            its constructor, and optionally `p`, the probability to apply it, and `until`, the share
            of the run after which it is not applied any more. `AugmentationList` has `augs`, a list
            like this one.
        key: The config key, for error messages.

    Raises:
        ConfigError: An item has no name, an unknown one, or other arguments than its class takes.

    Example:
        >>> named_augmentations([{"name": "RandomFlip", "prob": 0.3}])
        [RandomFlip(prob=0.3)]
    """
    augmentations: list[T.Augmentation] = []
    for index, item in enumerate(items):
        where = f"{key}[{index}]"
        if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
            raise ConfigError(
                f"{where} must be a mapping with a name, such as {{name: RandomFlip}}: got {item!r}"
            )
        arguments = {name: value for name, value in item.items() if name not in _OPTIONS}
        try:
            if isinstance(arguments.get("augs"), list):
                arguments["augs"] = named_augmentations(arguments["augs"], f"{where}.augs")
            kind = T.AUGMENTATION_REGISTRY.get(item["name"])
            _require_arguments(kind, arguments)
            augmentation = kind(**arguments)
            if "p" in item:
                augmentation = T.RandomApply(augmentation, item["p"])
            if "until" in item:
                augmentation = T.Until(augmentation, item["until"])
        except ConfigError:
            raise
        except (TypeError, ValueError, UserError) as error:
            raise ConfigError(f"{where}: {item['name']}: {error}") from error
        augmentations.append(augmentation)
    return augmentations


def _require_arguments(kind: Callable[..., T.Augmentation], names: Collection[str]) -> None:
    parameters = inspect.signature(kind).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in names:
        if name not in parameters:
            raise TypeError(f"it takes no argument {name!r}.{did_you_mean(name, parameters)}")


def mirrors(augmentations: Sequence[T.Augmentation | T.Transform]) -> bool:
    """Return whether one of the augmentations exchanges left and right."""
    return any(isinstance(a, T.RandomFlip) and a.horizontal for a in nested(augmentations))


def build_test_resize(cfg: CfgNode) -> T.ResizeShortestEdge:
    """Build the resize that `INPUT` describes for testing."""
    return _RESIZES[resize_rule(cfg)](cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "choice")


def resize_rule(cfg: CfgNode) -> str:
    """Return the value of `INPUT.RESIZE`: "detectron2" where a project has put a group there."""
    # As YOLOF does, for augmentations of its own.
    return "detectron2" if isinstance(cfg.INPUT.RESIZE, CfgNode) else cfg.INPUT.RESIZE


def build_crops(cfg: CfgNode) -> list[T.Augmentation]:
    """Build the random crops that `INPUT.TILES` and `INPUT.CROP` describe."""
    tiles, crops = cfg.INPUT.TILES, []
    if tiles.SIZE:
        size = (tiles.SIZE, tiles.SIZE)
        crops.append(T.RandomCropAroundInstance("absolute", size, prob_anywhere=tiles.EMPTY))
    if cfg.INPUT.CROP.ENABLED:
        crops.append(build_crop(cfg))
    return crops


def build_crop(cfg: CfgNode) -> T.Augmentation:
    """Build the random crop that `INPUT.CROP` describes."""
    crop = cfg.INPUT.CROP
    if crop.SINGLE_CATEGORY_MAX_AREA < 1:
        return T.RandomCrop_CategoryAreaConstraint(
            crop.TYPE, crop.SIZE, crop.SINGLE_CATEGORY_MAX_AREA, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        )
    return T.RandomCropAroundInstance(crop.TYPE, crop.SIZE)
