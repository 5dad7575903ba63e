"""Exported models give the numbers of the models they come from."""

import itertools
import json
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from detkit.cli.command import main
from detkit.config import get_cfg
from detkit.data import Metadata
from detkit.engine import DefaultPredictor
from detkit.export.formats import complete_files, write_formats, write_openvino
from detkit.export.graph import ExportError, exported_program
from detkit.export.model import check_export, export_model
from detkit.export.runtime import ExportedPredictor
from detkit.export.runtime.model_file import open_model
from detkit.layers import DeformConv
from detkit.modeling import (
    BACKBONE_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    Backbone,
    FastRCNNOutputLayers,
    StandardROIHeads,
)
from detkit.modeling.roi_heads import BaseMaskRCNNHead
from detkit.utils.errors import ConfigError
from tests.export.small_models import (
    BACKBONES,
    LARGE,
    MODELS,
    as_inputs,
    assert_same,
    expected_outputs,
    large_config,
    noise,
    small_config,
)


class Exported:
    """A small model, and its files."""

    def __init__(self, name, folder, formats=("onnx",), settings=(), **options):
        pytest.importorskip("onnxscript")
        cfg = large_config(name, folder) if name in LARGE else small_config(name, folder, *settings)
        self.predictor = DefaultPredictor(cfg)
        self.model = self.predictor.model
        paths = export_model(self.model, self.predictor.metadata, cfg, formats, folder, **options)
        self.paths = dict(zip(formats, paths, strict=True))
        onnxruntime = pytest.importorskip("onnxruntime")
        self.session = onnxruntime.InferenceSession(str(self.paths["onnx"]))
        self.names = [output.name for output in self.session.get_outputs()]

    def onnx(self, images):
        inputs = {name: values.numpy() for name, values in as_inputs(images).items()}
        return dict(zip(self.names, self.session.run(None, inputs), strict=True))

    def in_openvino(self, folder):
        """The same as a function of images, by way of a file in OpenVINO's format."""
        description = json.loads(self.session.get_modelmeta().custom_metadata_map["detkit"])
        _, run = open_model(write_openvino(self.paths["onnx"], description, folder))
        return lambda images: run({k: v.numpy() for k, v in as_inputs(images).items()})


@pytest.fixture(scope="module")
def faster(tmp_path_factory):
    return Exported("faster", tmp_path_factory.mktemp("faster"))


class OneConvolution(Backbone):
    size_divisibility = 16

    def __init__(self):
        super().__init__()
        self._out_features = ["res4"]
        self._out_feature_channels = {"res4": 8}
        self._out_feature_strides = {"res4": 16}
        self.conv = torch.nn.Conv2d(3, 8, 16, 16)

    def forward(self, x):
        return {"res4": self.conv(x).relu()}


@BACKBONE_REGISTRY.register()
def build_one_convolution(cfg, input_shape):
    return OneConvolution()


@ROI_BOX_HEAD_REGISTRY.register()
class NormedBoxHead(torch.nn.Module):
    def __init__(self, cfg, input_shape):
        super().__init__()
        self.norm = torch.nn.GroupNorm(2, input_shape.channels)
        self.output_shape = input_shape

    def forward(self, regions):
        return F.gelu(self.norm(regions))


@ROI_BOX_HEAD_REGISTRY.register()
class BesselBoxHead(NormedBoxHead):
    def forward(self, regions):
        return torch.special.bessel_j1(super().forward(regions))


@ROI_BOX_HEAD_REGISTRY.register()
class CountingBoxHead(NormedBoxHead):
    def forward(self, regions):
        return super().forward(regions) / len(regions)


@ROI_MASK_HEAD_REGISTRY.register()
class PlainMaskHead(BaseMaskRCNNHead):
    def __init__(self, cfg, input_shape):
        super().__init__()
        self.predictor = torch.nn.Conv2d(input_shape.channels, cfg.MODEL.ROI_HEADS.NUM_CLASSES, 1)

    def layers(self, x):
        logits = self.predictor(x.tanh())
        return 9 * (logits - logits.mean(dim=(2, 3), keepdim=True))


class CosinePredictor(FastRCNNOutputLayers):
    def forward(self, x):
        x, weight = (F.normalize(y.flatten(1), dim=1) for y in (x, self.cls_score.weight))
        return 20 * F.linear(x, weight), 30 * self.bbox_pred(x)

    def predict_probs(self, predictions, proposals):
        return [scores**1.2 for scores in super().predict_probs(predictions, proposals)]


@ROI_HEADS_REGISTRY.register()
class CosineHeads(StandardROIHeads):
    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        parts = super()._init_box_head(cfg, input_shape)
        predictor = CosinePredictor(cfg, parts["box_head"].output_shape)
        return {**parts, "box_predictor": predictor}


