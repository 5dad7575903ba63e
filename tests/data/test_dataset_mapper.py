"""The mapper: what it gives, that boxes lie on what they mark, and what it refuses."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from detkit.config import get_cfg
from detkit.data import (
    DatasetMapper,
    MetadataCatalog,
    annotations_to_instances,
    check_image_size,
    filter_empty_instances,
    transform_instance_annotations,
)
from detkit.data import transforms as T
from detkit.data.dataset_mapper import image_to_tensor
from detkit.data.mixing import Mosaic
from detkit.structures import BitMasks, BoxMode, PolygonMasks, RotatedBoxes
from detkit.structures.mask_formats import bitmask_to_rle
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
    expected = np.asarray(
        Image.open(record["file_name"]).resize((64, 48), Image.Resampling.BILINEAR)
    )
    assert np.abs(sample["image"].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("format", "channels"), [("BGR", 3), ("RGB", 3), ("L", 1)])
def test_channels_follow_the_format(record, format, channels):
    sample = DatasetMapper(is_train=False, augmentations=[], image_format=format)(record)
    assert np.array_equal(
        sample["image"].numpy(), read_image(record["file_name"], format).transpose(2, 0, 1)
    )
    assert len(sample["image"]) == channels


def test_flipped_sample_is_the_mirror_image(record):
    plain = DatasetMapper(is_train=True, augmentations=[T.Resize((30, 40))])(record)
    flipped = DatasetMapper(is_train=True, augmentations=[T.Resize((30, 40)), T.RandomFlip(1.0)])(
        record
    )
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
    box = {
        "bbox": [int(x1), int(y1), int(width), int(height)],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
    }
    record = {
        "file_name": str(tmp_path / "a.png"),
        "image_id": 0,
        "height": 100,
        "width": 120,
        "annotations": [box],
    }
    np.random.seed(seed)
    cfg = configured(
        "INPUT.CROP.ENABLED", True, "INPUT.CROP.SIZE", [0.7, 0.7], "INPUT.MIN_SIZE_TRAIN", (150,)
    )
    sample = DatasetMapper(cfg, is_train=True)(record)
    rows, columns = np.nonzero(sample["image"][0].numpy() >= 128)
    drawn = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert (sample["instances"].gt_boxes.tensor[0] - drawn).abs().max() <= 1.5


def test_large_scale_jitter_moves_boxes_and_masks_together(rich):
    items = [
        {"name": "RandomFlip"},
        {
            "name": "ResizeScale",
            "min_scale": 0.5,
            "max_scale": 2.0,
            "target_height": 90,
            "target_width": 120,
        },
        {"name": "FixedSizeCrop", "crop_size": [90, 120], "pad": False},
    ]
    settings = ["INPUT.AUGMENTATIONS", items, "MODEL.MASK_ON", True, "INPUT.MASK_FORMAT", "bitmask"]
    cfg = configured(*settings, "INPUT.RECOMPUTE_BOXES", True)
    mapper, kept = DatasetMapper(cfg, is_train=True), 0
    for seed in range(8):
        np.random.seed(seed)
        sample = mapper(rich)
        instances = sample["instances"]
        assert max(sample["image"].shape[1:]) <= 120
        assert instances.image_size == tuple(sample["image"].shape[1:])
        boxes = instances.gt_masks.get_bounding_boxes().tensor
        assert torch.equal(instances.gt_boxes.tensor, boxes)
        kept += len(instances)
    assert kept > 0


def test_ground_truth_is_that_of_one_annotation_at_a_time(record):
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[T.CropTransform(8, 4, 20, 16), T.Resize((33, 47)), T.RandomFlip(1.0)],
    )
    transforms = [
        T.CropTransform(8, 4, 20, 16),
        T.ResizeTransform(16, 20, 33, 47),
        T.HFlipTransform(47),
    ]
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
    cfg = configured(
        "INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", [6, 6]
    )
    mapper = DatasetMapper(cfg, is_train=True)
    np.random.seed(0)
    assert all(len(mapper(record)["instances"]) >= 1 for _ in range(30))
    assert DatasetMapper(cfg, is_train=False)(record)["image"].shape == (3, 48, 64)


def test_background_has_empty_ground_truth(record):
    sample = DatasetMapper(configured("INPUT.CROP.ENABLED", True), is_train=True)(
        {**record, "annotations": []}
    )
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
    interleaved = DatasetMapper(cfg, is_train=True, memory_format=torch.channels_last)(record)[
        "image"
    ]
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


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["planes", "interleaved"]
)
@pytest.mark.parametrize(
    "layout",
    [
        "plain",
        "bgr",
        "flipped",
        "bgr-flipped",
        "upside-down",
        "bgr-upside-down",
        "planar",
        "crop",
        "read-only",
        "grey",
    ],
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
        DatasetMapper(configured(), is_train=True)(
            {**record, "file_name": str(tmp_path / "broken.jpg")}
        )


def test_wrong_size_is_named(record):
    with pytest.raises(SizeMismatchError, match=r"a\.jpg is 32x24 .* says 32x25"):
        DatasetMapper(configured(), is_train=True)({**record, "height": 25})


# --- masks, keypoints, label maps, proposals ---

TRIANGLE = [[4.0, 2, 14, 2, 14, 10]]


@pytest.fixture
def rich(write_image, tmp_path):
    """Return a record with polygons and run lengths side by side, keypoints, and a label map."""
    mask = np.zeros((24, 32), dtype=bool)
    mask[10:20, 18:30] = True
    Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "labels.png")
    box = {"bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    return {
        "file_name": write_image(),
        "image_id": 7,
        "height": 24,
        "width": 32,
        "sem_seg_file_name": str(tmp_path / "labels.png"),
        "annotations": [
            {
                **box,
                "id": 1,
                "bbox": [4, 2, 10, 8],
                "segmentation": TRIANGLE,
                "keypoints": [5, 3, 2, 12, 9, 1],
            },
            {**box, "id": 2, "bbox": [18, 10, 12, 10], "segmentation": bitmask_to_rle(mask)},
            {
                **box,
                "id": 3,
                "bbox": [0, 0, 32, 24],
                "iscrowd": 1,
                "segmentation": {"size": [1, 1], "counts": "?"},
            },
        ],
    }


def test_mixed_masks_become_bitmaps_of_what_the_boxes_mark(rich):
    mapper = DatasetMapper(
        is_train=True, augmentations=[T.Resize((48, 64)), T.RandomFlip(1.0)], use_instance_mask=True
    )
    instances = mapper(rich)["instances"]
    assert isinstance(instances.gt_masks, BitMasks)
    assert instances.gt_masks.tensor.shape == (2, 48, 64)
    # To the pixel: pycocotools leaves the outermost row of a slanted side out.
    measured = instances.gt_masks.get_bounding_boxes().tensor
    assert (measured - instances.gt_boxes.tensor).abs().max() <= 1


def test_polygons_alone_stay_polygons(rich):
    rich["annotations"] = rich["annotations"][:1]
    mapper = DatasetMapper(is_train=True, augmentations=[T.RandomFlip(1.0)], use_instance_mask=True)
    masks = mapper(rich)["instances"].gt_masks
    assert isinstance(masks, PolygonMasks)
    assert masks.polygons[0][0].tolist() == [28, 2, 18, 2, 18, 10]


def test_boxes_are_measured_anew_after_a_crop(rich):
    crop = T.CropTransform(
        0, 0, 20, 6
    )  # the triangle's lower corner is cut off: its left side moves
    plain = DatasetMapper(is_train=True, augmentations=[crop], use_instance_mask=True)(rich)[
        "instances"
    ]
    mapper = DatasetMapper(
        is_train=True, augmentations=[crop], use_instance_mask=True, recompute_boxes=True
    )
    rich["annotations"][0]["segmentation"] = [[4.0, 2, 14, 10, 4, 10]]
    instances = mapper(rich)["instances"]
    assert plain.gt_boxes.tensor.tolist() == [[4, 2, 14, 6]]
    assert len(instances) == 1
    assert (instances.gt_boxes.tensor - torch.tensor([[4.0, 2, 9, 6]])).abs().max() <= 1


def test_objects_whose_mask_is_cut_away_go_although_their_box_is_not(rich):
    crop = T.CropTransform(4, 6, 3, 3)  # a corner of the box that the triangle leaves free
    assert len(DatasetMapper(is_train=True, augmentations=[crop])(rich)["instances"]) == 1
    assert (
        len(
            DatasetMapper(is_train=True, augmentations=[crop], use_instance_mask=True)(rich)[
                "instances"
            ]
        )
        == 0
    )


def test_keypoints_are_of_all_objects(rich):
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[T.RandomFlip(1.0)],
        use_keypoint=True,
        keypoint_hflip_indices=[1, 0],
    )
    keypoints = mapper(rich)["instances"].gt_keypoints.tensor
    assert keypoints.tolist() == [[[20, 9, 1], [27, 3, 2]], [[0, 0, 0], [0, 0, 0]]]


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_background_alone_has_masks_and_keypoints_of_nothing(rich, mask_format):
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[T.Resize((48, 64))],
        use_instance_mask=True,
        instance_mask_format=mask_format,
        recompute_boxes=True,
        use_keypoint=True,
        num_keypoints=2,
    )
    instances = mapper({**rich, "annotations": []})["instances"]
    assert (len(instances), len(instances.gt_masks)) == (0, 0)
    assert instances.gt_keypoints.tensor.shape == (0, 2, 3)


def test_label_map_moves_with_the_image(rich):
    sample = DatasetMapper(is_train=True, augmentations=[T.Resize((48, 64)), T.RandomFlip(1.0)])(
        rich
    )
    assert sample["sem_seg"].dtype == torch.int64
    expected = torch.zeros(48, 64, dtype=torch.int64)
    expected[20:40, 4:28] = 1
    assert torch.equal(sample["sem_seg"], expected)
    assert "sem_seg_file_name" not in sample
    assert "sem_seg" not in DatasetMapper(is_train=False, augmentations=[])(rich)


def test_label_map_of_another_size_is_refused(rich, tmp_path):
    Image.new("L", (5, 5)).save(tmp_path / "labels.png")
    with pytest.raises(SizeMismatchError, match=r"labels.png is 5x5 .* its image .*a.jpg is 32x24"):
        DatasetMapper(is_train=True, augmentations=[])(rich)


@pytest.mark.parametrize("is_train", [True, False])
def test_proposals_come_with_the_image(rich, is_train):
    boxes, logits = np.array([[2, 2, 8, 8], [0, 0, 4, 4]]), np.array([2.0, 1.0])
    record = {**rich, "proposal_boxes": boxes, "proposal_objectness_logits": logits}
    mapper = DatasetMapper(
        is_train=is_train, augmentations=[T.Resize((48, 64))], precomputed_proposal_topk=1
    )
    sample = mapper(record)
    assert sample["proposals"].proposal_boxes.tensor.tolist() == [[4, 4, 16, 16]]
    assert "proposal_boxes" not in sample


@pytest.fixture
def photo(rich, tmp_path):
    """Return `rich` with everything ten times as large, in a JPEG of 244x324."""
    coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((324, 244), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "photo.jpg", quality=95)
    mask = np.zeros((244, 324), dtype=bool)
    mask[100:200, 180:300] = True
    Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "labels.png")
    annotations = copy.deepcopy(rich["annotations"][:2])
    annotations[0]["segmentation"] = [[10.0 * v for v in TRIANGLE[0]]]
    annotations[0]["keypoints"] = [50, 30, 2, 120, 90, 1]
    annotations[1]["segmentation"] = bitmask_to_rle(mask)
    for annotation in annotations:
        annotation["bbox"] = [10 * v for v in annotation["bbox"]]
    files = {"file_name": str(tmp_path / "photo.jpg")}
    return {**rich, **files, "height": 244, "width": 324, "annotations": annotations}


@pytest.mark.parametrize(
    "further",
    [[], [T.RandomFlip(1.0)], [Mosaic((48, 64))]],
    ids=["resize", "flip", "partners"],
)
def test_reduced_jpeg_gives_nearly_the_same_sample(photo, further):
    samples = []
    for reduced in (False, True):
        mapper = DatasetMapper(
            is_train=True,
            augmentations=[T.ResizeShortestEdge([48, 60], 90, "choice"), *further],
            use_instance_mask=True,
            instance_mask_format="bitmask",
            use_keypoint=True,
            num_keypoints=2,
            keypoint_hflip_indices=np.array([0, 1]),
            reduced_jpeg=reduced,
        )
        mapper.partners = [photo]
        sizes = []
        inner = mapper.augmentations.augs[0]
        before = inner.get_transform
        inner.get_transform = lambda image, before=before, sizes=sizes: (
            sizes.append(image.shape[:2]) or before(image)
        )
        np.random.seed(1)
        samples.append(mapper(photo))
        assert set(sizes) == {(61, 81) if reduced else (244, 324)}
    whole, reduced = samples
    assert whole["image"].shape == reduced["image"].shape
    assert (whole["image"].int() - reduced["image"].int()).abs().float().mean() < 1
    assert (whole["height"], whole["width"]) == (reduced["height"], reduced["width"])
    a, b = whole["instances"], reduced["instances"]
    assert len(a) == len(b) > 0
    assert (a.gt_boxes.tensor - b.gt_boxes.tensor).abs().max() < 0.01
    assert (a.gt_keypoints.tensor - b.gt_keypoints.tensor).abs().max() < 0.01
    assert (a.gt_masks.tensor != b.gt_masks.tensor).float().mean() < 0.01
    assert (whole["sem_seg"] != reduced["sem_seg"]).float().mean() < 0.01


@pytest.mark.parametrize(
    "first",
    [
        T.ResizeShortestEdge([48, 240], 400, "choice"),
        T.ResizeShortestEdge([0, 48], 90, "choice"),
        T.TorchvisionResizeShortestEdge(48, 90),
        T.RandomCrop("absolute", (48, 48)),
    ],
)
def test_jpeg_is_not_reduced_where_more_pixels_may_be_needed(photo, first):
    mapper = DatasetMapper(is_train=False, augmentations=[first], reduced_jpeg=True)
    plain = DatasetMapper(is_train=False, augmentations=[first])
    samples = []
    for each in (mapper, plain):
        np.random.seed(0)
        samples.append(each(photo)["image"])
    assert torch.equal(*samples)


def test_reduced_jpeg_without_effect_is_said(caplog):
    DatasetMapper(configured("INPUT.REDUCED_JPEG", True), is_train=True)
    assert "REDUCED_JPEG" not in caplog.text
    flip = [{"name": "RandomFlip"}]
    settings = ("INPUT.REDUCED_JPEG", True, "INPUT.AUGMENTATIONS", flip)
    DatasetMapper(configured(*settings), is_train=True)
    assert "INPUT.REDUCED_JPEG has no effect in training" in caplog.text


def test_reduced_jpeg_of_another_size_is_named(photo):
    cfg = configured("INPUT.REDUCED_JPEG", True)
    with pytest.raises(SizeMismatchError, match="is 324x244 .* says 324x245"):
        DatasetMapper(cfg, is_train=True)({**photo, "height": 245})


def test_mask_of_the_wrong_size_names_annotation_and_file(rich):
    rich["annotations"][1]["segmentation"] = {"size": [10, 20], "counts": [200]}
    with pytest.raises(
        ValueError, match=r"annotation 2 of .*a.jpg: .* got 10 x 20 .* image of 24 x 32"
    ):
        DatasetMapper(is_train=True, augmentations=[], use_instance_mask=True)(rich)


def test_settings_of_a_mask_and_keypoint_model():
    MetadataCatalog.get("faces").set(
        keypoint_names=["left_eye", "right_eye"], keypoint_flip_map=[("left_eye", "right_eye")]
    )
    settings = ["MODEL.MASK_ON", True, "MODEL.KEYPOINT_ON", True, "INPUT.CROP.ENABLED", True]
    cfg = configured(
        *settings, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 2, "DATASETS.TRAIN", ("faces",)
    )
    mapper = DatasetMapper(cfg, is_train=True)
    assert mapper.recompute_boxes
    assert list(mapper.keypoint_hflip_indices) == [1, 0]
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 17
    with pytest.raises(
        ValueError, match=r"NUM_KEYPOINTS is 17, but data set 'faces' has 2 keypoints; set it to 2"
    ):
        DatasetMapper(cfg, is_train=True)
    assert DatasetMapper(cfg, is_train=False).keypoint_hflip_indices is None


def test_contradictory_arguments_are_refused():
    with pytest.raises(ValueError, match="recompute_boxes measures masks"):
        DatasetMapper(is_train=True, augmentations=[], recompute_boxes=True)
    with pytest.raises(ValueError, match="use_keypoint needs num_keypoints"):
        DatasetMapper(is_train=True, augmentations=[], use_keypoint=True)
    with pytest.raises(ValueError, match="instance_mask_format must be one of polygon, bitmask"):
        DatasetMapper(is_train=True, augmentations=[], instance_mask_format="rle")


def test_size_is_taken_from_the_image_where_the_record_has_none():
    record = {"file_name": "a.jpg", "image_id": 1}
    check_image_size(record, np.zeros((24, 32, 3)))
    assert (record["height"], record["width"]) == (24, 32)


def test_other_size_names_file_expected_and_found():
    record = {"file_name": "a.jpg", "image_id": 1, "height": 30, "width": 32}
    with pytest.raises(
        SizeMismatchError,
        match=r"image a\.jpg is 32x24 \(width x height\), but its record says 32x30\.$",
    ):
        check_image_size(record, np.zeros((24, 32, 3)))
    assert issubclass(SizeMismatchError, BadImageError)


def test_exchanged_sides_are_explained():
    record = {"file_name": "a.jpg", "image_id": 1, "height": 32, "width": 24}
    with pytest.raises(SizeMismatchError, match="sides are exchanged.*EXIF orientation"):
        check_image_size(record, np.zeros((24, 32, 3)))


def test_crop_comes_before_resize_and_flip():
    mapper = DatasetMapper(configured("INPUT.CROP.ENABLED", True), is_train=True)
    kinds = [type(augmentation) for augmentation in mapper.augmentations.augs]
    assert kinds == [T.RandomCropAroundInstance, T.ResizeShortestEdge, T.RandomFlip]


def test_rotated_boxes_follow_the_image_and_leave_with_their_center(record):
    record["annotations"] = [
        {"bbox": box, "bbox_mode": BoxMode.XYWHA_ABS, "category_id": k}
        for k, box in enumerate([[8, 12, 10, 4, 30], [31, 12, 10, 4, 30], [8, 12, 0, 4, 30]])
    ]
    record["annotations"].append(
        {"bbox": [2, 4, 10, 8], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 3}
    )
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[T.CropTransform(0, 0, 30, 24), T.HFlipTransform(30), T.Resize((48, 60))],
        use_rotated_boxes=True,
    )
    instances = mapper(record)["instances"]
    assert type(instances.gt_boxes) is RotatedBoxes
    expected = torch.tensor([[44.0, 24, 20, 8, -30], [46, 16, 20, 16, 0]])
    torch.testing.assert_close(instances.gt_boxes.tensor, expected)
    assert instances.gt_classes.tolist() == [0, 3]


def test_upright_boxes_around_rotated_ones_are_for_other_models(record):
    record["annotations"] = [
        {"bbox": [16, 12, 10, 4, 90], "bbox_mode": BoxMode.XYWHA_ABS, "category_id": 0}
    ]
    boxes = DatasetMapper(is_train=True, augmentations=[])(record)["instances"].gt_boxes.tensor
    torch.testing.assert_close(boxes, torch.tensor([[14.0, 7, 18, 17]]))


def test_rotated_boxes_come_without_masks():
    with pytest.raises(ValueError, match="use_rotated_boxes goes without use_instance_mask"):
        DatasetMapper(configured("MODEL.ROTATED_BOXES", True, "MODEL.MASK_ON", True))
