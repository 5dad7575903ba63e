import re

import pytest
import torch
import torchvision

from detkit.checkpoint import CheckpointError, DetectionCheckpointer
from detkit.checkpoint.foreign import translate, translate_for
from detkit.checkpoint.foreign.torchvision import _FILES_WITHOUT_EPS
from detkit.config import get_cfg
from detkit.data import MetadataCatalog
from detkit.layers import ShapeSpec
from detkit.modeling.backbone import build_resnet_backbone
from tests.foreign_models import random_torchvision_model

STAGES = {"res2": "layer1", "res3": "layer2", "res4": "layer3", "res5": "layer4"}


def detkit_resnet(depth, groups=1, width=64, **settings):
    cfg = get_cfg()
    resnets = cfg.MODEL.RESNETS
    resnets.DEPTH, resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP = depth, groups, width
    resnets.STRIDE_IN_1X1 = False
    resnets.OUT_FEATURES = list(STAGES)
    for key, value in settings.items():
        resnets[key] = value
    return build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()


def torchvision_stages(model, images):
    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    features = {}
    for name, layer in STAGES.items():
        features[name] = x = getattr(model, layer)(x)
    return features


def saved(model, tmp_path, **extra):
    path = tmp_path / "weights.pth"
    torch.save({**model.state_dict(), **extra}, path)
    return str(path)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_norms_of_either_kind_take_the_statistics(norm, tmp_path):
    check_features("resnet18", 18, 1, 64, tmp_path, NORM=norm)


@pytest.mark.parametrize(
    ("name", "depth", "groups", "width"),
    [
        ("resnet18", 18, 1, 64),
        ("resnet34", 34, 1, 64),
        ("resnet50", 50, 1, 64),
        ("resnext50_32x4d", 50, 32, 4),
        pytest.param("resnet101", 101, 1, 64, marks=pytest.mark.slow),
        pytest.param("resnet152", 152, 1, 64, marks=pytest.mark.slow),
        pytest.param("resnext101_32x8d", 101, 32, 8, marks=pytest.mark.slow),
        pytest.param("wide_resnet50_2", 50, 1, 128, marks=pytest.mark.slow),
        pytest.param("wide_resnet101_2", 101, 1, 128, marks=pytest.mark.slow),
    ],
)
def test_features_equal_torchvisions(name, depth, groups, width, tmp_path):
    check_features(name, depth, groups, width, tmp_path)


def check_features(name, depth, groups, width, tmp_path, **settings):
    theirs, ours = random_torchvision_model(name), detkit_resnet(depth, groups, width, **settings)
    checkpointer = DetectionCheckpointer(ours)
    checkpointer.load(saved(theirs, tmp_path), strict=True)
    assert checkpointer.load_report.unexpected == ("linear.weight", "linear.bias")
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        wanted, got = torchvision_stages(theirs, images), ours(images)
    for stage, features in wanted.items():
        scale = features.abs().max()
        assert scale > 0.1, "a test on features of nothing but zeros would say nothing"
        torch.testing.assert_close(got[stage] / scale, features / scale, rtol=0, atol=1e-5)


def test_other_preparation_of_images_is_told(tmp_path, caplog):
    class Model(torch.nn.Module):
        def __init__(self, mean, std):
            super().__init__()
            self.backbone = detkit_resnet(18)
            self.register_buffer("pixel_mean", torch.tensor(mean), persistent=False)
            self.register_buffer("pixel_std", torch.tensor(std), persistent=False)

    path = saved(random_torchvision_model("resnet18"), tmp_path)
    DetectionCheckpointer(Model([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])).load(
        path, strict=True
    )
    assert "PIXEL" not in caplog.text
    DetectionCheckpointer(Model([103.53, 116.28, 123.675], [1.0, 1.0, 1.0])).load(path, strict=True)
    assert (
        "set INPUT.FORMAT RGB, MODEL.PIXEL_MEAN [123.675, 116.28, 103.53], MODEL.PIXEL_STD [58.395"
        in caplog.text
    )


def test_wrong_stride_placement_is_told(tmp_path, caplog):
    path = saved(random_torchvision_model("resnet50"), tmp_path)
    DetectionCheckpointer(detkit_resnet(50)).load(path)
    assert "STRIDE_IN_1X1" not in caplog.text
    DetectionCheckpointer(detkit_resnet(50, STRIDE_IN_1X1=True)).load(path)
    assert re.search(
        r"stride in the 3x3 convolution.*set MODEL\.RESNETS\.STRIDE_IN_1X1 False", caplog.text
    )


