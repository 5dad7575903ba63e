"""Every augmentation by name, on drawn shapes: all that is annotated moves with the pixels."""

import itertools
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import detkit.modeling  # noqa: F401  (its models declare the keys of their classes)
from detkit.config import get_cfg
from detkit.data import DatasetMapper, MetadataCatalog, build_detection_train_loader
from detkit.data import transforms as T
from detkit.data.catalog import DatasetCatalog
from detkit.data.transforms.build import named_augmentations
from detkit.structures import BoxMode
from detkit.structures.mask_formats import bitmask_to_rle
from detkit.utils.errors import ConfigError

# Arguments with which white shapes on black stay brighter than `BRIGHT`, what comes in from outside
# does not, and left stays left where nothing is mirrored.
ARGUMENTS = {
    "AugmentationList": {"augs": [{"name": "RandomFlip"}, {"name": "Resize", "shape": [71, 93]}]},
    "RandomContrast": {"intensity_min": 0.9, "intensity_max": 1.1},
    "RandomBrightness": {"intensity_min": 0.9, "intensity_max": 1.1},
    "RandomSaturation": {"intensity_min": 0.5, "intensity_max": 1.5},
    "RandomLighting": {"scale": 5.0},
    "ColorJitter": {"brightness": 0.1, "contrast": 0.1, "saturation": 0.5, "hue": 0.2},
    "RandomGrayscale": {},
    "JPEG": {"quality": [70, 95]},
    "GaussianBlur": {"sigma": [0.1, 1.0]},
    "GaussianNoise": {"std": [0, 12]},
    "RandomErasing": {"scale": [0, 0.0002]},
    "RandomCrop": {"crop_type": "relative_range", "crop_size": [0.6, 0.6]},
    "RandomCropAroundInstance": {"crop_type": "absolute", "crop_size": [51, 67]},
    "RandomCrop_CategoryAreaConstraint": {
        "crop_type": "relative",
        "crop_size": [0.7, 0.8],
        "single_category_max_area": 0.8,
    },
    "FixedSizeCrop": {"crop_size": [80, 150]},
    "MinIoURandomCrop": {},
    "RandomFlip": {"prob": 1.0},
    "Resize": {"shape": [71, 150]},
    "RandomResize": {"shape_list": [[71, 150], [51, 53]]},
    "ResizeShortestEdge": {"short_edge_length": [51, 151]},
    "ResizeScale": {"min_scale": 0.5, "max_scale": 2, "target_height": 90, "target_width": 90},
    "TorchvisionResizeShortestEdge": {"short_edge_length": [91, 151]},
    "RandomRotation": {"angle": [-30, 30]},
    "RandomExtent": {"scale_range": [0.7, 1.3], "shift_range": [0.3, 0.3]},
    "RandomAffine": {"degrees": 25, "translate": [0.2, 0.2], "scale": [0.7, 1.4], "shear": 10},
    "RandomPerspective": {"distortion_scale": 0.5},
    "Mosaic": {"size": [83, 101]},
    "MixUp": {"alpha": 1.5},
    "CopyPaste": {"share": 0.7},
}
BRIGHT = 185
PAIRS = ("top left", "top right", "bottom left", "bottom right")


