"""The mapper: what it gives, that boxes lie on what they mark, and what it refuses."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from detkit.config import get_cfg
from detkit.data import DatasetMapper, annotations_to_instances, filter_empty_instances, transform_instance_annotations
from detkit.data import transforms as T
from detkit.data.dataset_mapper import image_to_tensor
from detkit.structures import BoxMode
from detkit.utils.image import BadImageError, SizeMismatchError, read_image


def configured(*settings):
    cfg = get_cfg()
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", (48,), "INPUT.MIN_SIZE_TEST", 48, *settings])
    return cfg


@pytest.fixture
def record(write_image):
    annotations = [
        {
            "bbox": [4, 2, 10, 8],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": 1,
            "iscrowd": 0,
            "segmentation": [[0] * 6],
        },
        {"bbox": [0, 0, 30, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 1},
        {"bbox": [20, 10, 31, 23], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 2},
    ]
    return {
        "file_name": write_image(),
        "image_id": 7,
        "height": 24,
        "width": 32,
        "annotations": annotations,
        "note": "x",
    }


def test_training_sample(record):
    sample = DatasetMapper(configured("INPUT.RANDOM_FLIP", "none"), is_train=True)(record)
    assert sample["image"].shape == (3, 48, 64)
    assert sample["image"].dtype == torch.uint8
    assert sample["image"][None].is_contiguous(memory_format=torch.channels_last)
    assert sample["instances"].image_size == (48, 64)
    assert sample["instances"].gt_boxes.tensor.tolist() == [[8, 4, 28, 20], [40, 20, 62, 46]]
    assert sample["instances"].gt_classes.tolist() == [1, 2]
    assert {key: sample[key] for key in ("height", "width", "image_id", "note")} == {
        "height": 24,
        "width": 32,
        "image_id": 7,
        "note": "x",
    }
    assert "annotations" not in sample


def test_record_is_not_changed(record):
    before = copy.deepcopy(record)
    DatasetMapper(configured(), is_train=True)(record)
    assert record == before


def test_testing_sample_has_no_ground_truth(record):
    sample = DatasetMapper(configured(), is_train=False)(record)
    assert sample["image"].shape == (3, 48, 64)
    assert "instances" not in sample
    assert "annotations" not in sample


def test_image_is_resized_from_the_file(record):
    sample = DatasetMapper(configured("INPUT.FORMAT", "RGB"), is_train=False)(record)
    expected = np.asarray(Image.open(record["file_name"]).resize((64, 48), Image.Resampling.BILINEAR))
    assert np.abs(sample["image"].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("format", "channels"), [("BGR", 3), ("RGB", 3), ("L", 1)])
def test_channels_follow_the_format(record, format, channels):
    sample = DatasetMapper(is_train=False, augmentations=[], image_format=format)(record)
    assert np.array_equal(sample["image"].numpy(), read_image(record["file_name"], format).transpose(2, 0, 1))
    assert len(sample["image"]) == channels


def test_flipped_sample_is_the_mirror_image(record):
    plain = DatasetMapper(is_train=True, augmentations=[T.Resize((30, 40))])(record)
    flipped = DatasetMapper(is_train=True, augmentations=[T.Resize((30, 40)), T.RandomFlip(1.0)])(record)
    assert torch.equal(flipped["image"], plain["image"].flip(-1))
    boxes = plain["instances"].gt_boxes.tensor
    mirrored = torch.stack([40 - boxes[:, 2], boxes[:, 1], 40 - boxes[:, 0], boxes[:, 3]], dim=1)
    assert torch.allclose(flipped["instances"].gt_boxes.tensor, mirrored)


@pytest.mark.parametrize("seed", range(6))
def test_boxes_lie_on_what_they_mark(tmp_path, seed):
    rng = np.random.default_rng(seed)
    x1, y1 = rng.integers(10, 40, 2)
    width, height = rng.integers(25, 50, 2)
    pixels = np.zeros((100, 120, 3), dtype=np.uint8)
    pixels[y1 : y1 + height, x1 : x1 + width] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    box = {"bbox": [int(x1), int(y1), int(width), int(height)], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    record = {"file_name": str(tmp_path / "a.png"), "image_id": 0, "height": 100, "width": 120, "annotations": [box]}
    np.random.seed(seed)
    cfg = configured("INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", [0.7, 0.7], "INPUT.MIN_SIZE_TRAIN", (150,))
    sample = DatasetMapper(cfg, is_train=True)(record)
    rows, columns = np.nonzero(sample["image"][0].numpy() >= 128)
    drawn = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert (sample["instances"].gt_boxes.tensor[0] - drawn).abs().max() <= 1.5


def test_ground_truth_is_that_of_one_annotation_at_a_time(record):
    mapper = DatasetMapper(
        is_train=True, augmentations=[T.CropTransform(8, 4, 20, 16), T.Resize((33, 47)), T.RandomFlip(1.0)]
    )
    transforms = [T.CropTransform(8, 4, 20, 16), T.ResizeTransform(16, 20, 33, 47), T.HFlipTransform(47)]
    objects = [a for a in record["annotations"] if not a.get("iscrowd")]
    slow = annotations_to_instances(
        [transform_instance_annotations(a, transforms, (33, 47)) for a in objects], (33, 47)
    )
    fast = mapper(record)["instances"]
    assert torch.allclose(fast.gt_boxes.tensor, filter_empty_instances(slow).gt_boxes.tensor)
    assert torch.equal(fast.gt_classes, slow.gt_classes)


def test_object_that_a_crop_cuts_away_is_dropped(record):
    sample = DatasetMapper(is_train=True, augmentations=[T.CropTransform(0, 0, 18, 12)])(record)
    assert sample["instances"].gt_classes.tolist() == [1]


def test_crop_keeps_an_object(record):
    cfg = configured("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", [6, 6])
    mapper = DatasetMapper(cfg, is_train=True)
    np.random.seed(0)
    assert all(len(mapper(record)["instances"]) >= 1 for _ in range(30))
    assert DatasetMapper(cfg, is_train=False)(record)["image"].shape == (3, 48, 64)


def test_background_has_empty_ground_truth(record):
    sample = DatasetMapper(configured("INPUT.CROP.ENABLED", True), is_train=True)({**record, "annotations": []})
    assert len(sample["instances"]) == 0
    assert sample["instances"].gt_boxes.tensor.shape == (0, 4)


def test_unannotated_image_has_no_ground_truth(record):
    del record["annotations"]
    assert "instances" not in DatasetMapper(configured(), is_train=True)(record)


def test_own_augmentations_replace_those_of_the_config(record):
    mapper = DatasetMapper(configured(), is_train=True, augmentations=[T.Resize((10, 10))])
    assert mapper(record)["image"].shape == (3, 10, 10)


def test_interleaved_sample_is_equal(record):
    cfg = configured("INPUT.RANDOM_FLIP", "none")
    plain = DatasetMapper(cfg, is_train=True)(record)["image"]
    interleaved = DatasetMapper(cfg, is_train=True, memory_format=torch.channels_last)(record)["image"]
    assert interleaved.stride() == (1, 64 * 3, 3)
    assert torch.equal(interleaved, plain)


def test_float_augmentation_gives_a_float_image(record):
    class Halve(T.Transform):
        def apply_image(self, img):
            return img.astype(np.float32) / 2

        def apply_coords(self, coords):
            return coords

    sample = DatasetMapper(is_train=True, augmentations=[Halve(), T.Resize((10, 10))])(record)
    assert sample["image"].dtype == torch.float32


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["planes", "interleaved"])
@pytest.mark.parametrize(
    "layout",
    ["plain", "bgr", "flipped", "bgr-flipped", "upside-down", "bgr-upside-down", "planar", "crop", "read-only", "grey"],
)
def test_tensor_of_any_layout_is_equal_and_in_the_memory_format(layout, memory_format):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    if layout == "planar":
        image = np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0)
    elif layout == "grey":
        image = image[:, :, 0]
    elif layout == "read-only":
        image = np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0)
        image.flags.writeable = False
    else:
        image = {
            "plain": image,
            "bgr": image[:, :, ::-1],
            "flipped": image[:, ::-1],
            "bgr-flipped": image[:, ::-1, ::-1],
            "upside-down": image[::-1],
            "bgr-upside-down": image[::-1, :, ::-1],
            "crop": image[1:4, 2:5],
        }[layout]
    tensor = image_to_tensor(image, memory_format)
    assert tensor[None].is_contiguous(memory_format=memory_format)
    expected = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
    assert np.array_equal(tensor.numpy(), expected)


# --- refused ---


def test_unreadable_image_is_named(record, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    with pytest.raises(BadImageError, match=r"broken\.jpg is not an image"):
        DatasetMapper(configured(), is_train=True)({**record, "file_name": str(tmp_path / "broken.jpg")})


def test_wrong_size_is_named(record):
    with pytest.raises(SizeMismatchError, match=r"a\.jpg is 32x24 .* says 32x25"):
        DatasetMapper(configured(), is_train=True)({**record, "height": 25})


@pytest.mark.parametrize("key", ["MODEL.MASK_ON", "MODEL.KEYPOINT_ON", "MODEL.LOAD_PROPOSALS"])
def test_what_is_not_there_yet_is_refused(key):
    with pytest.raises(NotImplementedError, match=f"{key} is on"):
        DatasetMapper(configured(key, True), is_train=True)
