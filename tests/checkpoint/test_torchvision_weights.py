import hashlib
import re
import socket

import pytest
import torch
import torchvision

from detkit.checkpoint import load_checkpoint_file, torchvision_weights
from detkit.checkpoint.torchvision_weights import published_file_name, torchvision_weights_file
from detkit.checkpoint.torchvision_weights import torchvision_weights as weights_of


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """torch.hub's folder, and no network."""

    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tmp_path / "checkpoints"


@pytest.mark.parametrize(
    ("address", "weights"),
    [
        ("torchvision://resnet50", torchvision.models.ResNet50_Weights.DEFAULT),
        ("torchvision://resnet50/IMAGENET1K_V1", torchvision.models.ResNet50_Weights.IMAGENET1K_V1),
        ("torchvision://resnet50/DEFAULT", torchvision.models.ResNet50_Weights.DEFAULT),
        ("resnet18", torchvision.models.ResNet18_Weights.DEFAULT),
        (
            "torchvision://fasterrcnn_resnet50_fpn",
            torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
        ),
    ],
)
def test_addresses_name_torchvisions_weights(address, weights):
    assert weights_of(address) is weights


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("torchvision://resnet51", r"torchvision has no model 'resnet51'.*resnet"),
        (
            "torchvision://resnet50/V3",
            "resnet50 has the weights IMAGENET1K_V1, IMAGENET1K_V2, not 'V3'",
        ),
        ("torchvision://", "torchvision has no model ''"),
        ("torchvision://mnasnet0_5/x/y", r"mnasnet0_5 has the weights .* not 'x/y'"),
    ],
)
def test_unknown_addresses_are_errors(address, message):
    with pytest.raises(ValueError, match=message):
        weights_of(address)


def test_offline_names_file_and_place_and_opens_no_socket(hub, monkeypatch):
    monkeypatch.setenv("DETKIT_OFFLINE", "1")
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    name = url.rpartition("/")[2]
    with pytest.raises(
        OSError,
        match=re.escape(f"download {url} on a machine with network, and place it as {hub / name}"),
    ):
        load_checkpoint_file("torchvision://resnet18")


def test_placed_file_is_taken(hub, monkeypatch):
    monkeypatch.setenv("DETKIT_OFFLINE", "1")
    hub.mkdir()
    name = torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    torch.save({"conv1.weight": torch.ones(2)}, hub / name)
    assert torchvision_weights_file("torchvision://resnet18") == hub / name
    assert load_checkpoint_file("torchvision://resnet18")["model"]["conv1.weight"].tolist() == [
        1,
        1,
    ]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("torchvision://maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"),
        ("https://x.org/a/b.pkl", "b.pkl"),
        ("a/b.pth", "b.pth"),
    ],
)
def test_names_of_files(path, name):
    assert published_file_name(path) == name


def test_hash_in_the_name_is_checked(hub, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        torchvision_weights,
        "fetch",
        lambda url, place, sha256: asked.update(url=url, sha256=sha256) or place,
    )
    torchvision_weights_file("torchvision://resnet18")
    assert re.search(rf"-{asked['sha256']}\.pth$", asked["url"])
    assert len(asked["sha256"]) == len(hashlib.sha256().hexdigest()[:8])
