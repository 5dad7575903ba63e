"""Multiscale transformers; their numbers are in tests/modeling/test_golden.py."""

import pytest
import torch

from detkit.config import get_cfg
from detkit.modeling import build_backbone
from detkit.modeling.backbone import MViT
from detkit.solver import layer_decay_factors

TINY = {
    "img_size": 64,
    "embed_dim": 8,
    "depth": 6,
    "last_block_indexes": [0, 2, 4, 5],
    "adaptive_window_size": 8,
}


@pytest.mark.parametrize("size", [(64, 96), (72, 88)], ids=["whole", "padded windows"])
def test_maps_have_the_strides_they_declare(size):
    mvit = MViT(**TINY)
    maps = mvit(torch.randn(2, 3, *size))
    for name, shape in mvit.output_shape().items():
        assert maps[name].shape[1] == shape.channels
        assert maps[name].shape[2:] == tuple(-(-side // shape.stride) for side in size)


def test_batch_is_its_images():
    torch.manual_seed(0)
    mvit = MViT(**TINY).eval()
    images = torch.randn(2, 3, 64, 96)
    assert torch.allclose(mvit(images)["scale5"][1:], mvit(images[1:])["scale5"], atol=1e-5)


def test_two_stages_may_be_frozen():
    stages = {"depth": 2, "last_block_indexes": [0, 1], "out_features": ["scale2", "scale3"]}
    mvit = MViT(**TINY | stages, frozen_stages=4)
    assert not any(parameter.requires_grad for parameter in mvit.blocks.parameters())


@pytest.mark.parametrize(("freeze_at", "blocks"), [(0, 0), (1, 0), (2, 1), (3, 3), (5, 6)])
def test_first_stages_are_frozen(freeze_at, blocks):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "build_mvit_backbone", "MODEL.MVIT.DEPTH", 6])
    cfg.merge_from_list(["MODEL.MVIT.LAST_BLOCKS", [0, 2, 4, 5], "MODEL.MVIT.EMBED_DIM", 8])
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    mvit = build_backbone(cfg)
    frozen = {name for name, p in mvit.named_parameters() if not p.requires_grad}
    assert {name.split(".")[1] for name in frozen if "blocks" in name} == {
        str(k) for k in range(blocks)
    }
    assert ("patch_embed.proj.weight" in frozen) == (freeze_at > 0)
    has_noise = [block.drop_path.drop_prob > 0 for block in mvit.blocks]
    assert has_noise == [0 < k >= blocks for k in range(6)]  # the first block never has any


def test_checkpointed_blocks_give_the_same_gradients():
    gradients = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        mvit = MViT(**TINY, drop_path_rate=0.3, use_act_checkpoint=is_checkpointed)
        torch.manual_seed(5)
        sum(x.square().sum() for x in mvit(torch.ones(2, 3, 64, 64)).values()).backward()
        gradients.append({name: p.grad for name, p in mvit.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_layer_decay_counts_blocks():
    factors = layer_decay_factors(MViT(**TINY), 0.5)
    assert factors["patch_embed.proj.weight"] == 0.5**7
    assert factors["blocks.5.attn.rel_pos_h"] == 0.5
    assert "scale5_norm.weight" not in factors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"last_block_indexes": [0, 2, 4]}, r"must grow, up to depth - 1 = 5: got \[0, 2, 4\]"),
        ({"last_block_indexes": [2, 2, 4, 5]}, "must grow"),
        ({"num_heads": 3}, "multiple of num_heads"),
        ({"adaptive_window_size": 10}, "multiple of the strides .* block 0 it is 10, .* 1 and 4"),
        ({"adaptive_window_size": 6, "adaptive_kv_stride": 2}, "block 3 it is 3, .* 2 and 1"),
        ({"adaptive_kv_stride": 3}, "they are 1 and 3"),
        ({"img_size": 4}, "img_size must be at least 8"),
        ({"use_abs_pos": True, "pretrain_img_size": 3}, "pretrain_img_size must be at least 4"),
        ({"out_features": ["scale6"]}, r"out_features must be of \['scale2'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MViT(**{**TINY, **arguments})