ONE_MAP = [
    "MODEL.BACKBONE.NAME", "build_one_convolution",
    "MODEL.ANCHOR_GENERATOR.SIZES", [[32]],
    "MODEL.RPN.IN_FEATURES", ["res4"],
    "MODEL.ROI_HEADS.IN_FEATURES", ["res4"],
    "MODEL.FCOS.IN_FEATURES", ["res4"],
    "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res4"],
    "TEST.DETECTIONS_PER_IMAGE", 3,
]  # fmt: skip
OWN_PARTS = [
    *ONE_MAP,
    "MODEL.ROI_HEADS.NAME", "CosineHeads",
    "MODEL.ROI_BOX_HEAD.NAME", "NormedBoxHead",
    "MODEL.MASK_ON", True,
    "MODEL.ROI_MASK_HEAD.NAME", "PlainMaskHead",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.6,
]  # fmt: skip
SMALLEST = {
    "panoptic of own parts": (
        "faster",
        [
            *OWN_PARTS,
            "MODEL.META_ARCHITECTURE", "PanopticFPN",
            "MODEL.SEM_SEG_HEAD.NORM", "",
            "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 16,
            "MODEL.KEYPOINT_ON", True,
            "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 1,
        ],
    ),
    "FCOS": ("FCOS", [*ONE_MAP, "MODEL.FCOS.SCORE_THRESH_TEST", 0.12]),
}  # fmt: skip
"""Name -> one of `MODELS`, and settings that make it as small as a default test can take."""


@torch.no_grad()
@pytest.mark.parametrize("name", SMALLEST)
def test_smallest_detectors_all_the_way(name, tmp_path, monkeypatch, caplog):
    """From recording to numbers, in the seconds that a default test may take."""
    programs = []

    def record(*args):
        program = exported_program(*args)
        programs.append(program.module(check_guards=False))
        return program

    monkeypatch.setattr("detkit.export.model.exported_program", record)
    base, settings = SMALLEST[name]
    exported = Exported(base, tmp_path, settings=settings)
    # Of libraries, about what a user cannot change.
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    smallest = (40, 9) if name == "FCOS" else (1, 1)  # a group norm takes no map of one pixel
    batches = [*images_in_which_are_found((0, 1, 3), exported.model), [noise(smallest)]]
    batches.append(images_of(4))
    expected = [expected_outputs(exported.model, images) for images in batches]
    for images, wanted in zip(batches, expected, strict=True):
        assert_same(exported.onnx(images), wanted)
        assert_same(programs[0](*as_inputs(images).values()), wanted)
    image = images[0].permute(1, 2, 0).numpy()
    found = ExportedPredictor(exported.paths["onnx"])(image)["instances"]
    instances = exported.predictor(image)["instances"]
    assert len(found) == len(instances) > 0
    np.testing.assert_allclose(found.pred_boxes, instances.pred_boxes.tensor, rtol=0, atol=5e-3)
    np.testing.assert_allclose(found.scores, instances.scores, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(found.pred_classes, instances.pred_classes)
    pytest.importorskip("openvino", reason="onnx and torch_export pass; needs openvino")
    run = exported.in_openvino(tmp_path)
    for images, wanted in zip(batches, expected, strict=True):
        assert_same(run(images), wanted, boxes=0.05, scores=1e-3)


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


def two_detections(scores=(0.5, 0.5 - 1e-6), classes=(1, 2)):
    boxes = np.array([[0, 0, 9, 9], [20, 20, 30, 30]], np.float32)
    return {"boxes": boxes, "scores": np.array(scores, np.float32), "classes": np.array(classes)}


def as_found(detections, order):
    found = {name: values[None, order] for name, values in detections.items()}
    return {**found, "num_detections": np.array([2])}


def test_only_detections_of_tied_scores_may_change_places():
    tied, apart = two_detections(), two_detections(scores=(0.5, 0.4))
    assert_same(as_found(tied, [0, 1]), [tied])
    assert_same(as_found(tied, [1, 0]), [tied])
    for wrong, order in ((apart, [1, 0]), (tied, [0, 0]), (tied, [1, 1])):
        with pytest.raises(AssertionError):
            assert_same(as_found(wrong, order), [wrong])
    with pytest.raises(AssertionError):
        assert_same(as_found(two_detections(classes=(2, 1)), [1, 0]), [tied])


def varied_batches(smallest=(9, 7), scale=1, least=0.0):
    """Twenty images of three sizes in batches of 1 to 4, with much or little in them, and a small one.

    Args:
        smallest: Size of the small one.
        scale: Of the other sizes.
        least: Contrast of each fourth image; at 0 there is nothing in it.
    """
    seeds = itertools.count()
    for count in (1, 2, 3, 4, 4, 3, 2, 1):
        yield [
            noise(
                [scale * side for side in SIZES[seed % 3]], (1.0, 0.6, 0.1, least)[seed % 4], seed
            )
            for seed in itertools.islice(seeds, count)
        ]
    yield [noise(smallest)]


def images_in_which_are_found(counts, model):
    """Batches of one image, in which the model finds these numbers of objects."""
    counts = set(counts)
    for contrast, seed in itertools.product(np.linspace(0, 1, 41), range(3)):
        images = [noise((64, 64), contrast, seed)]
        count = len(expected_outputs(model, images)[0]["scores"])
        if count in counts:
            counts.remove(count)
            yield images
    assert not counts


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, *LARGE])
def test_every_architecture(name, tmp_path):
    pytest.importorskip("openvino")
    exported = Exported(name, tmp_path, ["onnx", "torch_export"])
    program = torch.export.load(exported.paths["torch_export"]).module(check_guards=False)
    if name == "deformable":
        with pytest.raises(ExportError, match=r"^backbone\.bottom_up\.res5\..* DeformConv"):
            write_openvino(exported.paths["onnx"], {"precision": "float32"}, tmp_path)
        run_openvino = None
    else:
        run_openvino = exported.in_openvino(tmp_path)
    num_found = 0
    # A group norm takes no map of one pixel.
    smallest = (9, 7) if name not in ("panoptic", "semantic", "FCOS") else (40, 9)
    batches = [*varied_batches(smallest, scale=2 if name in LARGE else 1)]
    if name not in ("semantic", "proposals", *LARGE):
        most = exported.predictor.cfg.TEST.DETECTIONS_PER_IMAGE
        batches += images_in_which_are_found((0, 1, most), exported.model)
    for images in batches:
        expected = expected_outputs(exported.model, images)
        num_found += sum(len(wanted["scores"]) for wanted in expected if "scores" in wanted)
        inputs = as_inputs(images)
        assert_same(exported.onnx(images), expected)
        assert_same(program(*inputs.values()), expected)
        if run_openvino is not None:
            assert_same(run_openvino(images), expected, boxes=0.05, scores=1e-3)
    assert num_found > 20 or name == "semantic"


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone(name, tmp_path):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    exported = Exported(name, tmp_path)
    num_found = 0
    # All cells of an empty image are alike to a backbone of few layers, so that chance puts their
    # regions in order: the eager ConvNeXt of timm finds others in float64, 85 pixels away.
    for images in varied_batches(least=0.05):
        expected = expected_outputs(exported.model, images)
        num_found += sum(len(wanted["scores"]) for wanted in expected)
        assert_same(exported.onnx(images), expected)
    assert num_found > 20


