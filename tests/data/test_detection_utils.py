import numpy as np
import pytest
import torch
from PIL import Image

from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.data import detection_utils as utils
from detkit.data import transforms as T
from detkit.structures import BoxMode
from detkit.utils.errors import ConfigError


def test_image_is_read_in_its_own_channels_unless_told(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[:, :, 0]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(utils.read_image(str(tmp_path / "a.png")), pixels)
    bgr = utils.read_image(str(tmp_path / "a.png"), format="BGR")
    np.testing.assert_array_equal(bgr, pixels[:, :, ::-1])
    assert utils.read_image(str(tmp_path / "grey.png")).shape == (5, 6)
    assert utils.read_image(str(tmp_path / "grey.png"), "L").shape == (5, 6, 1)


def test_pil_image_becomes_an_array():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 3, 3), dtype=np.uint8))
    np.testing.assert_array_equal(utils.convert_PIL_to_numpy(image, None), np.asarray(image))
    bgr = utils.convert_PIL_to_numpy(image, "BGR")
    np.testing.assert_array_equal(bgr, np.asarray(image)[:, :, ::-1])
    assert utils.convert_PIL_to_numpy(image, "L").shape == (4, 3, 1)
    assert utils.apply_exif_orientation(image).size == image.size


def test_luma_and_colour_differences_there_and_back(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (4, 3, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    yuv = utils.read_image(str(tmp_path / "a.png"), "YUV-BT.601")
    again = utils.convert_PIL_to_numpy(Image.fromarray(pixels), "YUV-BT.601")
    np.testing.assert_array_equal(yuv, again)
    np.testing.assert_array_equal(utils.convert_image_to_rgb(yuv, "YUV-BT.601"), pixels)
    white = utils.convert_PIL_to_numpy(Image.new("RGB", (1, 1), "white"), "YUV-BT.601")
    np.testing.assert_allclose(white, [[[1, 0, 0]]], atol=1e-4)


def test_size_of_a_record_without_a_file_is_checked():
    with pytest.raises(utils.SizeMismatchError, match="is 3x2"):
        utils.check_image_size({"width": 5, "height": 2}, np.zeros((2, 3, 3)))


def test_names_of_the_module_live_elsewhere_too():
    from detkit.data import annotations_to_instances, build_augmentation

    assert utils.annotations_to_instances is annotations_to_instances
    assert utils.build_transform_gen is build_augmentation


def test_proposals_are_replaced_in_place():
    record = {
        "file_name": "a.png",
        "proposal_boxes": np.array([[5, 5, 9, 9], [0, 0, 0, 0], [0.0, 0, 10, 10]]),
        "proposal_objectness_logits": np.array([3.0, 2.0, 1.0]),
        "proposal_bbox_mode": BoxMode.XYXY_ABS,
    }
    utils.transform_proposals(record, (20, 20), T.HFlipTransform(20), proposal_topk=5)
    assert set(record) == {"file_name", "proposals"}
    assert record["proposals"].objectness_logits.tolist() == [3.0, 1.0]
    assert record["proposals"].proposal_boxes.tensor[1].tolist() == [10, 0, 20, 10]
    utils.transform_proposals(
        record := {"file_name": "a.png"}, (2, 2), T.NoOpTransform(), proposal_topk=1
    )
    assert record == {"file_name": "a.png"}


def test_keypoints_of_one_annotation():
    moved = utils.transform_keypoint_annotations(
        [1, 2, 2, 3, 4, 1], T.HFlipTransform(10), (10, 10), np.array([1, 0])
    )
    assert moved.tolist() == [[7, 4, 1], [9, 2, 2]]


def test_window_holds_the_centre_of_the_object():
    instance = {"bbox": [10, 10, 100, 100], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    for _ in range(20):
        window = utils.gen_crop_transform_with_instance((10, 12), (150, 150), instance)
        assert window.x0 <= 55 <= window.x0 + window.w
        assert window.y0 <= 55 <= window.y0 + window.h
        assert (window.h, window.w) == (10, 12)
    with pytest.raises(AssertionError, match="does not fit"):
        utils.gen_crop_transform_with_instance((10, 10), (5, 50), instance)
    with pytest.raises(ValueError, match="lies outside"):
        utils.gen_crop_transform_with_instance((5, 5), (30, 30), instance)


def test_metadata_must_agree():
    MetadataCatalog.get("one").set(mine=[1])
    MetadataCatalog.get("two").set(mine=[2])
    utils.check_metadata_consistency("mine", ["one", "one"])
    utils.check_metadata_consistency("mine", "one")
    with pytest.raises(AttributeError, match="yours"):
        utils.check_metadata_consistency("yours", "one")
    with pytest.raises(ConfigError, match="need the same mine"):
        utils.check_metadata_consistency("mine", ["one", "two"])


def test_weights_of_a_federated_loss_are_counts_to_a_power():
    counts = [{"id": 1, "image_count": 4}, {"id": 2, "image_count": 9}]
    DatasetCatalog.register("counted", lambda: [])
    MetadataCatalog.get("counted").set(
        thing_classes=["a", "b"],
        class_image_count=counts,
        thing_dataset_id_to_contiguous_id={1: 0, 2: 1},
    )
    weights = utils.get_fed_loss_cls_weights("counted", 0.5)
    torch.testing.assert_close(weights, torch.tensor([2.0, 3.0]))
