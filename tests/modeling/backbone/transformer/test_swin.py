"""Swin transformers against torchvision's."""

import pytest
import torch
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

from detkit.config import get_cfg
from detkit.modeling import build_backbone
from detkit.modeling.backbone import SwinTransformer
from detkit.solver import layer_decay_factors

TINY = {"embed_dim": 8, "depths": [2, 2, 3, 2], "num_heads": [1, 2, 2, 4], "drop_path_rate": 0.0}


def torchvision_name(name):
    """The name that torchvision has for a tensor."""
    part = name.split(".")
    if part[0] == "patch_embed":
        return ".".join(["features.0", "0" if part[1] == "proj" else "2", part[2]])
    if part[0] == "norm3":
        return f"norm.{part[1]}"
    if part[0] != "layers":
        return None
    if part[2] == "downsample":
        return ".".join([f"features.{2 * int(part[1]) + 2}", *part[3:]])
    rest = ".".join(part[4:]).replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
    return f"features.{2 * int(part[1]) + 1}.{part[3]}.{rest}"


@pytest.mark.parametrize("size", [(128, 192), (116, 180)], ids=["whole", "padded"])
def test_features_are_those_of_torchvision(size):
    torch.manual_seed(0)
    ours = SwinTransformer(**TINY, window_size=3).eval()
    theirs = TorchvisionSwin(
        [4, 4], 8, [2, 2, 3, 2], [1, 2, 2, 4], [3, 3], stochastic_depth_prob=0.0
    ).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    weights = dict(theirs.state_dict())
    for name, tensor in ours.state_dict().items():
        their_name = torchvision_name(name)
        if their_name is not None and "index" not in name:
            assert weights[their_name].shape == tensor.shape
            weights[their_name] = tensor
    theirs.load_state_dict(weights)
    image = torch.randn(2, 3, *size)
    wanted = theirs.norm(theirs.features(image)).permute(0, 3, 1, 2)
    found = ours(image)
    assert torch.allclose(found["p3"], wanted, atol=1e-4)
    assert found["p0"].shape == (2, 8, size[0] // 4, size[1] // 4)


def test_batch_is_its_images():
    torch.manual_seed(0)
    swin = SwinTransformer(**TINY, window_size=4).eval()
    images = torch.randn(2, 3, 64, 96)
    both, first = swin(images)["p3"], swin(images[:1])["p3"]
    assert torch.allclose(both[:1], first, atol=1e-6)


@pytest.mark.parametrize(
    ("freeze_at", "frozen"),
    [
        (0, set()),
        (1, {"patch_embed"}),
        (3, {"patch_embed", "layers.0", "layers.1"}),
        (5, {"patch_embed", "layers.0", "layers.1", "layers.2", "layers.3"}),
    ],
)
def test_first_stages_are_frozen(freeze_at, frozen):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "build_swin_backbone", "MODEL.SWIN.EMBED_DIM", 24])
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    swin = build_backbone(cfg)
    found = {
        ".".join(name.split(".")[: 2 if name.startswith("layers") else 1])
        for name, parameter in swin.named_parameters()
        if not parameter.requires_grad
    }
    assert found == frozen
    swin(torch.randn(1, 3, 64, 64))["p3"].sum().backward()


def test_checkpointed_blocks_give_the_same_gradients():
    gradients = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        swin = SwinTransformer(**TINY | {"drop_path_rate": 0.3}, use_checkpoint=is_checkpointed)
        torch.manual_seed(5)
        sum(x.square().sum() for x in swin(torch.ones(2, 3, 64, 64)).values()).backward()
        gradients.append({name: p.grad for name, p in swin.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_layer_decay_counts_blocks():
    swin = SwinTransformer(**TINY)
    factors = layer_decay_factors(swin, 0.5)
    assert factors["patch_embed.proj.weight"] == 0.5**10
    assert factors["layers.0.blocks.0.attn.qkv.weight"] == 0.5**9
    assert factors["layers.0.downsample.reduction.weight"] == 0.5**8
    assert factors["layers.3.blocks.1.mlp.fc1.bias"] == 0.5
    assert "norm3.weight" not in factors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": [1, 2]}, "need a number per stage"),
        ({"num_heads": [1, 2, 5, 8]}, "num_heads must divide the channels"),
        ({"ape": True, "pretrain_img_size": 3}, "pretrain_img_size must be at least 4"),
        ({"out_indices": [4]}, r"out_indices must be of \['p0'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SwinTransformer(**{**TINY, **arguments})
