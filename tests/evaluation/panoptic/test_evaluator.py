import json
import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image

from detkit.evaluation import COCOPanopticEvaluator
from detkit.structures import BoxMode
from detkit.utils.colormap import id2rgb, rgb2id
from detkit.utils.image_file import BadImageError

METADATA = {
    "thing_dataset_id_to_contiguous_id": {10: 0, 20: 1},
    # Models with a head for stuff see all things as its class 0.
    "stuff_classes": ["things", "grass", "sky"],
    "stuff_dataset_id_to_contiguous_id": {10: 0, 20: 0, 30: 1, 40: 2},
}
IDS = np.array([[5, 5, 0, 0], [5, 5, 700, 700], [90000, 90000, 90000, 90000]])
SEGMENTS = [
    {"id": 5, "isthing": True, "category_id": 1},
    {"id": 700, "isthing": True, "category_id": 0, "iscrowd": 1},
    {"id": 90000, "isthing": False, "category_id": 2},
]


@pytest.fixture
def panoptic_records(tmp_path):
    records = []
    for image_id in (1, 2):
        file_name = str(tmp_path / f"truth_{image_id}.png")
        Image.fromarray(id2rgb(IDS)).save(file_name)
        entry = {
            "file_name": f"{image_id}.jpg",
            "image_id": image_id,
            "pan_seg_file_name": file_name,
        }
        records.append({**entry, "segments_info": [dict(segment) for segment in SEGMENTS]})
    return records


def run(evaluator, predictions):
    evaluator.reset()
    for image_id, (ids, segments) in predictions.items():
        output = {"panoptic_seg": (torch.from_numpy(np.array(ids)).int(), segments)}
        evaluator.process([{"image_id": image_id, "file_name": f"x/{image_id}.jpg"}], [output])
    return evaluator.evaluate()


def test_ground_truth_as_predictions_scores_100(register, panoptic_records):
    name = register(panoptic_records, **METADATA)
    metrics = run(COCOPanopticEvaluator(name), {1: (IDS, SEGMENTS), 2: (IDS, SEGMENTS)})[
        "panoptic_seg"
    ]
    # The crowd region as a prediction is neither right nor wrong.
    assert list(metrics) == ["PQ", "SQ", "RQ", "PQ_th", "SQ_th", "RQ_th", "PQ_st", "SQ_st", "RQ_st"]
    assert all(value == pytest.approx(100) for value in metrics.values())


def test_pixels_may_hold_category_and_instance(register, panoptic_records):
    # The form of Panoptic-DeepLab, over the classes of Cityscapes: one numbering of all of them.
    metadata = {
        "thing_dataset_id_to_contiguous_id": {10: 0, 20: 1},
        "stuff_dataset_id_to_contiguous_id": {30: 2, 40: 3},
        "label_divisor": 1000,
    }
    for record in panoptic_records:
        record["segments_info"][2]["category_id"] = 3
    name = register(panoptic_records, **metadata)
    codes = np.array([[1000, 1000, -1, -1], [1000, 1000, 1, 1], [3000, 3000, 3000, 3000]])
    metrics = run(COCOPanopticEvaluator(name), {1: (codes, None), 2: (codes, None)})
    assert metrics["panoptic_seg"]["PQ"] == pytest.approx(100)
    codes[2, :2] = 3001  # two segments of half the pixels: neither overlaps by more than a half
    metrics = run(COCOPanopticEvaluator(name), {1: (codes, None), 2: (codes, None)})
    assert metrics["panoptic_seg"]["PQ_st"] == 0
    assert metrics["panoptic_seg"]["PQ_th"] == pytest.approx(100)


