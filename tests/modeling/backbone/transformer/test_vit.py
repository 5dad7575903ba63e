"""Plain transformers and their pyramid."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detkit.config import get_cfg
from detkit.modeling import build_backbone
from detkit.modeling.backbone import LastLevelMaxPool, SimpleFeaturePyramid, ViT
from detkit.modeling.backbone.transformer.vit import Attention
from detkit.solver import build_optimizer, layer_decay_factors
from detkit.utils.errors import ConfigError

TINY = {"img_size": 64, "embed_dim": 16, "depth": 3, "num_heads": 2, "pretrain_img_size": 64}
TINY_KEYS = [
    *["MODEL.BACKBONE.NAME", "build_vit_fpn_backbone", "MODEL.FPN.NORM", "LN"],
    *["MODEL.FPN.OUT_CHANNELS", 8, "MODEL.VIT.EMBED_DIM", 16, "MODEL.VIT.DEPTH", 3],
    *["MODEL.VIT.NUM_HEADS", 2, "MODEL.VIT.WINDOW_SIZE", 2, "MODEL.VIT.GLOBAL_BLOCKS", [2]],
]


def tiny_pyramid(*settings):
    cfg = get_cfg()
    cfg.merge_from_list([*TINY_KEYS, *settings])
    torch.manual_seed(0)
    return cfg, build_backbone(cfg)


def randomised(module):
    """Zero-initialised positions and norms would hide what they do."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return module


def test_windows_are_padded_before_queries_and_keys_as_in_detectron2():
    attn = randomised(Attention(8, 2, window_size=4, position_size=(4, 4)))
    x = torch.randn(2, 6, 5, 8)
    # Padding the input with zeros makes the tokens of the padding.
    wanted = attn(F.pad(x, (0, 0, 0, 3, 0, 2)))[:, :6, :5]
    assert torch.allclose(attn(x), wanted, atol=1e-6)


def test_blocks_within_windows_do_not_see_beyond_them():
    vit = randomised(ViT(**TINY, window_size=2, window_block_indexes=[0, 1, 2], use_rel_pos=True))
    images = torch.randn(1, 3, 64, 64)
    changed = images.clone()
    changed[..., 32:] = 0
    first, second = (vit(x)["last_feat"] for x in (images, changed))
    assert torch.equal(first[..., :2], second[..., :2])
    assert not torch.equal(first[..., 2:], second[..., 2:])


def test_blocks_that_the_config_lists_attend_globally():
    _, pyramid = tiny_pyramid()
    assert [block.attn.window_size for block in pyramid.net.blocks] == [2, 2, 0]


def test_bottleneck_of_convolutions_starts_as_the_identity():
    torch.manual_seed(0)
    plain = ViT(**TINY)
    torch.manual_seed(0)
    with_convs = ViT(**TINY, residual_block_indexes=[1])
    with_convs.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(1, 3, 32, 48)
    assert torch.equal(plain(images)["last_feat"], with_convs(images)["last_feat"])


def test_image_of_no_whole_patches_is_padded():
    vit = ViT(**{**TINY, "patch_size": 14})
    images = torch.randn(1, 3, 30, 44)
    assert vit(images)["last_feat"].shape == (1, 16, 3, 4)
    padded = vit(F.pad(images, (0, 12, 0, 12)))["last_feat"]
    assert torch.equal(vit(images)["last_feat"], padded)


