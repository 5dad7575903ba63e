"""Which augmentations a config gives."""

import pytest

from detkit.config import get_cfg
from detkit.data import build_augmentation
from detkit.data import transforms as T


def configured(*settings):
    cfg = get_cfg()
    cfg.merge_from_list(list(settings))
    return cfg


def test_training_resizes_and_flips():
    resize, flip = build_augmentation(configured("INPUT.MIN_SIZE_TRAIN", (640, 800)), is_train=True)
    assert (resize.short_edge_length, resize.max_size, resize.sample_style) == (
        (640, 800),
        1333,
        "choice",
    )
    assert (flip.horizontal, flip.vertical, flip.prob) == (True, False, 0.5)


def test_testing_only_resizes():
    (resize,) = build_augmentation(
        configured("INPUT.MIN_SIZE_TEST", 600, "INPUT.MAX_SIZE_TEST", 900), is_train=False
    )
    assert (resize.short_edge_length, resize.max_size) == ((600,), 900)


@pytest.mark.parametrize("is_train", [True, False])
def test_resize_follows_the_setting(is_train):
    assert type(build_augmentation(configured(), is_train)[0]) is T.ResizeShortestEdge
    augmentations = build_augmentation(configured("INPUT.RESIZE", "torchvision"), is_train)
    assert type(augmentations[0]) is T.TorchvisionResizeShortestEdge


@pytest.mark.parametrize(("setting", "flips"), [("none", []), ("vertical", [True])])
def test_flip_follows_the_setting(setting, flips):
    augmentations = build_augmentation(configured("INPUT.RANDOM_FLIP", setting), is_train=True)
    assert [a.vertical for a in augmentations if isinstance(a, T.RandomFlip)] == flips


def test_range_of_sizes():
    cfg = configured("INPUT.MIN_SIZE_TRAIN", (640, 800), "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range")
    assert build_augmentation(cfg, is_train=True)[0].sample_style == "range"


def test_range_between_three_sizes_is_refused():
    cfg = configured("INPUT.MIN_SIZE_TRAIN", (1, 2, 3), "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range")
    with pytest.raises(ValueError, match="draws between two lengths"):
        build_augmentation(cfg, is_train=True)