def test_ground_truth_may_come_from_the_json_of_coco(
    register, make_record, panoptic_records, tmp_path
):
    # As for data sets that train on instances and stuff: their records have no segments.
    dataset_ids = [20, 10, 40]
    segments = [
        {"id": s["id"], "category_id": c, "iscrowd": s.get("iscrowd", 0)}
        for s, c in zip(SEGMENTS, dataset_ids, strict=True)
    ]
    entries = [
        {"image_id": i, "file_name": f"truth_{i}.png", "segments_info": segments} for i in (2, 1)
    ]
    (tmp_path / "panoptic.json").write_text(json.dumps({"annotations": entries}))
    paths = {"panoptic_json": str(tmp_path / "panoptic.json"), "panoptic_root": str(tmp_path)}
    name = register([make_record(1), make_record(2)], **METADATA, **paths)
    metrics = run(COCOPanopticEvaluator(name), {1: (IDS, SEGMENTS), 2: (IDS, SEGMENTS)})[
        "panoptic_seg"
    ]
    assert metrics["PQ"] == pytest.approx(100)
    with pytest.raises(ValueError, match="panoptic.json has no annotation of image 3"):
        COCOPanopticEvaluator(register([make_record(3)], **METADATA, **paths))
    (tmp_path / "truth_2.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 of 2 panoptic png .*panoptic.json .*truth_2.png of image id 2"
    ):
        COCOPanopticEvaluator(register([make_record(1), make_record(2)], **METADATA, **paths))


def test_segments_of_records_are_things_unless_they_say_otherwise(register, panoptic_records):
    for record in panoptic_records:
        for segment in record["segments_info"][:2]:
            del segment["isthing"]
    name = register(panoptic_records, **METADATA)
    metrics = run(COCOPanopticEvaluator(name), {1: (IDS, SEGMENTS), 2: (IDS, SEGMENTS)})
    assert metrics["panoptic_seg"]["PQ"] == pytest.approx(100)


def test_segments_of_images_that_were_not_predicted_are_missed(register, panoptic_records, caplog):
    name = register(panoptic_records, **METADATA)
    with caplog.at_level(logging.WARNING):
        metrics = run(COCOPanopticEvaluator(name), {2: (IDS, SEGMENTS)})["panoptic_seg"]
    assert metrics["PQ"] == pytest.approx(100 / 1.5)
    assert metrics["SQ"] == pytest.approx(100)
    assert "only 1 of the 2 images" in caplog.text


def test_no_segments_score_zero_and_the_reason_is_logged(register, panoptic_records, caplog):
    name = register(panoptic_records, **METADATA)
    nothing = (np.zeros_like(IDS), [])
    with caplog.at_level(logging.WARNING):
        metrics = run(COCOPanopticEvaluator(name), {1: nothing, 2: nothing})["panoptic_seg"]
    assert all(value == 0 for value in metrics.values())
    assert "PQ is 0" in caplog.text


def test_data_set_without_images_gives_nan(register, tmp_path):
    (tmp_path / "empty.json").write_text('{"annotations": []}')
    paths = {"panoptic_json": str(tmp_path / "empty.json"), "panoptic_root": str(tmp_path)}
    assert math.isnan(
        run(COCOPanopticEvaluator(register([], **METADATA, **paths)), {})["panoptic_seg"]["PQ"]
    )


def test_files_have_the_format_of_coco(register, panoptic_records, tmp_path):
    name = register(panoptic_records, **METADATA)
    run(COCOPanopticEvaluator(name, str(tmp_path / "out")), {2: (IDS, SEGMENTS)})
    written = json.loads((tmp_path / "out/predictions.json").read_text())
    (annotation,) = written["annotations"]
    assert (annotation["image_id"], annotation["file_name"]) == (2, "2.png")
    assert [(s["id"], s["category_id"]) for s in annotation["segments_info"]] == [
        (5, 20),
        (700, 10),
        (90000, 40),
    ]
    assert written["categories"] == [{"id": i, "isthing": int(i < 30)} for i in (10, 20, 30, 40)]
    png = np.array(Image.open(tmp_path / "out/panoptic_predictions/2.png"))
    np.testing.assert_array_equal(rgb2id(png), IDS)


