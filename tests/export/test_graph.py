"""The graph of a model, run as it is: one list element for the whole batch gives what lists over images give."""

import pytest
import torch

from detkit.checkpoint import DetectionCheckpointer
from detkit.export.graph import (
    DetectorGraph,
    ExportError,
    RecordingError,
    _check_sizes,
    _Features,
    _recorded,
)
from detkit.layers import Conv2d
from detkit.modeling import (
    FCOS,
    GeneralizedRCNN,
    PanopticFPN,
    ProposalNetwork,
    RetinaNet,
    SemanticSegmentor,
    build_model,
)
from detkit.modeling.backbone import Backbone
from tests.export.small_models import (
    MODELS,
    as_inputs,
    assert_same,
    expected_outputs,
    noise,
    small_config,
)

SIZES = [(64, 96), (100, 70), (33, 129)]
TRANSFORMERS = ["ViT", "Swin", "MViT"]


def small_model(name, folder, *settings):
    cfg = small_config(name, folder, *settings)
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    most = 40 if isinstance(model, ProposalNetwork) else cfg.TEST.DETECTIONS_PER_IMAGE
    return model, most


@torch.no_grad()
@pytest.mark.parametrize("name", [*MODELS, *TRANSFORMERS])
def test_batch_of_images_of_unlike_sizes(name, tmp_path):
    model, most = small_model(name, tmp_path)
    graph = DetectorGraph(model, most)
    # A group norm takes no map of one pixel.
    smallest = (9, 7) if name not in ("panoptic", "semantic", "FCOS") else (40, 9)
    for images in ([noise(size, seed=i) for i, size in enumerate(SIZES)], [noise(smallest)]):
        expected = expected_outputs(model, images)
        if len(images) > 1 and "scores" in expected[0]:
            assert sum(len(wanted["scores"]) for wanted in expected) > 0
        assert_same(graph(**as_inputs(images)), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in [*MODELS, *TRANSFORMERS] if name != "semantic"])
def test_number_of_detections(name, tmp_path):
    """None, one, and as many as are allowed, by a limit that is set between those of objects."""
    model, most = small_model(name, tmp_path)
    graph = DetectorGraph(model, most)
    limit, high, size = "test_score_thresh", 1.0, (64, 96)
    if name == "proposals":
        # In a small image, the largest all have its size.
        limit, high, size = "min_box_size", 500.0, (300, 400)
    holders = [x for part in (model, graph) for x in part.modules() if hasattr(x, limit)]
    images = [noise(size)]

    def expected_at(value):
        for holder in holders:
            setattr(holder, limit, value)
        return expected_outputs(model, images)

    low, counts = 0.0, set()
    for value in (high, low):
        expected = expected_at(value)
        assert_same(graph(**as_inputs(images)), expected)
        counts.add(len(expected[0]["scores"]))
    while 1 not in counts:
        middle = (low + high) / 2
        assert low < middle < high
        expected = expected_at(middle)
        counts.add(len(expected[0]["scores"]))
        low, high = (middle, high) if len(expected[0]["scores"]) > 1 else (low, middle)
    assert_same(graph(**as_inputs(images)), expected)
    assert {0, 1, most} <= counts


@torch.no_grad()
def test_pasted_masks(tmp_path):
    model, most = small_model("C4 with masks", tmp_path)
    images = [noise(size, seed=i) for i, size in enumerate(SIZES)]
    found = DetectorGraph(model, most, paste=True)(**as_inputs(images))
    assert found["masks"].dtype == torch.bool
    assert_same(found, expected_outputs(model, images, paste=True))


def test_norms_are_folded(tmp_path):
    model, most = small_model("faster", tmp_path)
    graph = DetectorGraph(model, most)
    assert any(isinstance(x, torch.nn.BatchNorm2d) for x in model.modules())
    assert not any(isinstance(x, torch.nn.BatchNorm2d) for x in graph.modules())
    assert all(x.norm is None for x in graph.modules() if isinstance(x, Conv2d))


@pytest.mark.parametrize(
    ("base", "step"),
    [
        (GeneralizedRCNN, "inference"),
        (GeneralizedRCNN, "forward"),
        (GeneralizedRCNN, "_postprocess"),
        (ProposalNetwork, "inference"),
        (PanopticFPN, "inference"),
        (SemanticSegmentor, "preprocess_image"),
        (RetinaNet, "inference"),
        (FCOS, "_decode_per_level_predictions"),
    ],
)
def test_step_of_a_users_own_that_a_graph_would_leave_out_is_named(base, step):
    model = object.__new__(type("Own", (base,), {step: lambda *_: None}))
    with pytest.raises(ExportError, match=rf"^Own\.{step} is not called in an exported graph"):
        DetectorGraph(model, 8)


def test_model_of_an_unknown_kind_is_refused():
    with pytest.raises(ExportError, match="^Linear cannot be exported: it must be one of Gener"):
        DetectorGraph(torch.nn.Linear(1, 1), 8)


class Branching(Backbone):
    """Computes otherwise for maps of more than 5 rows."""

    factor = 2

    def __init__(self):
        super().__init__()
        self._out_features = ["res4"]
        self._out_feature_channels = {"res4": 8}
        self._out_feature_strides = {"res4": 16}
        self.conv = torch.nn.Conv2d(3, 8, 16, 16)

    @property
    def size_divisibility(self):
        return 16

    def forward(self, x):
        x = self.conv(x)
        return {"res4": x * self.factor if x.shape[2] > 5 else x}


@pytest.mark.parametrize("factor", [2, 1])
def test_backbone_that_depends_on_the_size_is_refused_if_its_maps_differ(
    factor, tmp_path, monkeypatch
):
    model, most = small_model("faster", tmp_path)
    model.backbone = Branching()
    monkeypatch.setattr(Branching, "factor", factor)
    graph = DetectorGraph(model, most)
    features = _Features(graph)
    with torch.no_grad():
        with pytest.raises(RecordingError, match="Constraints violated"):
            _recorded(features, graph, torch.uint8)
        program = _recorded(features, graph, torch.uint8, is_proven=False)
        if factor == 1:
            _check_sizes(features, program, torch.uint8)
            return
        with pytest.raises(
            ExportError, match=r"backbone \(Branching\).* 9 x 7.*MODEL\.FPN\.SQUARE"
        ):
            _check_sizes(features, program, torch.uint8)
