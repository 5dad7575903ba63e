import json

import numpy as np
import pytest
import torch
from PIL import Image

from detkit.config import get_cfg
from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.engine import prepare
from detkit.evaluation import (
    COCOEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    RotatedCOCOEvaluator,
    SemSegEvaluator,
    build_evaluator,
)
from detkit.structures import Instances
from detkit.utils.image_file import BadImageError


@pytest.mark.parametrize(
    ("metadata", "kind"),
    [
        pytest.param({}, COCOEvaluator, id="default"),
        pytest.param({"evaluator_type": "coco"}, COCOEvaluator, id="coco"),
        pytest.param(
            {"evaluator_type": "pascal_voc"}, PascalVOCDetectionEvaluator, id="pascal_voc"
        ),
        pytest.param(
            {
                "evaluator_type": "lvis",
                "class_image_count": [{"id": i, "image_count": 1} for i in (0, 1)],
            },
            LVISEvaluator,
            id="lvis",
        ),
        pytest.param(
            {"evaluator_type": "sem_seg", "stuff_classes": ["sky"]}, SemSegEvaluator, id="sem_seg"
        ),
    ],
)
def test_metadata_chooses_the_evaluator(metadata, kind, register, make_record):
    name = register([{**make_record(1), "sem_seg_file_name": "1.png"}], **metadata)
    assert type(build_evaluator(get_cfg(), name)) is kind


def test_rotated_boxes_have_their_evaluator(register, make_record):
    cfg = get_cfg()
    cfg.MODEL.ROTATED_BOXES = True
    assert type(build_evaluator(cfg, register([make_record(1)]))) is RotatedCOCOEvaluator


def test_panoptic_data_is_scored_by_pixel_by_instance_and_by_segment(
    register, make_record, tmp_path
):
    ids = {
        "thing_dataset_id_to_contiguous_id": {1: 0, 2: 1},
        "stuff_dataset_id_to_contiguous_id": {3: 1},
    }
    metadata = {"evaluator_type": "coco_panoptic_seg", "stuff_classes": ["things", "sky"], **ids}
    record = {
        **make_record(1),
        "sem_seg_file_name": "1.png",
        "pan_seg_file_name": "1.png",
        "segments_info": [],
    }
    results = build_evaluator(get_cfg(), register([record], **metadata), str(tmp_path)).evaluate()
    assert list(results) == ["sem_seg", "bbox", "panoptic_seg"]
    # Things and stuff joined: nothing but segments.
    del record["sem_seg_file_name"], record["annotations"]
    results = build_evaluator(get_cfg(), register([record], **metadata), str(tmp_path)).evaluate()
    assert list(results) == ["panoptic_seg"]


@pytest.mark.parametrize("evaluator_type", ["coco", "pascal_voc", "lvis", "coco_panoptic_seg"])
def test_data_set_is_read_once(evaluator_type, register, make_record, monkeypatch, tmp_path):
    ids = {
        "thing_dataset_id_to_contiguous_id": {1: 0, 2: 1},
        "stuff_dataset_id_to_contiguous_id": {3: 1},
    }
    counts = [{"id": 1, "image_count": 1}, {"id": 2, "image_count": 1}]
    record = {
        **make_record(1),
        "sem_seg_file_name": "1.png",
        "pan_seg_file_name": "1.png",
        "segments_info": [],
    }
    name = register(
        [record],
        evaluator_type=evaluator_type,
        stuff_classes=["sky"],
        class_image_count=counts,
        **ids,
    )
    calls, get = [], DatasetCatalog.get
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: [calls.append(name), get(name)][1])
    build_evaluator(get_cfg(), name, str(tmp_path))
    assert calls == [name]


