"""Which augmentations a config gives."""

import pytest

from detkit.config import CfgNode, get_cfg
from detkit.data import DatasetMapper, build_augmentation
from detkit.data import transforms as T
from detkit.data.transforms.build import mirrors, named_augmentations, resize_rule
from detkit.utils.errors import ConfigError


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


def test_group_of_a_project_in_the_place_of_the_setting_is_left_to_it():
    cfg = configured()
    cfg.INPUT.RESIZE = CfgNode({"ENABLED": True, "SHAPE": (640, 640)})
    assert resize_rule(cfg) == "detectron2"
    for is_train in (True, False):
        assert type(build_augmentation(cfg, is_train)[0]) is T.ResizeShortestEdge


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


LARGE_SCALE_JITTER = [
    {
        "name": "ResizeScale",
        "min_scale": 0.1,
        "max_scale": 2.0,
        "target_height": 48,
        "target_width": 64,
    },
    {"name": "FixedSizeCrop", "crop_size": [48, 64]},
    {"name": "RandomFlip"},
]


def test_unknown_flip_is_an_error():
    cfg = get_cfg()
    cfg.INPUT.RANDOM_FLIP = "sideways"
    with pytest.raises(ConfigError, match="RANDOM_FLIP must be horizontal, .* got 'sideways'"):
        build_augmentation(cfg, is_train=True)


def test_named_augmentations_replace_resize_flip_and_crop():
    cfg = configured("INPUT.AUGMENTATIONS", LARGE_SCALE_JITTER, "INPUT.CROP.ENABLED", True)
    kinds = [type(a) for a in build_augmentation(cfg, is_train=True)]
    assert kinds == [T.ResizeScale, T.FixedSizeCrop, T.RandomFlip]
    assert [type(a) for a in build_augmentation(cfg, is_train=False)] == [T.ResizeShortestEdge]
    assert [
        type(a) for a in DatasetMapper(cfg, is_train=True).augmentations.augs
    ] == kinds  # no crop


def test_nested_augmentations_with_a_probability():
    inner = [
        {"name": "ResizeShortestEdge", "short_edge_length": [400, 500], "sample_style": "choice"},
        {"name": "RandomCrop", "crop_type": "absolute_range", "crop_size": [384, 600]},
    ]
    (augmentation,) = named_augmentations([{"name": "AugmentationList", "p": 0.25, "augs": inner}])
    assert isinstance(augmentation, T.RandomApply)
    assert augmentation.prob == 0.25
    assert [type(a) for a in augmentation.aug.augs] == [T.ResizeShortestEdge, T.RandomCrop]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        pytest.param("RandomFlip", r"AUGMENTATIONS\[0\] must be a mapping", id="no mapping"),
        pytest.param(
            {"prob": 1}, r"AUGMENTATIONS\[0\] must be a mapping with a name", id="no name"
        ),
        pytest.param({"name": "RandomFlop"}, r"\[0\]: RandomFlop: .*RandomFlip", id="near miss"),
        pytest.param({"name": "RandomFlip", "x": 1}, r"\[0\]: RandomFlip: .*'x'", id="argument"),
        pytest.param({"name": "RandomFlip", "p": 2}, r"\[0\]: RandomFlip: .*probability", id="p"),
        pytest.param(
            {"name": "AugmentationList", "augs": [{"name": "Resize"}]},
            r"AUGMENTATIONS\[0\]\.augs\[0\]: Resize: .*shape",
            id="inner",
        ),
    ],
)
def test_wrong_item_is_named(item, message):
    with pytest.raises(ConfigError, match=message):
        named_augmentations([item])


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([{"name": "RandomFlip"}], True),
        ([{"name": "RandomFlip", "horizontal": False, "vertical": True}], False),
        ([{"name": "AugmentationList", "p": 0.5, "augs": [{"name": "RandomFlip"}]}], True),
        ([{"name": "Resize", "shape": 5}], False),
    ],
)
def test_mirroring_is_found_at_any_depth(items, expected):
    assert mirrors(named_augmentations(items)) is expected
