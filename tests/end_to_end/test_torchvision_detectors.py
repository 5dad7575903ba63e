"""The configs in configs/torchvision give the detections of torchvision's models, here ones with random weights."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from detkit.config import get_cfg
from detkit.engine import DefaultPredictor
from detkit.model_zoo import find_config
from tests.foreign_models import randomised

NUM_CLASSES = 6  # with background
SMALL = {"min_size": 160, "max_size": 240}
# Modules whose outputs are brought to a standard deviation under which some hundred boxes are left to choose from.
RCNN = {
    "rpn.head.cls_logits": 2.0,
    "rpn.head.bbox_pred": 0.3,
    "roi_heads.box_predictor.cls_score": 2.0,
    "roi_heads.box_predictor.bbox_pred": 1.0,
}
RETINANET = {"head.classification_head.cls_logits": 1.0, "head.regression_head.bbox_reg": 0.3}


def image(height=101, width=149):
    """A picture (H, W, 3) uint8 of coarse blobs."""
    coarse = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(1))
    fine = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return np.ascontiguousarray((fine[0] * 255).byte().permute(1, 2, 0).numpy())


def tuned(model, spreads):
    """Make the outputs of a random model's last layers as far apart as those of a trained one."""
    model = randomised(model).eval()
    for name, spread in spreads.items():
        module, seen = model.get_submodule(name), []
        hook = module.register_forward_hook(
            lambda _, __, output, seen=seen: seen.append(output.std().item())
        )
        with torch.no_grad():
            model([as_torchvision(image())])
            module.weight.mul_(spread / max(seen))
        hook.remove()
    return model


def as_torchvision(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def predictor(config, model, tmp_path, **settings):
    """Return detkit's model of a config with torchvision's weights, loaded as a user would."""
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    cfg = get_cfg()
    cfg.merge_from_file(find_config(f"torchvision/{config}.yaml"))
    given = {
        "MODEL.WEIGHTS": str(tmp_path / "theirs.pth"),
        "MODEL.DEVICE": "cpu",
        "INPUT.MIN_SIZE_TEST": SMALL["min_size"],
        "INPUT.MAX_SIZE_TEST": SMALL["max_size"],
        **settings,
    }
    cfg.merge_from_list([item for pair in given.items() for item in pair])
    return DefaultPredictor(cfg)


def check_detections(config, theirs, tmp_path, **settings):
    ours = predictor(config, theirs, tmp_path, **settings)
    pixels = image()
    with torch.no_grad():
        wanted = theirs([as_torchvision(pixels)])[0]
    got = ours(np.ascontiguousarray(pixels[:, :, ::-1]))["instances"]
    assert len(wanted["boxes"]) >= 20, "too few detections to say anything"
    assert len(wanted["labels"].unique()) > 1 or config.startswith("keypoint")
    assert len(got) == len(wanted["boxes"])
    # Not in the order of scores, which may be equal but for the last digit.
    same_class = got.pred_classes[:, None] + 1 == wanted["labels"]
    close_box = (got.pred_boxes.tensor[:, None] - wanted["boxes"]).abs().amax(dim=2) < 0.05
    close_score = (got.scores[:, None] - wanted["scores"]).abs() < 1e-3
    is_same = same_class & close_box & close_score
    assert is_same.any(dim=0).all(), "torchvision has detections that detkit does not have"
    assert is_same.any(dim=1).all(), "detkit has detections that torchvision does not have"
    return ours, is_same.float().argmax(dim=0), got, wanted


def test_faster_rcnn_on_a_small_backbone(tmp_path):
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d
    )
    theirs = tuned(torchvision.models.detection.FasterRCNN(backbone, NUM_CLASSES, **SMALL), RCNN)
    check_detections(
        "fasterrcnn_resnet50_fpn",
        theirs,
        tmp_path,
        **{"MODEL.RESNETS.DEPTH": 18, "MODEL.ROI_HEADS.NUM_CLASSES": NUM_CLASSES - 1},
    )


