import numpy as np
import pytest
import torch

from detkit.config import get_cfg
from detkit.engine import DefaultPredictor
from detkit.export.model import export_model
from detkit.export.runtime import ExportedPredictor
from detkit.export.runtime.resize import resize_bilinear
from detkit.model_zoo import find_config
from detkit.modeling import build_model

pytest.importorskip("onnxruntime", reason="needs onnxruntime")
pytest.importorskip("onnxscript", reason="needs onnxscript")


@pytest.mark.slow
def test_file_predicts_what_the_predictor_does(tmp_path):
    cfg = get_cfg()
    cfg.merge_from_file(find_config("quick_start/faster_rcnn_R_18_FPN_shapes.yaml"))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", str(tmp_path / "weights.pth")])
    cfg.merge_from_list(["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.3, "INPUT.FORMAT", "RGB"])
    cfg.merge_from_list(["MODEL.RESNETS.RES2_OUT_CHANNELS", 8, "MODEL.FPN.OUT_CHANNELS", 16])
    torch.manual_seed(0)
    model = build_model(cfg)
    for name, parameter in model.named_parameters():
        # Where scores start, nearly equal ones would come in an order of chance.
        if name.endswith(("objectness_logits.weight", "cls_score.weight")):
            torch.nn.init.normal_(parameter, std=2 / parameter[0].numel() ** 0.5)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    eager = DefaultPredictor(cfg)
    (path,) = export_model(eager.model, eager.metadata, cfg, ["onnx"], tmp_path)
    predictor = ExportedPredictor(path)
    # Larger and smaller than the model's 128 pixels, and padded beside each other.
    rng = np.random.default_rng(0)
    sizes = [(64, 96), (300, 210), (128, 128), (90, 333)]
    coarse = rng.uniform(0, 256, (4, 6, 8, 3))
    images = [
        resize_bilinear(c, size).astype(np.uint8) for c, size in zip(coarse, sizes, strict=True)
    ]
    alone = [eager(image) for image in images]
    # What an image is padded to changes what is found in it: as in the same batch of eager's.
    together = eager._run([eager._model_input(image[:, :, ::-1]) for image in images])
    _assert_same([predictor(image) for image in images], alone)
    _assert_same(predictor.predict(images), together)
    assert all(len(output["instances"]) > 1 for output in alone)


def _assert_same(found, expected):
    for output, wanted in zip(found, expected, strict=True):
        ours, theirs = output["instances"], wanted["instances"]
        assert len(ours) == len(theirs)
        np.testing.assert_allclose(ours.pred_boxes, theirs.pred_boxes.tensor, rtol=0, atol=5e-3)
        np.testing.assert_allclose(ours.scores, theirs.scores, rtol=0, atol=2e-5)
        np.testing.assert_array_equal(ours.pred_classes, theirs.pred_classes)