@pytest.mark.parametrize(
    ("evaluator_type", "is_said"),
    [
        ("coco", False),
        ("coco_panoptic_seg", False),
        ("pascal_voc", True),
        ("sem_seg", True),
    ],
)
def test_thresholds_that_an_evaluator_does_not_look_at_are_named(
    evaluator_type, is_said, register, make_record, caplog
):
    cfg = get_cfg()
    cfg.merge_from_list(["TEST.IOU_THRESHOLDS", [0.5], "TEST.AREA_RANGES", [["big", 100.0, 1e9]]])
    segments = {"pan_seg_file_name": "1.png", "segments_info": []}
    record = {**make_record(1), "sem_seg_file_name": "1.png", **segments}
    ids = {
        "thing_dataset_id_to_contiguous_id": {1: 0, 2: 1},
        "stuff_dataset_id_to_contiguous_id": {3: 0},
    }
    name = register([record], evaluator_type=evaluator_type, stuff_classes=["sky"], **ids)
    build_evaluator(cfg, name)
    for key in ("IOU_THRESHOLDS", "AREA_RANGES"):
        said = f"TEST.{key} is set, but has no effect on {name!r}: {evaluator_type} has its own"
        assert (said in caplog.text) is is_said


@pytest.mark.parametrize(("limit", "ap"), [(1, 0), (-1, 50)])
def test_detections_per_image_reach_the_evaluator(register, make_record, score, limit, ap):
    cfg = get_cfg()
    cfg.TEST.DETECTIONS_PER_IMAGE = limit
    box = [0, 0, 10, 10]
    evaluator = build_evaluator(cfg, register([make_record(1, (box, 0))]))
    evaluator._output_dir = None
    assert score(evaluator, {1: [([50, 50, 60, 60], 0, 0.9), (box, 0, 0.1)]})["bbox"][
        "AP"
    ] == pytest.approx(ap)


@pytest.mark.parametrize(
    ("keys", "tasks"),
    [
        pytest.param([], ["bbox"], id="boxes"),
        pytest.param(["MODEL.MASK_ON", True], ["bbox", "segm"], id="masks"),
        pytest.param(
            ["MODEL.MASK_ON", True, "MODEL.KEYPOINT_ON", True],
            ["bbox", "segm", "keypoints"],
            id="all",
        ),
    ],
)
def test_config_chooses_the_tasks_whatever_is_predicted(
    keys, tasks, register, make_record, score, tmp_path
):
    cfg = get_cfg()
    cfg.merge_from_list([*keys, "OUTPUT_DIR", str(tmp_path)])
    assert list(score(build_evaluator(cfg, register([make_record(1)])), {1: []})) == tasks


@pytest.mark.parametrize(
    "evaluator_type", ["coco_panoptic_seg", "cityscapes_instance", "cityscapes_sem_seg"]
)
def test_limit_of_pixels_reaches_the_readers_of_pngs(evaluator_type, register, tmp_path):
    frame = tmp_path / "a" / "a_000000_000019"
    frame.parent.mkdir()
    Image.fromarray(np.zeros((3, 4, 3), np.uint8)).save(tmp_path / "truth.png")
    for kind in ("instance", "label"):
        Image.fromarray(np.zeros((3, 4), np.uint8)).save(f"{frame}_gtFine_{kind}Ids.png")
    record = {
        "file_name": "1.jpg",
        "image_id": 1,
        "segments_info": [],
        "pan_seg_file_name": f"{tmp_path}/truth.png",
    }
    metadata = {
        f"{kind}_dataset_id_to_contiguous_id": {n: 0} for n, kind in enumerate(("thing", "stuff"))
    }
    metadata |= {"thing_classes": ["car"], "stuff_classes": ["road"], "gt_dir": str(tmp_path)}
    cfg = get_cfg()
    cfg.INPUT.MAX_IMAGE_PIXELS, cfg.OUTPUT_DIR = 11, str(tmp_path / "out")
    evaluator = build_evaluator(
        cfg,
        register(
            [record], metadata.pop("thing_classes"), evaluator_type=evaluator_type, **metadata
        ),
    )
    evaluator.reset()
    output = {
        "panoptic_seg": (torch.zeros(3, 4), []),
        "instances": Instances((3, 4)),
        "sem_seg": torch.zeros(1, 3, 4),
    }
    output["instances"].pred_classes = output["instances"].scores = torch.zeros(0)
    with pytest.raises(BadImageError, match="11 pixels that INPUT.MAX_IMAGE_PIXELS"):
        evaluator.process([{"file_name": f"{frame.name}_leftImg8bit.png", "image_id": 1}], [output])


