"""Exported models give the numbers of the models they come from."""

import itertools
import json

import numpy as np
import pytest
import torch

from detkit.cli.command import main
from detkit.config import get_cfg
from detkit.engine import DefaultPredictor
from detkit.export.model import check_export, export_model
from detkit.model_zoo import find_config
from detkit.modeling import build_model
from detkit.utils.errors import ConfigError

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
pytest.importorskip("onnxscript", reason="needs onnxscript")

# Small, so that an export takes seconds. Two levels of few channels have all that the others have.
SMALL = [
    "MODEL.DEVICE", "cpu",
    "MODEL.WEIGHTS", "",
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 8,
    "MODEL.FPN.OUT_CHANNELS", 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 32,
    "MODEL.RPN.PRE_NMS_TOPK_TEST", 60,
    "MODEL.RPN.POST_NMS_TOPK_TEST", 40,
    "TEST.DETECTIONS_PER_IMAGE", 8,
]  # fmt: skip


def small_config(name: str, *settings, folder):
    """A config of the zoo made small, whose weights are random but spread the scores."""
    cfg = get_cfg()
    cfg.merge_from_file(find_config(name))
    cfg.merge_from_list([*SMALL, *settings])
    torch.manual_seed(0)
    model = build_model(cfg)
    for layer_name in ("objectness_logits", "cls_score", "predictor", "score_lowres"):
        # Where scores start: near 0, and with nearly equal scores order is chance.
        for name, parameter in model.named_parameters():
            if name.endswith(f"{layer_name}.weight"):
                torch.nn.init.normal_(parameter, std=2 / parameter[0].numel() ** 0.5)
    weights = folder / "weights.pth"
    torch.save({"model": model.state_dict()}, weights)
    cfg.MODEL.WEIGHTS = str(weights)
    return cfg


def noise(size, contrast=1.0, seed=0):
    """An image of smooth noise, (3, H, W) uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 8, generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")[0]
    return (127 + 255 * contrast * (image - 0.5)).clamp(0, 255).to(torch.uint8)


def eager_outputs(model, images):
    with torch.no_grad():
        return model.inference([{"image": image} for image in images], do_postprocess=False)


def as_inputs(images):
    """The inputs of an exported model; what lies beside an image is not to matter."""
    sizes = [image.shape[1:] for image in images]
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    batch = np.full((len(images), 3, height, width), 77, np.uint8)
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return {"images": batch, "image_sizes": np.array(sizes, np.int64)}


def assert_same(found, expected, boxes=5e-3, scores=2e-5):
    for i, instances in enumerate(expected):
        count = len(instances)
        assert found["num_detections"][i] == count
        rows = {name: values[i, :count] for name, values in found.items() if values.ndim > 1}
        np.testing.assert_allclose(rows["boxes"], instances.pred_boxes.tensor, rtol=0, atol=boxes)
        np.testing.assert_allclose(rows["scores"], instances.scores, rtol=0, atol=scores)
        np.testing.assert_array_equal(rows["classes"], instances.pred_classes)
        for name in set(rows) - {"sem_seg"}:
            assert not found[name][i, count:].any(), f"{name} has rows past num_detections"


class Exported:
    """A small model, and its files."""

    def __init__(self, cfg, folder, formats=("onnx",)):
        self.cfg, self.folder = cfg, folder
        predictor = DefaultPredictor(cfg)
        self.model = predictor.model
        paths = export_model(self.model, predictor.metadata, cfg, formats, folder)
        self.paths = dict(zip(formats, paths, strict=True))
        self.session = onnxruntime.InferenceSession(str(self.paths["onnx"]))
        self.names = [output.name for output in self.session.get_outputs()]

    def onnx(self, images):
        return dict(zip(self.names, self.session.run(None, as_inputs(images)), strict=True))


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def faster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faster")
    name = "quick_start/faster_rcnn_R_18_FPN_shapes.yaml"
    cfg = small_config(name, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.5, folder=folder)
    return Exported(cfg, folder)


SIZES = [(64, 96), (100, 70), (33, 129)]


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_batches_of_images_of_unlike_sizes(faster, batch):
    sizes = itertools.islice(itertools.cycle(SIZES), batch)
    images = [noise(size, seed=seed) for seed, size in enumerate(sizes)]
    expected = eager_outputs(faster.model, images)
    assert sum(map(len, expected)) > 0
    assert_same(faster.onnx(images), expected)


@pytest.mark.parametrize("count", [0, 1, 8], ids=["none", "one", "all that are allowed"])
def test_number_of_detections(faster, count):
    for seed, contrast in itertools.product(range(6), np.linspace(0, 1, 12)):
        images = [noise((64, 64), contrast, seed)]
        expected = eager_outputs(faster.model, images)
        if len(expected[0]) == count:
            break
    assert len(expected[0]) == count
    assert_same(faster.onnx(images), expected)


def test_image_smaller_than_an_anchor(faster):
    images = [noise((9, 7)), noise((1, 1))]
    assert_same(faster.onnx(images), eager_outputs(faster.model, images))


def test_file_describes_itself(faster):
    metadata = json.loads(faster.session.get_modelmeta().custom_metadata_map["detkit"])
    assert metadata["outputs"] == faster.names == ["boxes", "scores", "classes", "num_detections"]
    assert metadata["architecture"] == "GeneralizedRCNN"
    assert metadata["input"] == {"format": "BGR", "channels": 3, "dtype": "uint8"}
    assert metadata["resize"] == {"rule": "detectron2", "min_size": 128, "max_size": 192}
    assert metadata["max_detections"] == 8
    assert metadata["score_threshold"] == 0.5


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["TEST.NMS.METHOD", "linear"], "TEST.NMS.METHOD"),
        (["MODEL.LOAD_PROPOSALS", True], "MODEL.LOAD_PROPOSALS"),
        (["TEST.AUG.ENABLED", True], "TEST.AUG.ENABLED"),
    ],
)
def test_what_no_format_has_is_named(settings, named):
    cfg = get_cfg()
    cfg.merge_from_list(settings)
    with pytest.raises(ConfigError, match=named):
        check_export(cfg, ["onnx"])


def test_unknown_format(tmp_path, capsys):
    words = ["export", "--config-file", "quick_start/faster_rcnn_R_18_FPN_shapes.yaml"]
    assert main([*words, "--format", "onxx", "--output", str(tmp_path / "out")]) == 2
    assert "did you mean 'onnx'" in capsys.readouterr().err.lower()
    assert not (tmp_path / "out").exists()
