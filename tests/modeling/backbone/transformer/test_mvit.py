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
        ({"out_features": ["scale6"]}, r"out_features must be of \['scale2'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MViT(**{**TINY, **arguments})