def test_settings_of_the_metric_reach_the_evaluator(register, make_record, score, tmp_path):
    cfg = get_cfg()
    settings = [
        "TEST.IOU_THRESHOLDS",
        [0.3],
        "TEST.AREA_RANGES",
        [["tiny", 0, 50]],
        "OUTPUT_DIR",
        str(tmp_path),
    ]
    cfg.merge_from_list(settings)
    metrics = score(build_evaluator(cfg, register([make_record(1)])), {1: []})["bbox"]
    assert list(metrics) == ["AP", "AP30", "AP_tiny", "AP-cat", "AP-dog"]
    cfg.TEST.AREA_RANGES = [["tiny", 50, 0]]
    with pytest.raises(ValueError, match="TEST.AREA_RANGES"):
        build_evaluator(cfg, register([make_record(1)]))


def test_spreads_of_keypoints_reach_the_evaluator(register, make_record):
    cfg = get_cfg()
    cfg.MODEL.KEYPOINT_ON = True
    name = register([make_record(1, ([0, 0, 9, 9], 0, {"keypoints": [1, 1, 2, 3, 3, 2]}))])
    with pytest.raises(
        ValueError, match="has 2 keypoints, but there are 17 .* TEST.KEYPOINT_OKS_SIGMAS"
    ):
        build_evaluator(cfg, name)
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1, 0.1]
    assert isinstance(build_evaluator(cfg, name), COCOEvaluator)


def test_results_go_below_the_output_folder_of_the_run(register, make_record, score, tmp_path):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    name = register([make_record(1)])
    cfg.DATASETS.TEST = (name,)
    score(build_evaluator(cfg, name), {1: []})
    assert (tmp_path / "inference" / "coco_instances_results.json").exists()


def test_each_of_several_data_sets_has_its_own_folder(register, make_record, score, tmp_path):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    names = [register([make_record(1)]), register([make_record(1)])]
    cfg.DATASETS.TEST = tuple(names)
    for name in names:
        score(build_evaluator(cfg, name), {1: []})
        assert (tmp_path / "inference" / name / "coco_instances_results.json").exists()


@pytest.mark.parametrize("name", ["../../../outside", "..", "a/../../b"])
def test_name_of_a_data_set_does_not_lead_out_of_the_folder(
    register, make_record, score, tmp_path, name
):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "a" / "b" / "c")
    records = [make_record(1)]
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).thing_classes = MetadataCatalog.get(register(records)).thing_classes
    try:
        cfg.DATASETS.TEST = (name, "other")
        score(build_evaluator(cfg, name), {1: []})
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    (found,) = tmp_path.rglob("coco_instances_results.json")
    assert found.parents[1] == tmp_path / "a" / "b" / "c" / "inference"


def test_data_set_that_the_config_declares_is_found_once_prepared(tmp_path):
    truth = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    cfg = get_cfg()
    entry = {"name": "declared_for_evaluation", "format": "coco", "images": str(tmp_path)}
    cfg.DATASETS.REGISTER = [{**entry, "annotations": str(tmp_path / "truth.json")}]
    with pytest.raises(KeyError, match=r"not registered.*prepare\(cfg\)"):
        build_evaluator(cfg, "declared_for_evaluation")
    try:
        prepare(cfg)
        assert isinstance(build_evaluator(cfg, "declared_for_evaluation"), COCOEvaluator)
    finally:
        DatasetCatalog.remove("declared_for_evaluation")
        MetadataCatalog.remove("declared_for_evaluation")


def test_unknown_type_is_an_error_with_near_misses(register, make_record):
    name = register([make_record(1)], evaluator_type="pascal_vox")
    with pytest.raises(
        ValueError, match=r"type 'pascal_vox'; there are 'coco', .*. Did you mean 'pascal_voc'"
    ):
        build_evaluator(get_cfg(), name)