@torch.no_grad()
@pytest.mark.slow
def test_several_formats_of_one_export(tmp_path):
    pytest.importorskip("openvino")
    exported = Exported("faster", tmp_path, ["openvino", "onnx", "torch_export"])
    names = ["model.bin", "model.onnx", "model.pt2", "model.xml", "weights.pth"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    program = torch.export.load(exported.paths["torch_export"]).module(check_guards=False)
    _, run = open_model(exported.paths["openvino"])
    for images in (images_of(3), [noise((64, 64), 0.0)]):
        expected = expected_outputs(exported.model, images)
        inputs = as_inputs(images)
        assert_same(exported.onnx(images), expected)
        assert_same(program(*inputs.values()), expected)
        arrays = {name: values.numpy() for name, values in inputs.items()}
        assert_same(run(arrays), expected, boxes=0.05, scores=1e-3)


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
        (["MODEL.ROTATED_BOXES", True], "MODEL.ROTATED_BOXES"),
        (["MODEL.LOAD_PROPOSALS", True], "MODEL.LOAD_PROPOSALS"),
        (["TEST.AUG.ENABLED", True], "TEST.AUG.ENABLED"),
    ],
)
def test_what_no_format_has_is_named(settings, named):
    cfg = get_cfg()
    cfg.merge_from_list(settings)
    with pytest.raises(ConfigError, match=named):
        check_export(cfg, ["onnx"])


def test_model_of_more_objects_than_the_runtime_takes_is_not_written(tmp_path, monkeypatch):
    cfg = get_cfg()
    cfg.TEST.DETECTIONS_PER_IMAGE = 10_001
    message = r"^TEST\.DETECTIONS_PER_IMAGE 10001: an exported model returns at most 10000"
    with pytest.raises(ConfigError, match=message):
        export_model(torch.nn.Identity(), Metadata(name="none"), cfg, [], tmp_path / "out")
    assert not (tmp_path / "out").exists()

    def no_graph(*args):
        raise ExportError("the check lets it pass")

    monkeypatch.setattr("detkit.export.model.DetectorGraph", no_graph)
    cfg.TEST.DETECTIONS_PER_IMAGE = 10_000
    with pytest.raises(ExportError, match="lets it pass"):
        export_model(torch.nn.Identity(), Metadata(name="none"), cfg, [], tmp_path / "out")


