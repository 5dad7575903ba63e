import pickle

import pytest
import torch

from detkit.checkpoint import load_checkpoint_file
from detkit.cli.convert_weights import main
from tests.foreign_models import as_detectron_blobs, random_torchvision_model

SMALL_CONFIG = "quick_start/faster_rcnn_R_18_FPN_shapes.yaml"


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(random_torchvision_model("resnet18", num_classes=5).state_dict(), path)
    return str(path)


def lines(capsys):
    return [line.split() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("ending", ["pth", "pkl", "safetensors"])
def test_backbone_becomes_a_file_with_short_names(resnet18, tmp_path, ending, capsys):
    if ending == "safetensors":
        pytest.importorskip("safetensors")
    out = tmp_path / f"r18.{ending}"
    assert main([resnet18, str(out)]) == 0
    theirs, ours = torch.load(resnet18), load_checkpoint_file(str(out))["model"]
    assert torch.equal(ours["stem.conv1.norm.running_var"], theirs["bn1.running_var"])
    assert torch.equal(ours["res3.0.shortcut.weight"], theirs["layer2.0.downsample.0.weight"])
    table = lines(capsys)
    assert [
        "renamed",
        "layer2.0.downsample.0.weight",
        "res3.0.shortcut.weight",
        "128x64x1x1",
    ] in table
    assert not [row for row in table if row and row[0] in ("missing", "unexpected")]


def test_comparison_with_a_model_names_what_is_missing_and_unexpected(resnet18, tmp_path, capsys):
    out = tmp_path / "r18.pth"
    width = ["MODEL.RESNETS.STEM_OUT_CHANNELS", "64", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
    assert main([resnet18, str(out), "--config-file", SMALL_CONFIG, *width]) == 1
    table = lines(capsys)
    assert ["renamed", "conv1.weight", "backbone.bottom_up.stem.conv1.weight", "64x3x7x7"] in table
    assert ["unexpected", "fc.weight", "5x512"] in table
    assert ["missing", "roi_heads.box_predictor.cls_score.weight"] in table
    assert set(load_checkpoint_file(str(out))["model"]) == {
        row[-2] for row in table if len(row) == 4
    }


def test_other_shapes_are_told(tmp_path, capsys):
    path = tmp_path / "w.pkl"
    path.write_bytes(
        pickle.dumps({"conv1_w": torch.ones(1, 3, 7, 7).numpy(), "fc6_b": torch.ones(2).numpy()})
    )
    assert main([str(path), str(tmp_path / "out.pth"), "--config-file", SMALL_CONFIG]) == 1
    table = lines(capsys)
    assert [row[:3] for row in table if row[:1] == ["other"]] == [
        ["other", "shape", "conv1_w"],
        ["other", "shape", "fc6_b"],
    ]


def test_what_has_no_counterpart_is_kept_and_told(tmp_path, capsys):
    path = tmp_path / "w.pth"
    torch.save({"conv1_w": torch.ones(1), "strange_b": torch.ones(2)}, path)
    assert main([str(path), str(tmp_path / "out.pth")]) == 0
    assert ["unexpected", "strange_b", "strange_b", "2"] in lines(capsys)


def test_class_names_travel_along(tmp_path):
    path, out = tmp_path / "w.pth", tmp_path / "out.safetensors"
    pytest.importorskip("safetensors")
    torch.save({"model": {"a.weight": torch.ones(1)}, "metadata": {"thing_classes": ["cat"]}}, path)
    assert main([str(path), str(out)]) == 0
    assert load_checkpoint_file(str(out))["metadata"] == {"thing_classes": ["cat"]}


def test_detectron_model_gets_full_names(tmp_path):
    ours = {
        "backbone.fpn_lateral2.weight": torch.ones(2),
        "backbone.bottom_up.stem.conv1.weight": torch.ones(2),
    }
    path, out = tmp_path / "w.pth", tmp_path / "out.pth"
    torch.save(as_detectron_blobs(ours), path)
    assert main([str(path), str(out)]) == 0
    assert set(load_checkpoint_file(str(out))["model"]) == set(ours)


def test_variances_take_another_eps_in(resnet18, tmp_path):
    assert main([resnet18, str(tmp_path / "out.pth"), "--frozen-bn-eps", "0.001"]) == 0
    name = "stem.conv1.norm.running_var"
    ours = load_checkpoint_file(str(tmp_path / "out.pth"))["model"][name]
    torch.testing.assert_close(ours + 1e-5, torch.load(resnet18)["bn1.running_var"] + 1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{resnet18}", "out.onnx"], "out.onnx must end with one of .pth, .safetensors, .pkl"),
        (["none.pth", "out.pth"], "no checkpoint at none.pth"),
        (["{resnet18}", "out.pth", "MODEL.MASK_ON", "True"], "settings need a --config-file"),
        (
            ["{resnet18}", "out.pth", "--config-file", SMALL_CONFIG, "MODEL.RESNETS.DEPTH", "34"],
            "another depth: ",
        ),
    ],
)
def test_mistakes_are_told(arguments, message, resnet18, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([argument.format(resnet18=resnet18) for argument in arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
