import json

import numpy as np
import pytest
from PIL import Image

from detkit.cli import main
from detkit.config import get_cfg
from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.export.evaluation import as_model, describe_model
from detkit.export.runtime import ExportedPredictor
from detkit.export.runtime.model_file import read_metadata
from detkit.structures import Boxes, BoxMode
from tests.export.runtime.fakes import BOXES, CLASSES, COUNT, metadata, outputs_of

_ALL = ["boxes", "scores", "classes", "num_detections", "masks", "sem_seg"]


@pytest.fixture
def predictor_of(monkeypatch):
    """Makes predictors of the model that `fakes` describes."""

    def make(**changes):
        read = read_metadata(json.dumps(metadata(**changes)), "m.onnx")

        def run(arrays):
            return outputs_of(arrays["images"], arrays["image_sizes"])

        monkeypatch.setattr(
            "detkit.export.runtime.predictor.open_model", lambda path, threads: (read, run)
        )
        return ExportedPredictor("m.onnx")

    return make


@pytest.fixture
def dataset(tmp_path):
    """Two images whose objects are where the model finds some."""
    name, records = "test_exported_val", []
    for number, (width, height) in enumerate([(40, 20), (80, 40)]):
        path = str(tmp_path / f"{number}.png")
        Image.new("RGB", (width, height)).save(path)
        boxes = (BOXES * [width, height, width, height])[:COUNT].tolist()
        annotations = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": int(category)}
            for box, category in zip(boxes, CLASSES[:COUNT], strict=True)
        ]
        records.append({"file_name": path, "image_id": number, "annotations": annotations})
        records[-1] |= {"width": width, "height": height}
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(thing_classes=["cat", "dog"])
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_command_scores_an_exported_model_without_a_config(predictor_of, dataset, tmp_path):
    predictor_of()
    model = str(tmp_path / "deploy" / "m.onnx")
    expected = '[["bbox", "AP", 100.0, 0.01]]'
    words = ["--model", model, "--dataset", dataset, "TEST.EXPECTED_RESULTS", expected]
    assert main(["eval", *words]) == 0
    assert (tmp_path / "deploy/eval/log.txt").is_file()
    results = json.loads(
        (tmp_path / "deploy/eval/inference/coco_instances_results.json").read_text()
    )
    assert len(results) == 4


def test_data_set_of_other_classes_is_refused(predictor_of, dataset, tmp_path, capsys):
    predictor_of(thing_classes=["cat", "horse"])
    words = ["--model", str(tmp_path / "m.onnx"), "--dataset", dataset]
    assert main(["eval", *words]) == 2
    assert "horse" in capsys.readouterr().err


def test_model_of_another_task_is_refused(predictor_of, dataset, tmp_path, capsys):
    predictor_of(
        outputs=["sem_seg"], architecture="SemanticSegmentor", stuff_classes=["sky", "sea"]
    )
    assert main(["eval", "--model", str(tmp_path / "m.onnx"), "--dataset", dataset]) == 2
    assert "is scored by objects, and the model finds none" in capsys.readouterr().err


def test_evaluation_without_data_set_says_so(predictor_of, tmp_path, capsys):
    predictor_of()
    assert main(["eval", "--model", str(tmp_path / "m.onnx"), "DATASETS.TEST", "[]"]) == 2
    assert "nothing to evaluate on" in capsys.readouterr().err


def test_config_says_what_the_model_predicts(predictor_of):
    predictor = predictor_of(outputs=_ALL, max_detections=7)
    cfg = get_cfg()
    describe_model(cfg, predictor.metadata)
    assert (cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON) == (True, False)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 7


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_outputs_are_tensors_as_a_model_gives_them(predictor_of, order):
    import torch

    panoptic = {"overlap_threshold": 0.5, "stuff_area_limit": 1, "instances_score_threshold": 0}
    image = {"format": order, "channels": 3, "dtype": "uint8"}
    model = as_model(predictor_of(outputs=_ALL, panoptic=panoptic, input=image))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 40), dtype=np.uint8)
    (found,) = model([{"image": torch.from_numpy(pixels)}])
    assert isinstance(found["instances"].pred_boxes, Boxes)
    assert found["instances"].image_size == (20, 40)
    assert found["instances"].pred_masks.shape == (2, 20, 40)
    expected = pixels[::-1].copy() if order == "RGB" else pixels  # an input of the predictor is BGR
    assert torch.equal(found["sem_seg"], torch.from_numpy(expected).float())
    segments, infos = found["panoptic_seg"]
    assert segments.shape == (20, 40)
    assert len(infos) >= COUNT
    proposals = as_model(predictor_of(outputs=["boxes", "scores", "num_detections"]))
    (found,) = proposals([{"image": torch.from_numpy(pixels)}])
    assert len(found["proposals"].proposal_boxes) == len(found["proposals"].objectness_logits) == 2
