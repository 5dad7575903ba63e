import gzip
import json
import pickle
from pathlib import Path

import torch

from detkit.checkpoint import DetectionCheckpointer
from detkit.checkpoint.foreign.translate import (
    places_by_suffix,
    translate,
    translate_for,
    translate_for_file,
)
from detkit.config import get_cfg
from detkit.layers import ShapeSpec
from detkit.modeling.backbone import build_resnet_backbone
from tests.foreign_models import as_detectron_blobs, randomised

GOLDEN = Path(__file__).parents[2] / "golden"
MODELS = json.loads(gzip.decompress((GOLDEN / "state_dicts.json.gz").read_bytes()))


def zoo_weights(model):
    """Weights with the names and shapes of a model of Detectron2's zoo, each with numbers of its own."""
    keys = MODELS[model]["keys"]
    return {
        name: torch.tensor(float(i)).expand(shape) for i, (name, shape) in enumerate(keys.items())
    }


def small_resnet(depth):
    cfg = get_cfg()
    resnets = cfg.MODEL.RESNETS
    resnets.DEPTH, resnets.OUT_FEATURES = depth, ["res2", "res5"]
    resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS, resnets.WIDTH_PER_GROUP = (
        8,
        16,
        8 if depth >= 50 else 64,
    )
    return randomised(build_resnet_backbone(cfg, ShapeSpec(channels=3)))


def test_own_weights_are_left_alone():
    state = zoo_weights("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    assert translate(state) is None
    assert translate_for(state, state) is None


def test_bare_resnet_finds_its_place_below_a_pyramid():
    model = zoo_weights("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    bottom_up = {
        n.removeprefix("backbone.bottom_up."): v for n, v in model.items() if ".bottom_up." in n
    }
    translation = translate_for(bottom_up, model)
    assert all(
        translation.weights[f"backbone.bottom_up.{name}"] is value
        for name, value in bottom_up.items()
    )
    assert translation.renamed["stem.conv1.weight"] == "backbone.bottom_up.stem.conv1.weight"


def test_bare_resnet_is_shared_out_between_backbone_and_heads():
    names = zoo_weights("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml")
    places = places_by_suffix(
        ["stem.conv1.weight", "res4.0.conv1.weight", "res5.0.conv1.weight", "fc.weight"], names
    )
    assert places == {
        "stem.conv1.weight": "backbone.stem.conv1.weight",
        "res4.0.conv1.weight": "backbone.res4.0.conv1.weight",
        "res5.0.conv1.weight": "roi_heads.res5.0.conv1.weight",
    }


def test_of_several_places_the_one_that_takes_most_wins():
    names = ["a.conv.weight", "a.conv.bias", "b.conv.weight"]
    assert places_by_suffix(["conv.weight", "conv.bias"], names) == {
        "conv.weight": "a.conv.weight",
        "conv.bias": "a.conv.bias",
    }


def test_exact_name_is_its_own_place():
    assert places_by_suffix(["conv.weight"], ["x.conv.weight", "conv.weight"]) == {
        "conv.weight": "conv.weight"
    }


def test_ends_of_names_count_whole_parts_only():
    assert places_by_suffix(["conv.weight"], ["my_conv.weight"]) == {}


def test_matching_heuristics_place_unknown_names_by_their_ends(tmp_path):
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(2, 2)})
    weights = {"weight": torch.ones(2, 2).numpy(), "bias": torch.zeros(2).numpy()}
    path = tmp_path / "w.pkl"
    path.write_bytes(
        pickle.dumps({"model": weights, "__author__": "x", "matching_heuristics": True})
    )
    assert DetectionCheckpointer(model).load(str(path), strict=True) == {"__author__": "x"}
    assert torch.equal(model["body"].weight, torch.ones(2, 2))


def test_report_names_layout_and_translations(tmp_path, caplog):
    source, model = small_resnet(50), small_resnet(50)
    path = tmp_path / "R-50.pkl"
    weights = {
        name: value.numpy() for name, value in as_detectron_blobs(source.state_dict()).items()
    }
    weights["fc1000_w"] = torch.ones(3, 128).numpy()
    path.write_bytes(pickle.dumps({"model": weights, "matching_heuristics": True}))
    checkpointer = DetectionCheckpointer(model)
    with caplog.at_level("INFO", logger="detkit"):
        checkpointer.load(str(path), strict=True)
    report = checkpointer.load_report
    assert report.layout == "Caffe2"
    assert report.renamed["res2_0_branch2a_w"] == "res2.0.conv1.weight"
    assert report.renamed["res_conv1_bn_s"] == "stem.conv1.norm.weight"
    assert report.unexpected == ("linear.weight",)
    assert f"recognised Caffe2, {len(report.renamed)} names translated" in caplog.text
    assert all(
        torch.equal(a, b)
        for a, b in zip(source.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_model_of_the_same_parts_takes_the_names_as_they_are():
    theirs = {"conv1.weight": torch.ones(1), "layer1.0.conv1.weight": torch.ones(1)}
    model = {f"backbone.bottom_up.body.{name}": value for name, value in theirs.items()}
    assert set(translate_for(theirs, model).weights) == set(model)
    assert translate_for(model, model) is None
    wrapped = {
        f"backbone.{name}": value for name, value in theirs.items()
    }  # which MMDetection's are called, too
    assert translate_for(wrapped, wrapped) is None


def test_names_for_a_file_are_those_of_the_whole_detector():
    weights = zoo_weights("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    translation = translate_for_file(as_detectron_blobs(weights))
    assert set(translation.weights) == set(weights)
    assert all(
        translation.weights[name].flatten()[0] == weights[name].flatten()[0] for name in weights
    )


def test_names_for_a_file_of_a_backbone_have_no_prefix():
    weights = small_resnet(18).state_dict()
    assert set(translate_for_file(weights).weights) == set(weights)


def test_nothing_is_translated_where_there_is_nothing():
    assert translate({}) is None
