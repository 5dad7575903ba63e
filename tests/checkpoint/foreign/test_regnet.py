"""RegNets of pycls and torchvision: their files, made from random numbers, fill a detector's backbone."""

import pytest
import torch
import torchvision

from detkit.checkpoint import DetectionCheckpointer
from detkit.config import get_cfg
from detkit.modeling import build_model
from detkit.modeling.backbone import RegNet
from tests.foreign_models import randomised

Y_400MF = {"DEPTH": 16, "W_0": 48, "W_A": 27.89, "W_M": 2.09, "GROUP_WIDTH": 8, "SE_RATIO": 0.25}


@pytest.fixture
def detector():
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE = "cpu", "ProposalNetwork"
    cfg.MODEL.BACKBONE.NAME = "build_regnet_fpn_backbone"
    cfg.MODEL.REGNET.update(Y_400MF)
    cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.REGNET.OUT_FEATURES
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.PIXEL_STD = [57.375, 57.12, 58.395]
    return build_model(cfg).eval()


def check_backbone(checkpointer, model, unexpected):
    report = checkpointer.load_report
    ours = {name for name in model.state_dict() if ".bottom_up." in name}
    assert ours <= set(report.matched)
    assert not any(".bottom_up." in name for name in report.missing)
    assert set(report.unexpected) == unexpected


def test_file_of_pycls_fills_the_backbone(detector, tmp_path, caplog):
    arguments = {key.lower(): value for key, value in Y_400MF.items()}
    alone = randomised(RegNet(**arguments, out_features=["s4"])).eval()
    weights = {**alone.state_dict(), "head.fc.weight": torch.zeros(9, 440)}
    path = tmp_path / "RegNetY.pyth"
    torch.save({"epoch": 99, "model_state": weights, "cfg": "MODEL: {}"}, path)
    checkpointer = DetectionCheckpointer(detector)
    checkpointer.load(str(path))
    check_backbone(checkpointer, detector, {"head.fc.weight"})
    assert checkpointer.load_report.layout == "pycls' RegNet"
    assert "expect other pixels" not in caplog.text
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found, expected = detector.backbone.bottom_up(image)["s4"], alone(image)["s4"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def test_file_of_torchvision_fills_the_backbone_and_asks_for_its_pixels(detector, tmp_path, caplog):
    theirs = randomised(torchvision.models.regnet_y_400mf(weights=None)).eval()
    path = tmp_path / "regnet_y_400mf.pth"
    torch.save(theirs.state_dict(), path)
    checkpointer = DetectionCheckpointer(detector)
    checkpointer.load(str(path))
    check_backbone(checkpointer, detector, {"fc.weight", "fc.bias"})
    assert (
        "weights of torchvision's RegNet expect other pixels: set INPUT.FORMAT RGB" in caplog.text
    )
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.trunk_output(theirs.stem(image))
        found = detector.backbone.bottom_up(image)["s4"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