def shape_record(folder, name, height, width, seed):
    """Write a picture of two white rectangles that do not touch; the corners are keypoints."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width), np.uint8)
    annotations = []
    for k in range(2):  # one in the left half, one in the right half
        x0 = int(rng.integers(3, width // 6)) + k * width // 2
        y0 = int(rng.integers(3, height // 3))
        x1, y1 = x0 + int(rng.integers(15, width // 4)), y0 + int(rng.integers(15, height // 2))
        pixels[y0:y1, x0:x1] = 255
        mask = np.zeros((height, width), bool)
        mask[y0:y1, x0:x1] = True
        polygon = [x0, y0, x1, y0, x1, y1, x0, y1]
        annotations.append(
            {
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": k,
                "segmentation": bitmask_to_rle(mask) if k else [polygon],
                "keypoints": [x0, y0, 2, x1, y0, 2, x0, y1, 2, x1, y1, 2],
            }
        )
    path, labels = folder / f"{name}.png", folder / f"{name}_labels.png"
    Image.fromarray(np.stack([pixels] * 3, axis=-1)).save(path)
    Image.fromarray((pixels > 0).astype(np.uint8)).save(labels)
    size = {"height": height, "width": width}
    files = {"file_name": str(path), "sem_seg_file_name": str(labels)}
    return {**files, **size, "image_id": seed, "annotations": annotations}


@pytest.fixture
def records(tmp_path):
    sizes = [(97, 131), (121, 85), (75, 149)]
    return [shape_record(tmp_path, f"{k}", *size, seed=k) for k, size in enumerate(sizes)]


def mapper_of(items, records, **arguments):
    settings = {
        "augmentations": named_augmentations(items),
        "use_instance_mask": True,
        "instance_mask_format": "bitmask",
        "use_keypoint": True,
        "keypoint_hflip_indices": [1, 0, 3, 2],
    }
    mapper = DatasetMapper(is_train=True, **settings | arguments)
    mapper.partners = records
    return mapper


def grown(mask, pixels=1):
    for _ in range(pixels):
        padded = np.pad(mask, 1)
        shifts = itertools.product(range(3), repeat=2)
        height, width = mask.shape
        mask = np.any([padded[y : y + height, x : x + width] for y, x in shifts], axis=0)
    return mask


def hull(mask):
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])


def assert_same_within_a_rim(mask, expected):
    assert not (mask & ~grown(expected)).any()
    assert not (expected & ~grown(mask)).any()


def check(sample, *, has_overlap=False):
    pixels = sample["image"].float().mean(dim=0).numpy() > BRIGHT
    instances = sample["instances"]
    masks = instances.gt_masks.tensor.numpy()
    shown = masks.any(axis=0) if len(masks) else np.zeros_like(pixels)
    assert_same_within_a_rim(shown, pixels)
    if "sem_seg" in sample:
        assert_same_within_a_rim(sample["sem_seg"].numpy() == 1, pixels)
    height, width = pixels.shape
    boxes, keypoints = instances.gt_boxes.tensor.numpy(), instances.gt_keypoints.tensor.numpy()
    for mask, box, points in zip(masks, boxes, keypoints, strict=True):
        found = hull(mask)
        if found.min() < 2 or found[2] > width - 2 or found[3] > height - 2 or has_overlap:
            continue  # cut: the hull of the visible part is smaller
        assert np.abs(box - found).max() <= 1.01
        assert (points[:, 2] == 2).all()
        assert np.abs(np.append(points[:, :2].min(0), points[:, :2].max(0)) - found).max() <= 1.01
        near = grown(mask, 2)
        assert all(near[int(min(y, height - 1)), int(min(x, width - 1))] for x, y, _ in points)
        # Left stays left and top stays top, also in the mirror.
        assert points[0, 0] < points[1, 0]
        assert points[2, 0] < points[3, 0]
    return len(masks)


def test_all_augmentations_of_the_package_are_tested():
    known = {name for name, kind in T.AUGMENTATION_REGISTRY if kind.__module__[:7] == "detkit."}
    assert known == ARGUMENTS.keys() | {"Albumentations"}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_boxes_masks_and_keypoints_lie_on_what_they_mark(records, name):
    if name == "MixUp":  # two different images would be half bright
        records = records[:1]
        del records[0]["sem_seg_file_name"]
    mapper = mapper_of([{"name": name, **ARGUMENTS[name]}], records)
    num_objects = 0
    for seed in range(9):
        np.random.seed(seed)
        sample = mapper(records[seed % len(records)])
        num_objects += check(sample, has_overlap=name == "CopyPaste")
    assert num_objects > 8


@pytest.mark.parametrize("name", ARGUMENTS)
def test_probability_zero_is_the_identity(records, name):
    del records[0]["sem_seg_file_name"]
    plain = mapper_of([], records)(records[0])
    sample = mapper_of([{"name": name, **ARGUMENTS[name], "p": 0}], records)(records[0])
    assert torch.equal(sample["image"], plain["image"])
    for field, value in plain["instances"].get_fields().items():
        found = sample["instances"].get(field)
        assert torch.equal(getattr(found, "tensor", found), getattr(value, "tensor", value))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_images_without_objects(records, name):
    for record in records:
        record["annotations"] = []
        if name == "MixUp":
            del record["sem_seg_file_name"]
    np.random.seed(0)
    instances = mapper_of([{"name": name, **ARGUMENTS[name]}], records)(records[0])["instances"]
    assert len(instances) == len(instances.gt_masks) == len(instances.gt_keypoints.tensor) == 0


@pytest.mark.parametrize(
    "transforms",
    [
        [{"name": "HorizontalFlip", "p": 1.0}],
        [
            {"name": "VerticalFlip", "p": 1.0},
            {"name": "PadIfNeeded", "min_height": 151, "min_width": 163},
        ],
        [{"name": "Affine", "rotate": [-20, 20], "scale": [0.8, 1.2], "p": 1.0}],
        [{"name": "RandomBrightnessContrast", "brightness_limit": 0.1, "contrast_limit": 0.1}],
    ],
)
def test_albumentations_move_everything(records, transforms):
    pytest.importorskip("albumentations")
    mapper = mapper_of([{"name": "Albumentations", "transforms": transforms}], records)
    is_vertical = transforms[0]["name"] == "VerticalFlip"
    for seed in range(6):
        np.random.seed(seed)
        sample = mapper(records[seed % 3])
        np.random.seed(seed)
        assert torch.equal(sample["image"], mapper(records[seed % 3])["image"])
        assert check(sample) == 2
        if is_vertical:
            points = sample["instances"].gt_keypoints.tensor
            assert (points[:, 0, 1] > points[:, 2, 1]).all()
    for record in records:
        record["annotations"] = []
    assert len(mapper(records[0])["instances"]) == 0


@pytest.mark.parametrize("item", [{"name": "Clahe"}, {"name": "CLAHE", "limit": 3}, {"p": 1.0}])
def test_wrong_item_of_albumentations_is_named(item):
    pytest.importorskip("albumentations")
    with pytest.raises(ConfigError, match=r"INPUT\.AUGMENTATIONS\[0\]: Albumentations: "):
        named_augmentations([{"name": "Albumentations", "transforms": [item]}])


def test_missing_albumentations_are_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "albumentations", None)
    with pytest.raises(ConfigError, match="needs the package albumentations"):
        named_augmentations([{"name": "Albumentations", "transforms": []}])


def test_mosaic_shows_four_images_around_a_point(records):
    np.random.seed(3)
    sample = mapper_of([{"name": "Mosaic", "size": [150, 150]}], records)(records[0])
    assert sample["image"].shape == (3, 300, 300)
    assert (sample["height"], sample["width"]) == (300, 300)
    assert len(sample["instances"]) > 4


@pytest.mark.parametrize("height", [4, 2], ids=["fills its quarter", "is lower"])
def test_images_of_a_mosaic_touch_a_point_from_half_a_quarter_to_one_and_a_half(tmp_path, height):
    pixels = np.arange(height * 6, dtype=np.uint8).reshape(height, 6)
    Image.fromarray(np.stack([pixels] * 3, axis=-1)).save(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.png"), "annotations": []}
    mapper = mapper_of([{"name": "Mosaic", "size": [4, 6], "fill": 255}], [record])
    np.random.seed(0)
    points = set()
    for _ in range(300):
        canvas = mapper(record)["image"][0].numpy()
        around = [canvas[:-1, :-1], canvas[:-1, 1:], canvas[1:, :-1], canvas[1:, 1:]]
        corners = (pixels[-1, -1], pixels[-1, 0], pixels[0, -1], pixels[0, 0])
        meets = np.all([a == c for a, c in zip(around, corners, strict=True)], axis=0)
        ((y, x),) = np.argwhere(meets) + 1
        points.add((int(y), int(x)))
    assert points == set(itertools.product(range(2, 7), range(3, 10)))


def test_rotated_boxes_stay_rotated_in_a_mosaic(records):
    for record in records:
        del record["sem_seg_file_name"]
        record["annotations"] = record["annotations"][:1]
    box = [60.0, 40.0, 30.0, 10.0, 25.0]
    records[0]["annotations"][0] |= {"bbox": box, "bbox_mode": BoxMode.XYWHA_ABS}
    parts = {"use_instance_mask": False, "use_keypoint": False, "use_rotated_boxes": True}
    items = [{"name": "RandomFlip", "prob": 1.0}, {"name": "Mosaic", "size": [97, 131]}]
    np.random.seed(1)
    sample = mapper_of(items, records[:1], **parts)(records[0])
    boxes = sample["instances"].gt_boxes.tensor
    assert len(boxes) == 4
    # Mirrored, not scaled, at the four places of the mirrored center.
    assert torch.allclose(boxes[:, 2:], torch.tensor([30.0, 10.0, -25.0]).expand(4, 3), atol=1e-4)
    assert (boxes[1] - boxes[0]).tolist() == [131, 0, 0, 0, 0]
    assert (boxes[2] - boxes[0]).tolist() == [0, 97, 0, 0, 0]


def test_partners_go_through_what_stands_before(records):
    items = [{"name": "Resize", "shape": [60, 60]}, {"name": "MixUp"}]
    for record in records:
        del record["sem_seg_file_name"]
    items = [{"name": "RandomGrayscale"}, *items]
    np.random.seed(0)
    sample = mapper_of(items, records)(records[0])
    # Both have the size of the frame: nothing is padded, and the boxes of both reach far right.
    assert len(sample["instances"]) == 4
    assert (sample["instances"].gt_boxes.tensor[1::2, 0] > 30).all()


def test_pasted_objects_hide_what_is_below(records):
    records = records[:1]
    mapper = mapper_of([{"name": "CopyPaste", "share": 1.0}], records)
    # The same image is pasted: all is hidden, and gone.
    assert len(mapper(records[0])["instances"]) == 2
    shifted = {**records[0], "annotations": [dict(records[0]["annotations"][0])]}
    x0, y0, width, height = shifted["annotations"][0]["bbox"]
    half = x0 + width // 2
    shifted["annotations"][0]["segmentation"] = [
        [x0, y0, half, y0, half, y0 + height, x0, y0 + height]
    ]
    mapper.partners = [shifted]
    instances = mapper(records[0])["instances"]
    masks = instances.gt_masks.tensor
    assert len(instances) == 3
    assert not (masks[0] & masks[2]).any()
    assert instances.gt_boxes.tensor[0].tolist() == [half, y0, x0 + width, y0 + height]
    assert instances.gt_keypoints.tensor[0, :2, 2].tolist() == [1, 2]  # top left, top right


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_until_ends_an_augmentation_at_its_share_of_the_run(records, share):
    DatasetCatalog.register("shapes", lambda: records)
    items = [{"name": "Mosaic", "size": [40, 40], "until": share}, {"name": "RandomFlip"}]
    cfg = mixing_config(items, MAX_ITER=8)
    batches = list(itertools.islice(build_detection_train_loader(cfg), 8))
    is_mosaic = [[s["image"].shape == (3, 80, 80) for s in batch] for batch in batches]
    assert is_mosaic == [[True] * 2] * int(8 * share) + [[False] * 2] * int(8 * (1 - share))


def mixing_config(items, workers=0, **solver):
    MetadataCatalog.get("shapes").set(
        thing_classes=["a", "b"],
        keypoint_names=list(PAIRS),
        keypoint_flip_map=[PAIRS[:2], PAIRS[2:]],
    )
    cfg = get_cfg()
    settings = {
        "DATASETS.TRAIN": ("shapes",),
        "MODEL.ROI_HEADS.NUM_CLASSES": 2,
        "MODEL.MASK_ON": True,
        "MODEL.KEYPOINT_ON": True,
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 4,
        "INPUT.AUGMENTATIONS": items,
        "INPUT.MASK_FORMAT": "bitmask",
        "SOLVER.IMS_PER_BATCH": 2,
        "DATALOADER.NUM_WORKERS": workers,
        "DATALOADER.ASPECT_RATIO_GROUPING": False,
        "SEED": 5,
        **{f"SOLVER.{key}": value for key, value in solver.items()},
    }
    cfg.merge_from_list([item for pair in settings.items() for item in pair])
    return cfg


def test_resumed_run_sees_the_same_pixels_with_all_of_them(records):
    for record in records:
        del record["sem_seg_file_name"]
    DatasetCatalog.register("shapes", lambda: records)
    items = [
        {"name": name, "p": 0.5, "until": 0.9, **ARGUMENTS[name]}
        for name in ARGUMENTS
        # The first makes floats; the second needs label maps.
        if name not in ("TorchvisionResizeShortestEdge", "RandomCrop_CategoryAreaConstraint")
    ]
    # Small windows of small windows of ... : those that only cut come with a low probability.
    items = [{**item, "p": 0.1} if "Crop" in item["name"] else item for item in items]

    def loader(workers):
        return build_detection_train_loader(mixing_config(items, workers, MAX_ITER=10))

    whole = loader(0)
    expected = list(itertools.islice(whole, 6))
    first = loader(2)
    for _ in itertools.islice(first, 3):
        pass
    second = loader(2)
    second.load_state_dict(first.state_dict())
    for batch, other in zip(itertools.islice(second, 3), expected[3:], strict=True):
        for sample, same in zip(batch, other, strict=True):
            assert torch.equal(sample["image"], same["image"])
            for field, value in sample["instances"].get_fields().items():
                found = same["instances"].get(field)
                assert torch.equal(getattr(found, "tensor", found), getattr(value, "tensor", value))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"name": "Mosaic", "size": [0, 4]}, "size must be"),
        ({"name": "MixUp", "alpha": 0}, "alpha must be"),
        ({"name": "CopyPaste", "share": 2}, "probability"),
        ({"name": "ColorJitter", "brightness": -1}, "brightness must be a range"),
        ({"name": "ColorJitter", "hue": [0.6, 0.7]}, "hue must be a range"),
        ({"name": "ColorJitter", "hue": "red"}, "could not convert"),
        ({"name": "RandomGrayscale", "channels": 3}, "takes no argument 'channels'"),
        ({"name": "ColorJitter", "brigthness": 1}, "Did you mean 'brightness'"),
        ({"name": "JPEG", "quality": 0}, "quality must be a range"),
        ({"name": "GaussianBlur", "sigma": -1}, "sigma must be a range"),
        ({"name": "GaussianNoise", "std": [3, 2]}, "std must be a range"),
        ({"name": "RandomErasing", "scale": [0, 2]}, "scale must be a range"),
        ({"name": "RandomErasing", "num": 0}, "num be at least 1"),
        ({"name": "RandomAffine", "translate": [2, 0]}, "translate must be"),
        ({"name": "RandomAffine", "scale": [0, 1]}, "scale must be a range"),
        ({"name": "RandomAffine", "shear": 90.5}, "shear must be a range"),
        ({"name": "RandomAffine", "degrees": [10, -10]}, "degrees must be a range"),
        ({"name": "RandomPerspective", "distortion_scale": 1}, "distortion_scale must lie"),
        ({"name": "RandomFlip", "until": 0}, "until must be a share"),
        ({"name": "RandomFlip", "until": "9ep"}, "until must be a share"),
    ],
)
def test_bad_argument_is_named(item, message):
    with pytest.raises(
        ConfigError, match=rf"INPUT\.AUGMENTATIONS\[0\]: {item['name']}: .*{message}"
    ):
        named_augmentations([item])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.MASK_ON", False, r"INPUT.AUGMENTATIONS\[0\]: CopyPaste needs masks"),
        ("MODEL.LOAD_PROPOSALS", True, r"INPUT.AUGMENTATIONS\[0\]: .*no proposals"),
    ],
)
def test_model_that_it_does_not_fit_is_refused(key, value, message):
    cfg = mixing_config([{"name": "AugmentationList", "augs": [{"name": "CopyPaste"}]}])
    cfg.merge_from_list([key, value])
    with pytest.raises(ConfigError, match=message):
        DatasetMapper(cfg, is_train=True)


def test_mixing_without_data_is_explained(records):
    with pytest.raises(ConfigError, match="MixUp draws other images"):
        mapper_of([{"name": "MixUp"}], None)(
            {k: v for k, v in records[0].items() if k != "sem_seg_file_name"}
        )


@pytest.mark.parametrize("name", ["ColorJitter", "RandomGrayscale", "JPEG"])
def test_images_that_a_change_of_color_does_not_understand_are_refused(name):
    (augmentation,) = named_augmentations([{"name": name}])
    with pytest.raises(ValueError, match=f"{name} needs bytes"):
        augmentation(T.AugInput(np.zeros((9, 7, 4), np.uint8)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("name", ["GaussianBlur", "GaussianNoise", "RandomErasing", "RandomAffine"])
def test_any_number_of_channels_and_any_depth(name, dtype):
    (augmentation,) = named_augmentations([{"name": name}])
    image = np.full((19, 23, 5), 255 if dtype == np.uint8 else 65_535, dtype)
    sample = T.AugInput(image)
    np.random.seed(1)
    augmentation(sample)
    assert (sample.image.dtype, sample.image.shape) == (dtype, image.shape)
    # Nothing wraps around at the limit of the type.
    assert np.median(np.abs(sample.image.astype(float) - image)) <= 12


def test_channel_order_is_regarded():
    red = np.zeros((5, 7, 3), np.uint8)
    red[:, :, 0] = 255
    gray = []
    for image, image_format in ((red, "RGB"), (red[:, :, ::-1], "BGR")):
        sample = T.AugInput(image)
        sample.image_format = image_format
        named_augmentations([{"name": "RandomGrayscale"}])[0](sample)
        gray.append(sample.image[0, 0].tolist())
    assert gray == [[76] * 3, [76] * 3]  # 0.299 of red