def test_faster_rcnn_with_a_threshold_on_the_scores_of_proposals(tmp_path):
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d
    )
    theirs = torchvision.models.detection.FasterRCNN(backbone, NUM_CLASSES, **SMALL)
    theirs, pixels = tuned(theirs, RCNN), [as_torchvision(image())]
    with torch.no_grad():
        every = theirs(pixels)[0]["scores"]
        theirs.rpn.score_thresh = 0.9
        assert not theirs(pixels)[0]["scores"].equal(every)
    settings = {"MODEL.RESNETS.DEPTH": 18, "MODEL.ROI_HEADS.NUM_CLASSES": NUM_CLASSES - 1}
    settings["MODEL.RPN.SCORE_THRESH"] = 0.9
    check_detections("fasterrcnn_resnet50_fpn", theirs, tmp_path, **settings)


def test_retinanet_on_a_small_backbone(tmp_path):
    extra = torchvision.ops.feature_pyramid_network.LastLevelP6P7(256, 256)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=nn.BatchNorm2d,
        returned_layers=[2, 3, 4],
        extra_blocks=extra,
    )
    sizes = tuple(
        (x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512)
    )
    anchors = torchvision.models.detection.anchor_utils.AnchorGenerator(
        sizes, ((0.5, 1.0, 2.0),) * 5
    )
    theirs = torchvision.models.detection.RetinaNet(
        backbone, NUM_CLASSES, anchor_generator=anchors, **SMALL
    )
    theirs = tuned(theirs, RETINANET)
    # No object is ever labelled as background, whose logits stay low in training.
    theirs.head.classification_head.cls_logits.bias.data.view(-1, NUM_CLASSES)[:, 0] = -100
    check_detections(
        "retinanet_resnet50_fpn",
        theirs,
        tmp_path,
        **{"MODEL.RESNETS.DEPTH": 18, "MODEL.RETINANET.NUM_CLASSES": NUM_CLASSES - 1},
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"])
def test_faster_rcnn_as_published(name, tmp_path):
    theirs = torchvision.models.get_model(name, weights=None, weights_backbone=None, **SMALL)
    check_detections(name, tuned(theirs, RCNN), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"])
def test_mask_rcnn_as_published(name, tmp_path):
    theirs = torchvision.models.get_model(name, weights=None, weights_backbone=None, **SMALL)
    theirs = tuned(theirs, RCNN)
    ours, order, got, wanted = check_detections(name, theirs, tmp_path)
    assert got.pred_masks.shape == wanted["masks"][:, 0].shape
    # Before they are pasted, which the two do differently: noise, as here, is nothing but borders.
    logits = []
    theirs.roi_heads.mask_predictor.register_forward_hook(
        lambda _, __, output: logits.append(output[:, 1:])
    )
    ours.model.roi_heads.mask_head.predictor.register_forward_hook(
        lambda _, __, output: logits.append(output[order])
    )
    with torch.no_grad():
        theirs([as_torchvision(image())])
    ours(np.ascontiguousarray(image()[:, :, ::-1]))
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-3 * logits[0].std().item())


@pytest.mark.slow
def test_keypoint_rcnn_as_published(tmp_path):
    theirs = torchvision.models.get_model(
        "keypointrcnn_resnet50_fpn", weights=None, weights_backbone=None, **SMALL
    )
    _, order, got, wanted = check_detections(
        "keypointrcnn_resnet50_fpn", tuned(theirs, RCNN), tmp_path
    )
    distances = (got.pred_keypoints[order, :, :2] - wanted["keypoints"][:, :, :2]).norm(dim=2)
    # The peak of a heat map, of random numbers here: ties between far pixels may fall either way.
    assert (distances < 1).float().mean() > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"])
def test_retinanet_as_published(name, tmp_path):
    theirs = torchvision.models.get_model(name, weights=None, weights_backbone=None, **SMALL)
    theirs = tuned(theirs, RETINANET)
    theirs.head.classification_head.cls_logits.bias.data.view(9, -1)[:, 0] = -100
    check_detections(name, theirs, tmp_path)