@pytest.mark.parametrize(("file", "model"), [("resnet18", 34), ("resnet34", 18), ("resnet34", 50)])
def test_weights_of_another_depth_are_an_error(file, model, tmp_path):
    path = saved(random_torchvision_model(file), tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"weights\.pth holds weights of a ResNet of another depth: res2 has \d",
    ):
        DetectionCheckpointer(detkit_resnet(model)).load(path)


def test_weights_of_another_depth_are_an_error_below_a_pyramid_too(tmp_path):
    path = saved(random_torchvision_model("resnet34"), tmp_path)
    model = torch.nn.ModuleDict({"bottom_up": detkit_resnet(18)})
    with pytest.raises(
        CheckpointError,
        match="another depth: bottom_up.res2 has 3 blocks of 2 .* in the file, 2 of 2",
    ):
        DetectionCheckpointer(model).load(path)


def detector_weights(num_classes=4, anchors=3):
    """A few tensors of a detector, each row with its number; with the names of the files that torchvision publishes."""

    def rows(count, *shape):
        return torch.arange(float(count)).view(-1, *[1] * len(shape)).expand(count, *shape)

    return {
        "backbone.body.conv1.weight": torch.ones(64, 3, 7, 7),
        "backbone.body.bn1.running_var": torch.full((64,), 0.5),
        "backbone.body.layer2.0.conv3.weight": torch.ones(512, 1, 1, 1),
        "backbone.fpn.inner_blocks.0.weight": torch.ones(256, 512, 1, 1),
        "backbone.fpn.layer_blocks.2.bias": torch.ones(256),
        "rpn.head.conv.weight": torch.ones(2),
        "roi_heads.box_head.fc6.weight": torch.ones(2),
        "roi_heads.box_predictor.cls_score.bias": rows(num_classes),
        "roi_heads.box_predictor.bbox_pred.weight": rows(4 * num_classes, 2),
        "roi_heads.mask_head.mask_fcn4.bias": torch.ones(2),
        "roi_heads.mask_predictor.mask_fcn_logits.weight": rows(num_classes, 2, 1, 1),
        "roi_heads.keypoint_head.14.weight": torch.ones(2),
        "head.classification_head.conv.6.weight": torch.ones(2),
        "head.classification_head.cls_logits.bias": rows(num_classes * anchors),
        "head.regression_head.bbox_reg.bias": rows(4 * anchors),
    }


def test_names_of_published_detectors():
    weights = translate(detector_weights()).weights
    assert set(weights) == {
        "stem.conv1.weight",
        "stem.conv1.norm.running_var",
        "res3.0.conv3.weight",
        "fpn_lateral3.weight",  # by its channels: a RetinaNet's pyramid begins at res3
        "fpn_output5.bias",
        "proposal_generator.rpn_head.conv.weight",
        "roi_heads.box_head.fc1.weight",
        "roi_heads.box_predictor.cls_score.bias",
        "roi_heads.box_predictor.bbox_pred.weight",
        "roi_heads.mask_head.mask_fcn4.bias",
        "roi_heads.mask_head.predictor.weight",
        "roi_heads.keypoint_head.conv_fcn8.weight",
        "head.cls_subnet.6.weight",
        "head.cls_score.bias",
        "head.bbox_pred.bias",
    }


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("rpn.head.conv.0.0.weight", "proposal_generator.rpn_head.conv.weight"),
        ("roi_heads.box_head.5.weight", "roi_heads.box_head.fc1.weight"),
        ("roi_heads.box_head.7.weight", "roi_heads.box_head.fc2.weight"),
        ("roi_heads.box_head.3.1.running_mean", "roi_heads.box_head.conv4.norm.running_mean"),
        ("roi_heads.mask_head.0.0.weight", "roi_heads.mask_head.mask_fcn1.weight"),
        ("head.regression_head.conv.2.0.weight", "head.bbox_subnet.4.weight"),
        ("backbone.fpn.inner_blocks.1.1.weight", "fpn_lateral3.norm.weight"),
        ("backbone.fpn.extra_blocks.p6.bias", "top_block.p6.bias"),
    ],
)
def test_later_names(theirs, ours):
    weights = {
        "backbone.body.conv1.weight": torch.ones(1),
        "backbone.fpn.layer_blocks.0.0.bias": torch.ones(1),
    }
    assert ours in translate({**weights, theirs: torch.ones(1)}).weights


def test_two_convolutions_of_an_rpn_are_numbered():
    weights = {f"rpn.head.conv.{i}.0.weight": torch.ones(1) for i in range(2)}
    weights |= {
        "backbone.body.conv1.weight": torch.ones(1),
        "backbone.fpn.layer_blocks.0.0.bias": torch.ones(1),
    }
    names = set(translate(weights).weights)
    assert {
        "proposal_generator.rpn_head.conv.conv0.weight",
        "proposal_generator.rpn_head.conv.conv1.weight",
    } <= names