def test_images_of_one_name_in_two_folders_have_pngs_of_their_own(
    register, panoptic_records, tmp_path
):
    for folder, record in zip("ab", panoptic_records, strict=True):
        record["file_name"] = f"{folder}/1.jpg"
    name = register(panoptic_records, **METADATA)
    predictions = {2: (np.zeros_like(IDS), []), 1: (IDS, SEGMENTS)}
    run(COCOPanopticEvaluator(name, str(tmp_path / "out")), predictions)
    written = json.loads((tmp_path / "out/predictions.json").read_text())["annotations"]
    for annotation in written:
        png = Image.open(tmp_path / "out/panoptic_predictions" / annotation["file_name"])
        ids = predictions[annotation["image_id"]][0]
        np.testing.assert_array_equal(rgb2id(np.array(png)), ids)


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        pytest.param(
            (IDS[:2], SEGMENTS[:2]),
            r"for image 1 is \(2, 4\), its ground truth .*\(3, 4\)",
            id="size",
        ),
        pytest.param(
            (IDS, SEGMENTS[:2]),
            r"image 1 is inconsistent: .* only pixels have \[90000\]",
            id="not listed",
        ),
        pytest.param(
            (IDS, [{"id": 5, "isthing": False, "category_id": 9}]),
            "image 1 has a segment of category 9 of stuff",
            id="category",
        ),
    ],
)
def test_bad_predictions_are_errors(prediction, message, register, panoptic_records):
    evaluator = COCOPanopticEvaluator(register(panoptic_records, **METADATA))
    with pytest.raises(ValueError, match=message):
        run(evaluator, {1: prediction})


def test_image_of_another_data_set_is_an_error(register, panoptic_records):
    evaluator = COCOPanopticEvaluator(register(panoptic_records, **METADATA))
    with pytest.raises(ValueError, match="image 3 was predicted, but is not in data set"):
        run(evaluator, {3: (IDS, SEGMENTS)})


def test_output_without_segments_is_an_error(register, panoptic_records):
    evaluator = COCOPanopticEvaluator(register(panoptic_records, **METADATA))
    with pytest.raises(
        ValueError,
        match=r"needs 'panoptic_seg' in the model's outputs, got the keys \['instances'\]",
    ):
        evaluator.process([{"image_id": 1}], [{"instances": None}])


def test_png_with_too_many_pixels_is_refused(register, panoptic_records):
    evaluator = COCOPanopticEvaluator(
        register(panoptic_records, **METADATA), max_image_pixels=IDS.size - 1
    )
    with pytest.raises(
        BadImageError, match=rf"truth_1.png .*{IDS.size - 1} pixels that INPUT.MAX_IMAGE_PIXELS"
    ):
        run(evaluator, {1: (IDS, SEGMENTS)})


def test_missing_png_is_an_error(register, panoptic_records):
    panoptic_records[0]["pan_seg_file_name"] = "/nowhere/truth.png"
    evaluator = COCOPanopticEvaluator(register(panoptic_records, **METADATA))
    with pytest.raises(FileNotFoundError, match="/nowhere/truth.png"):
        run(evaluator, {1: (IDS, SEGMENTS)})


@pytest.mark.parametrize(
    "missing", ["thing_dataset_id_to_contiguous_id", "stuff_dataset_id_to_contiguous_id"]
)
def test_data_set_that_does_not_tell_things_from_stuff_is_an_error(
    missing, register, panoptic_records
):
    metadata = {key: value for key, value in METADATA.items() if key != missing}
    with pytest.raises(ValueError, match=f"{missing} = "):
        COCOPanopticEvaluator(register(panoptic_records, **metadata))


def test_data_set_without_panoptic_ground_truth_is_an_error(register, make_record):
    name = register(
        [make_record(1, ([0, 0, 1, 1], 0, {"bbox_mode": BoxMode.XYXY_ABS}))], **METADATA
    )
    with pytest.raises(
        ValueError, match="has no panoptic ground truth: its records need 'pan_seg_file_name'"
    ):
        COCOPanopticEvaluator(name)


def test_segments_of_an_unknown_category_are_an_error(register, panoptic_records):
    panoptic_records[1]["segments_info"][0]["category_id"] = 2
    with pytest.raises(
        ValueError,
        match=r"image 2 \(2.jpg\) has a segment of category 2 of things, .* has \[0, 1\]",
    ):
        COCOPanopticEvaluator(register(panoptic_records, **METADATA))


def test_image_id_that_two_images_share_is_an_error(register, panoptic_records):
    panoptic_records[1]["image_id"] = 1
    with pytest.raises(ValueError, match="uses an image id twice: 2 images, 1 ids"):
        COCOPanopticEvaluator(register(panoptic_records, **METADATA))
