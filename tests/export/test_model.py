"""Exported models give the numbers of the models they come from."""

import itertools
import json

import numpy as np
import pytest
import torch

from detkit.cli.command import main
from detkit.config import get_cfg
from detkit.engine import DefaultPredictor
from detkit.export.graph import ExportError
from detkit.export.model import check_export, export_model
from detkit.utils.errors import ConfigError
from tests.export.small_models import (
    MODELS,
    as_inputs,
    assert_same,
    expected_outputs,
    noise,
    small_config,
)


class Exported:
    """A small model, and its files."""

    def __init__(self, name, folder, formats=("onnx",), **options):
        pytest.importorskip("onnxscript")
        cfg = small_config(name, folder)
        predictor = DefaultPredictor(cfg)
        self.model = predictor.model
        paths = export_model(self.model, predictor.metadata, cfg, formats, folder, **options)
        self.paths = dict(zip(formats, paths, strict=True))
        onnxruntime = pytest.importorskip("onnxruntime")
        self.session = onnxruntime.InferenceSession(str(self.paths["onnx"]))
        self.names = [output.name for output in self.session.get_outputs()]

    def onnx(self, images):
        inputs = {name: values.numpy() for name, values in as_inputs(images).items()}
        return dict(zip(self.names, self.session.run(None, inputs), strict=True))


@pytest.fixture(scope="module")
def faster(tmp_path_factory):
    return Exported("faster", tmp_path_factory.mktemp("faster"))


SIZES = [(64, 96), (100, 70), (33, 129)]


def images_of(batch):
    sizes = itertools.islice(itertools.cycle(SIZES), batch)
    return [noise(size, seed=seed) for seed, size in enumerate(sizes)]


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_batches_of_images_of_unlike_sizes(faster, batch):
    images = images_of(batch)
    expected = expected_outputs(faster.model, images)
    assert sum(len(wanted["scores"]) for wanted in expected) > 0
    assert_same(faster.onnx(images), expected)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1, 8], ids=["none", "one", "all that are allowed"])
def test_number_of_detections(faster, count):
    for contrast in np.linspace(0, 0.3, 10):
        images = [noise((64, 64), contrast)]
        expected = expected_outputs(faster.model, images)
        if len(expected[0]["scores"]) == count:
            break
    assert len(expected[0]["scores"]) == count
    assert_same(faster.onnx(images), expected)


@torch.no_grad()
@pytest.mark.slow
def test_image_smaller_than_an_anchor(faster):
    images = [noise((9, 7)), noise((1, 1))]
    assert_same(faster.onnx(images), expected_outputs(faster.model, images))


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name != "faster"])
def test_every_architecture(name, tmp_path):
    exported = Exported(name, tmp_path)
    for images in (images_of(1), images_of(3)):
        assert_same(exported.onnx(images), expected_outputs(exported.model, images))


@pytest.mark.slow
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


class Undecided(torch.nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x


@pytest.mark.slow
def test_module_that_cannot_be_exported_is_named(tmp_path):
    cfg = small_config("faster", tmp_path)
    predictor = DefaultPredictor(cfg)
    predictor.model.backbone.bottom_up.stem.conv1.activation = Undecided()
    with pytest.raises(
        ExportError, match=r"backbone\.bottom_up\.stem\.conv1\.activation \(Undecided\) cannot"
    ):
        export_model(predictor.model, predictor.metadata, cfg, ["onnx"], tmp_path)


@pytest.mark.slow
def test_operator_that_the_format_lacks_is_named(tmp_path):
    pytest.importorskip("onnxscript")
    cfg = small_config("faster", tmp_path)
    predictor = DefaultPredictor(cfg)
    predictor.model.roi_heads.box_head.register_forward_hook(
        lambda module, _, output: torch.special.bessel_j1(output)
    )
    with pytest.raises(ExportError, match=r"roi_heads\.box_head: ONNX has no .*bessel_j1"):
        export_model(predictor.model, predictor.metadata, cfg, ["onnx"], tmp_path)