def test_norms_of_a_retinanet_are_counted_among_its_layers():
    weights = {
        f"head.classification_head.conv.{i}.{part}.weight": torch.ones(1)
        for i in range(2)
        for part in range(2)
    }
    weights |= {
        "backbone.body.conv1.weight": torch.ones(1),
        "backbone.fpn.layer_blocks.0.0.bias": torch.ones(1),
    }
    names = set(translate(weights).weights)
    assert {f"head.cls_subnet.{i}.weight" for i in (0, 1, 3, 4)} <= names


@pytest.mark.parametrize("body", ["backbone.", "backbone.body."])
def test_detector_without_pyramid_is_translated(body):
    weights = {"rpn.head.cls_logits.bias": torch.ones(3)}
    weights |= {
        f"{body}{name}": torch.ones(1) for name in ("conv1.weight", "layer4.0.conv2.weight")
    }
    weights["roi_heads.box_predictor.cls_score.bias"] = torch.arange(3.0)
    translated = translate(weights).weights
    assert set(translated) == {
        "proposal_generator.rpn_head.objectness_logits.bias",
        "stem.conv1.weight",
        "res5.0.conv2.weight",
        "roi_heads.box_predictor.cls_score.bias",
    }
    assert translated["roi_heads.box_predictor.cls_score.bias"].tolist() == [1, 2, 0]


def test_sequence_of_the_children_of_a_resnet_is_translated():
    theirs = torch.nn.Sequential(*list(random_torchvision_model("resnet18").children())[:-2])
    weights = {f"backbone.{name}": value for name, value in theirs.state_dict().items()}
    weights["rpn.head.cls_logits.bias"] = torch.ones(3)
    ours = set(detkit_resnet(18, NORM="BN").state_dict())
    assert set(translate(weights).weights) >= ours


def test_detector_on_another_backbone_has_its_background_last():
    weights = {
        "backbone.0.0.weight": torch.ones(1),
        "rpn.head.cls_logits.bias": torch.ones(3),
        "roi_heads.box_predictor.cls_score.bias": torch.arange(3.0),
    }
    model = {
        "backbone.model.0.0.weight": 0,
        "roi_heads.box_predictor.cls_score.bias": torch.ones(3),
    }
    translation = translate_for(weights, model)
    got = translation.weights["roi_heads.box_predictor.cls_score.bias"]
    assert got.tolist() == [1, 2, 0]
    assert translation.unrecognised == ["backbone.0.0.weight"]


def test_foreign_backbone_in_the_model_and_heads_are_both_matched():
    body = {f"layer1.{i}.conv1.weight": torch.ones(1) for i in range(9)}
    weights = {f"backbone.body.{name}": value for name, value in body.items()}
    weights["rpn.head.cls_logits.bias"] = torch.ones(3)
    weights["roi_heads.box_predictor.cls_score.bias"] = torch.arange(3.0)
    head = "roi_heads.box_predictor.cls_score.bias"
    model = {f"net.backbone.body.{name}": value for name, value in body.items()}
    model |= {
        head: torch.ones(3),
        "proposal_generator.rpn_head.objectness_logits.bias": torch.ones(3),
    }
    translation = translate_for(weights, model)
    assert set(translation.weights) == set(model)
    assert translation.weights[head].tolist() == [1, 2, 0]


def test_laterals_belong_to_the_stages_whose_channels_they_take():
    weights = {"backbone.body.conv1.weight": torch.ones(1)}
    for stage, channels in ((1, 256), (2, 512), (3, 1024), (4, 2048)):
        weights[f"backbone.body.layer{stage}.0.conv3.weight"] = torch.ones(channels, 1, 1, 1)
    for index, channels in enumerate((256, 2048)):  # returned_layers=[1, 4]
        weights[f"backbone.fpn.inner_blocks.{index}.0.weight"] = torch.ones(1, channels, 1, 1)
        weights[f"backbone.fpn.layer_blocks.{index}.0.weight"] = torch.ones(1, 1, 3, 3)
    names = {name for name in translate(weights).weights if name.startswith("fpn")}
    assert names == {f"fpn_{kind}{i}.weight" for kind in ("lateral", "output") for i in (2, 5)}