def test_unknown_format(tmp_path, capsys):
    words = ["export", "--config-file", "quick_start/faster_rcnn_R_18_FPN_shapes.yaml"]
    assert main([*words, "--format", "onxx", "--output", str(tmp_path / "out")]) == 2
    assert "did you mean 'onnx'" in capsys.readouterr().err.lower()
    assert not (tmp_path / "out").exists()


def test_interrupted_export_leaves_what_was_there(tmp_path):
    (tmp_path / "model.onnx").write_text("old")

    def interrupted():
        with complete_files(tmp_path) as scratch:
            (scratch / "model.onnx").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "old"
    with complete_files(tmp_path) as scratch:
        (scratch / "model.onnx").write_text("new")
    assert (tmp_path / "model.onnx").read_text() == "new"


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
@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("BesselBoxHead", r"^roi_heads\.box_head: ONNX has no .* prims\.bessel_j1$"),
        (
            "CountingBoxHead",
            r"^roi_heads\.box_head \(CountingBoxHead\) .*write x\.shape\[0\] for len\(x\)"
            r" \(.*test_model\.py:\d+: return .* / len\(regions\)\)$",
        ),
    ],
)
def test_own_head_that_cannot_be_exported_is_named(head, message, tmp_path, capfd):
    pytest.importorskip("onnxscript")
    cfg = small_config("faster", tmp_path, *OWN_PARTS, "MODEL.ROI_BOX_HEAD.NAME", head)
    predictor = DefaultPredictor(cfg)
    with pytest.raises(ExportError, match=message):
        export_model(predictor.model, predictor.metadata, cfg, ["onnx"], tmp_path / "out")
    assert "def forward" not in capfd.readouterr().err
    assert not list((tmp_path / "out").iterdir())


class Bessel(torch.nn.Module):
    def forward(self, x):
        return torch.special.bessel_j1(x)


class GraphOf(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.model = torch.nn.ModuleDict({"backbone": torch.nn.Sequential(layer)})

    def forward(self, images, image_sizes):
        return self.model["backbone"](images)


def test_operator_that_the_format_lacks_is_named(tmp_path):
    pytest.importorskip("onnxscript")
    inputs = (torch.zeros(2, 3), torch.zeros(2))
    program = torch.export.export(GraphOf(Bessel()), inputs, strict=False)
    with pytest.raises(ExportError, match=r"^backbone\.0: ONNX has no .* prims\.bessel_j1$"):
        write_formats(program, {"outputs": ["boxes"]}, ["onnx"], tmp_path)
    assert not list(tmp_path.iterdir())


class Deformable(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = DeformConv(3, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x, x.new_zeros(1, 18, 8, 8))


def test_openvino_resizes_as_torch_does(tmp_path):
    pytest.importorskip("onnxscript")
    openvino = pytest.importorskip("openvino")
    cases = [
        {"mode": mode, "antialias": antialias}
        for mode in ("bilinear", "bicubic")
        for antialias in (True, False)
    ]

    class Resizes(torch.nn.Module):
        def forward(self, x):
            return [F.interpolate(x, size=(5, 30), **case) for case in cases]

    x = torch.randn(1, 2, 14, 14, generator=torch.Generator().manual_seed(0))
    torch.onnx.export(Resizes().eval(), (x,), tmp_path / "resize.onnx", dynamo=True, verbose=False)
    path = write_openvino(tmp_path / "resize.onnx", {"precision": "float32"}, tmp_path)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled([x.numpy()])
    for i, (case, expected) in enumerate(zip(cases, Resizes()(x), strict=True)):
        np.testing.assert_allclose(found[i], expected, rtol=0, atol=1e-5, err_msg=str(case))


def test_operator_that_openvino_lacks_is_named(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    inputs = (torch.zeros(1, 3, 8, 8), torch.zeros(1, 2))
    program = torch.export.export(GraphOf(Deformable()), inputs, strict=False)
    named = r"^backbone\.0\.conv: OpenVINO .* DeformConv \(MODEL\.RESNETS\.DEFORM_ON_PER_STAGE\)"
    root = logging.getLogger()
    before = root.level, list(root.handlers), list(root.filters)
    with pytest.raises(ExportError, match=named):
        write_formats(program, {"outputs": ["boxes"]}, ["openvino"], tmp_path)
    # OpenVINO sets up the root logger, which later warnings of all packages go through.
    assert (root.level, root.handlers, root.filters) == before
    assert not list(tmp_path.iterdir())
