"""Plain transformers of timm as backbones."""

import pytest
import torch
import torch.nn.functional as F

from detkit.config import get_cfg
from detkit.modeling import build_backbone, follow_backbone_pixels
from detkit.modeling.backbone import TimmViT
from detkit.solver import layer_decay_factors

timm = pytest.importorskip("timm")

FAMILIES = [
    pytest.param("vit_tiny_patch16_224", id="class token"),
    pytest.param("vit_small_patch14_reg4_dinov2", id="register tokens, patches of 14"),
    pytest.param("vit_small_patch16_dinov3", id="rotary positions, registers"),
    pytest.param("eva02_tiny_patch14_224", id="rotary and learnt positions"),
    pytest.param("vit_base_patch16_siglip_224", id="no class token", marks=pytest.mark.slow),
    pytest.param("vit_small_patch16_rope_224", id="rotary", marks=pytest.mark.slow),
]


def configured(name, *settings):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "build_timm_vit_fpn_backbone"])
    cfg.merge_from_list(["MODEL.TIMM.NAME", name, "MODEL.FPN.OUT_CHANNELS", 8, *settings])
    follow_backbone_pixels(cfg)
    return cfg


@pytest.mark.parametrize("name", FAMILIES)
def test_map_is_timms_own_at_two_sizes(name):
    torch.manual_seed(0)
    backbone = TimmViT(name=name).eval()
    theirs = timm.create_model(name, dynamic_img_size=True).eval()
    theirs.load_state_dict(backbone.body.state_dict(), strict=False)
    side = backbone.output_shape()["last_feat"].stride
    with torch.no_grad():
        for height, width in ((5 * side, 4 * side), (3 * side - 5, 6 * side - 1)):
            image = torch.randn(1, 3, height, width)
            found = backbone(image)["last_feat"]
            padded = F.pad(image, (0, -width % side, 0, -height % side))
            tokens = theirs.forward_features(padded)[:, theirs.num_prefix_tokens :]
            wanted = tokens.transpose(1, 2).reshape(found.shape)
            assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_pyramid_has_strides_4_to_64(name):
    backbone = build_backbone(configured(name))
    levels = backbone(torch.randn(1, 3, 64, 128))
    assert list(levels) == ["p2", "p3", "p4", "p5", "p6"]
    for level, shape in backbone.output_shape().items():
        assert levels[level].shape == (1, 8, 64 // shape.stride, 128 // shape.stride)


@pytest.mark.parametrize(("trained", "blocks"), [(-1, 12), (2, 2), (0, 0)])
def test_last_blocks_train(trained, blocks):
    cfg = configured("vit_tiny_patch16_224", "MODEL.TIMM.TRAINED_BLOCKS", trained)
    body = build_backbone(cfg).net.body
    by_block = {
        name.split(".")[1]
        for name, parameter in body.named_parameters()
        if name.startswith("blocks") and parameter.requires_grad
    }
    assert by_block == {str(k) for k in range(12 - blocks, 12)}
    assert body.norm.weight.requires_grad == (blocks > 0)
    assert body.pos_embed.requires_grad == (trained == -1)


def test_every_trained_parameter_gets_a_gradient():
    backbone = build_backbone(configured("vit_small_patch16_dinov3"))
    sum(x.sum() for x in backbone(torch.randn(1, 3, 64, 64)).values()).backward()
    without = [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_layer_decay_counts_blocks():
    factors = layer_decay_factors(build_backbone(configured("vit_tiny_patch16_224")), 0.5)
    assert factors["net.body.pos_embed"] == factors["net.body.cls_token"] == 0.5**13
    assert factors["net.body.blocks.11.attn.qkv.weight"] == 0.5
    assert "net.body.norm.weight" not in factors


def test_checkpointed_blocks_give_the_same_gradients():
    gradients = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        backbone = TimmViT(name="vit_tiny_patch16_224", use_act_checkpoint=is_checkpointed)
        backbone(torch.ones(1, 3, 32, 32))["last_feat"].square().sum().backward()
        gradients.append({name: p.grad for name, p in backbone.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_pixels_are_the_models_own():
    cfg = configured("vit_base_patch16_siglip_224")
    assert (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN) == ("RGB", [127.5, 127.5, 127.5])


def test_published_weights_are_loaded_from_their_place(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints" / "timm").mkdir(parents=True)
    published = timm.create_model("vit_tiny_patch16_224").state_dict()
    path = tmp_path / "hub" / "checkpoints" / "timm" / "vit_tiny_patch16_224.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in published.items()}, path)
    backbone = TimmViT(name="vit_tiny_patch16_224", pretrained=True)
    assert backbone.load_initial_weights() == "timm's vit_tiny_patch16_224"
    for name, tensor in backbone.body.state_dict().items():
        assert torch.equal(tensor, published[name]), name


@pytest.mark.parametrize(
    ("name", "trained", "message"),
    [
        ("vit_tiny_patch16_244", -1, "timm has no model 'vit_tiny_patch16_244'.*vit_tiny_patch16"),
        ("resnet18", -1, "'resnet18' is no plain vision transformer"),
        ("vit_tiny_patch16_224", 13, "trained_blocks must lie between 0 and 12"),
    ],
)
def test_wrong_settings_are_named(name, trained, message):
    with pytest.raises(ValueError, match=message):
        TimmViT(name=name, trained_blocks=trained)