@pytest.mark.parametrize(
    ("stem", "last_norm"), [("stem", "stem.7."), ("conv1", "bn1.")], ids=["mmdet", "timm"]
)
def test_bare_resnet_with_a_deep_stem_is_translated(stem, last_norm, tmp_path):
    model = detkit_resnet(50, DEEP_STEM=True)
    weights = random_torchvision_model("resnet50").state_dict()
    weights = {n: v for n, v in weights.items() if not n.startswith(("conv1.", "bn1."))}
    for number, (conv, norm) in enumerate(((0, 1), (3, 4), (6, 7)), start=1):
        ours = getattr(model.stem, f"conv{number}")
        weights[f"{stem}.{conv}.weight"] = torch.full_like(ours.weight, number)
        prefix = last_norm if number == 3 else f"{stem}.{norm}."
        for name, value in ours.norm.state_dict().items():
            weights[prefix + name] = torch.full_like(value, number)
    torch.save(weights, tmp_path / "w.pth")
    DetectionCheckpointer(model).load(str(tmp_path / "w.pth"), strict=True)
    for number in (1, 2, 3):
        conv = getattr(model.stem, f"conv{number}")
        assert conv.weight.unique().tolist() == conv.norm.bias.unique().tolist() == [number]


def test_background_goes_to_its_place_or_away():
    weights = translate(detector_weights()).weights
    assert weights["roi_heads.box_predictor.cls_score.bias"].tolist() == [1, 2, 3, 0]
    assert weights["roi_heads.box_predictor.bbox_pred.weight"][:, 0].tolist() == list(range(4, 16))
    assert weights["roi_heads.mask_head.predictor.weight"].flatten(1)[:, 0].tolist() == [1, 2, 3]
    assert weights["head.cls_score.bias"].tolist() == [1, 2, 3, 5, 6, 7, 9, 10, 11]


@pytest.mark.parametrize(
    "model",
    [
        {"roi_heads.box_predictor.cls_score.bias": torch.ones(81)},
        {"head.cls_score.bias": torch.ones(240), "head.bbox_pred.bias": torch.ones(12)},
    ],
)
def test_category_ids_of_coco_become_its_80_classes(model):
    file = detector_weights(91)
    if "head.cls_score.bias" in model:
        file = {name: value for name, value in file.items() if "box_predictor" not in name}
    else:
        file = {name: value for name, value in file.items() if not name.startswith("head.")}
    translation = translate_for(file, model)
    ids = list(MetadataCatalog.get("coco_2017_val").thing_dataset_id_to_contiguous_id)
    assert "kept the 80 of COCO's 90" in translation.remarks[-1]
    if "head.cls_score.bias" in model:
        assert translation.weights["head.cls_score.bias"].view(3, 80).tolist() == [
            [91 * a + i for i in ids] for a in range(3)
        ]
    else:
        assert translation.weights["roi_heads.box_predictor.cls_score.bias"].tolist() == [*ids, 0]
        assert translation.weights["roi_heads.box_predictor.bbox_pred.weight"][::4, 0].tolist() == [
            4 * i for i in ids
        ]
        assert (
            translation.weights["roi_heads.mask_head.predictor.weight"].flatten(1)[:, 0].tolist()
            == ids
        )


def test_published_files_have_no_eps_and_names_of_classes():
    translation = translate(detector_weights(91), "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth")
    variance = translation.weights["stem.conv1.norm.running_var"]
    torch.testing.assert_close(variance + 1e-5, torch.full((64,), 0.5), rtol=1e-7, atol=0)
    assert translation.class_names[:2] == ["person", "bicycle"]
    assert len(translation.class_names) == 90
    assert translate(detector_weights(91), "mine.pth").class_names is None
    assert (
        translate(detector_weights(91), "mine.pth").weights["stem.conv1.norm.running_var"][0] == 0.5
    )


def test_files_without_eps_are_those_for_which_torchvision_sets_it_to_zero():
    published = {
        weights.url.rpartition("/")[2]: weights
        for model in ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet")
        for weights in torchvision.models.get_model_weights(f"{model}_resnet50_fpn")
    }
    assert set(published) == set(_FILES_WITHOUT_EPS)


def test_class_names_of_a_file_reach_the_predictor(tmp_path):
    path = tmp_path / "keypointrcnn_resnet50_fpn_coco-fc266e95.pth"
    torch.save(
        {
            "backbone.body.conv1.weight": torch.ones(1),
            "backbone.fpn.layer_blocks.0.bias": torch.ones(1),
        },
        path,
    )
    model = torch.nn.Module()
    model.fpn_output2 = torch.nn.Module()
    model.fpn_output2.bias = torch.nn.Parameter(torch.zeros(1))
    assert DetectionCheckpointer(model).load(str(path)) == {
        "metadata": {"thing_classes": ["person"]}
    }