@pytest.mark.parametrize("patch_size", [8, 14, 16, 20])
def test_pyramid_of_patches_of_any_size_has_the_strides_it_declares(patch_size):
    vit = ViT(**{**TINY, "patch_size": patch_size})
    pyramid = SimpleFeaturePyramid(vit, "last_feat", 8, [4, 2, 1, 0.5], LastLevelMaxPool("p5"))
    if patch_size == 8:  # levels p1 to p4
        pyramid.top_block.in_feature = "p4"
    levels = pyramid(torch.randn(1, 3, 128, 192))
    for name, shape in pyramid.output_shape().items():
        assert levels[name].shape[2:] == (128 // shape.stride, 192 // shape.stride)


def test_resampled_map_keeps_places():
    class Ramp(ViT):
        def forward(self, x):
            height, width = -(-x.shape[2] // 14), -(-x.shape[3] // 14)
            centres = (torch.arange(width) + 0.5) * 14
            return {"last_feat": centres.expand(1, 16, height, width)}

    pyramid = SimpleFeaturePyramid(Ramp(**{**TINY, "patch_size": 14}), "last_feat", 8, [1.0])
    seen = []
    pyramid.simfp_4[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pyramid(torch.zeros(1, 3, 64, 96))
    # Cell k of stride 16 is at pixel 16 k + 8; the last ones are extrapolated.
    assert seen[0][0, 0, 0, :5].tolist() == pytest.approx([8, 24, 40, 56, 72])


@pytest.mark.parametrize("factors", [[], [0.0], [3.0], [4.0, 1.0], [1.0, 2.0]])
def test_other_factors_are_refused(factors):
    with pytest.raises(ConfigError, match=r"MODEL.FPN: scale_factors must be neighbours in \[4"):
        tiny_pyramid("MODEL.FPN.SCALE_FACTORS", factors)


def test_pyramid_finer_than_the_image_is_refused():
    with pytest.raises(ConfigError, match="scale_factors must be at most the map's stride, 2"):
        tiny_pyramid("MODEL.VIT.PATCH_SIZE", 2)


@pytest.mark.parametrize(
    ("top_block", "levels"),
    [
        ("", ["p3", "p4", "p5", "p6"]),
        ("none", ["p3", "p4", "p5"]),
        ("LastLevelP6P7", ["p3", "p4", "p5", "p6", "p7"]),
    ],
)
def test_top_block_is_that_of_the_config(top_block, levels):
    factors = ["MODEL.FPN.SCALE_FACTORS", [2.0, 1.0, 0.5]]
    _, pyramid = tiny_pyramid("MODEL.FPN.TOP_BLOCK", top_block, *factors)
    maps = pyramid(torch.randn(1, 3, 128, 128))
    assert list(maps) == list(pyramid.output_shape()) == levels
    for name, shape in pyramid.output_shape().items():
        assert maps[name].shape[1:] == (8, 128 // shape.stride, 128 // shape.stride)


def test_layer_decay_counts_blocks():
    _, backbone = tiny_pyramid("SOLVER.LAYER_DECAY", 0.5, "MODEL.VIT.RESIDUAL_BLOCKS", [1])
    factors = layer_decay_factors(nn.ModuleDict({"backbone": backbone}), 0.5)
    assert factors["backbone.net.pos_embed"] == 0.5**4
    assert factors["backbone.net.patch_embed.proj.bias"] == 0.5**4
    assert factors["backbone.net.blocks.0.attn.qkv.weight"] == 0.5**3
    assert factors["backbone.net.blocks.2.mlp.fc1.weight"] == 0.5
    assert not [name for name in factors if "residual" in name or "simfp" in name]


def test_weight_decay_of_named_parameters():
    settings = ["SOLVER.WEIGHT_DECAY", 0.1, "SOLVER.WEIGHT_DECAY_OVERRIDES", [["pos_embed", 0.0]]]
    cfg, backbone = tiny_pyramid(*settings)
    decay = {}
    for group in build_optimizer(cfg, backbone).param_groups:
        decay |= {id(p): group["weight_decay"] for p in group["params"]}
    decays = {name: decay[id(p)] for name, p in backbone.named_parameters()}
    assert decays["net.pos_embed"] == 0
    assert decays["net.blocks.0.norm1.weight"] == 0  # SOLVER.WEIGHT_DECAY_NORM
    assert decays["net.blocks.0.attn.rel_pos_h"] == 0.1
    assert decays["simfp_2.4.norm.weight"] == 0.1


@pytest.mark.parametrize("trained", [0, 1, 3])
def test_last_blocks_train_alone(trained):
    _, backbone = tiny_pyramid("MODEL.VIT.TRAINED_BLOCKS", trained)
    backbone(torch.randn(1, 3, 64, 64))["p6"].sum().backward()
    blocks = {
        n.split(".")[2] for n, p in backbone.named_parameters() if p.requires_grad and "blocks" in n
    }
    assert blocks == {str(k) for k in range(3 - trained, 3)}
    assert not backbone.net.patch_embed.proj.weight.requires_grad
    assert backbone.simfp_5[1].weight.requires_grad
    frozen = [
        n for n, p in backbone.named_parameters() if not p.requires_grad and p.grad is not None
    ]
    assert frozen == []


def test_checkpointed_blocks_give_the_same_gradients():
    gradients = []
    for is_checkpointed in (False, True):
        _, backbone = tiny_pyramid("MODEL.VIT.CHECKPOINT", is_checkpointed)
        backbone.train()
        torch.manual_seed(5)  # drop path draws the same in the second pass
        backbone(torch.ones(2, 3, 64, 64))["p4"].square().sum().backward()
        gradients.append({n: p.grad for n, p in backbone.net.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "embed_dim must be a multiple of num_heads: got 16 and 3"),
        (
            {"window_block_indexes": [3]},
            r"window_block_indexes must lie between 0 and 2: got \[3\]",
        ),
        ({"window_block_indexes": [0]}, "window_size must be at least 1"),
        ({"img_size": 8, "use_rel_pos": True}, "img_size must be at least 16 for positions, got 8"),
        ({"pretrain_img_size": 8}, "pretrain_img_size must be at least 16"),
        ({"trained_blocks": 4}, "trained_blocks must lie between 0 and depth"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must lie in \[0, 1\)"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ViT(**{**TINY, **arguments})


def test_frozen_transformer_keeps_less_than_half_for_the_backward_pass():
    kept = []
    for trained in (-1, 0):
        _, backbone = tiny_pyramid("MODEL.VIT.TRAINED_BLOCKS", trained, "MODEL.VIT.EMBED_DIM", 64)
        backbone.train()
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = backbone(torch.randn(1, 3, 128, 128))
        kept.append(sum(storages.values()))
        assert all(x.requires_grad for x in outputs.values())
    assert kept[1] < kept[0] / 2
