"""Transformers trained alone, in the layouts of their authors, made from random numbers."""

import logging

import pytest
import torch
import torch.nn.functional as F

from detkit.checkpoint import DetectionCheckpointer
from detkit.checkpoint.foreign import fitted_to_model
from detkit.config import get_cfg
from detkit.modeling import build_backbone
from detkit.modeling.backbone import MViT, SwinTransformer, ViT

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}


def random_state(module):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(value.shape, generator=generator) * 0.2
        if value.is_floating_point()
        else value
        for name, value in module.state_dict().items()
    }


def loaded(model, weights, tmp_path, key="model"):
    """The model after loading from a file with these weights, and the report."""
    torch.save({key: weights}, tmp_path / "weights.pth")
    checkpointer = DetectionCheckpointer(model)
    checkpointer.load(str(tmp_path / "weights.pth"), checkpointables=[])
    return model, checkpointer.load_report


def pyramid(*settings):
    cfg = get_cfg()
    cfg.merge_from_list(
        ["MODEL.BACKBONE.NAME", "build_vit_fpn_backbone", "MODEL.VIT.EMBED_DIM", 16]
    )
    cfg.merge_from_list(["MODEL.VIT.DEPTH", 2, "MODEL.VIT.NUM_HEADS", 2, "MODEL.VIT.PATCH_SIZE", 8])
    cfg.merge_from_list(["MODEL.VIT.WINDOW_SIZE", 0, "MODEL.VIT.RELATIVE_POSITIONS", False])
    cfg.merge_from_list(["MODEL.VIT.PRETRAIN_IMAGE_SIZE", 32, *settings])
    return build_backbone(cfg)


def mae_weights(image_size=32):
    """As in mae_pretrain_vit_base.pth: ViT's names, a class token and a last norm."""
    weights = random_state(ViT(**TINY, pretrain_img_size=image_size))
    extra = {"cls_token": torch.randn(1, 1, 16), "norm.weight": torch.randn(16)}
    return weights | extra | {"norm.bias": torch.randn(16)}


def test_mae_fills_the_transformer_in_a_pyramid(tmp_path):
    weights = mae_weights()
    model, report = loaded(pyramid(), weights, tmp_path)
    assert report.layout == "a vision transformer alone"
    for name, value in model.net.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert set(report.unexpected) == {"cls_token", "norm.weight", "norm.bias"}
    assert all(name.startswith("simfp") for name in report.missing)


def test_positions_of_another_image_size_are_interpolated(tmp_path, caplog):
    weights = mae_weights(image_size=64)
    with caplog.at_level(logging.INFO, logger="detkit"):
        model, report = loaded(pyramid(), weights, tmp_path)
    table = weights["pos_embed"]
    assert torch.equal(model.net.pos_embed[:, :1], table[:, :1])
    grid = table[:, 1:].view(1, 8, 8, 16).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, size=(4, 4), mode="bicubic").flatten(2).transpose(1, 2)
    assert torch.allclose(model.net.pos_embed[:, 1:], wanted, atol=1e-6)
    assert not report.mismatched
    assert "interpolated 1 tables of positions: pos_embed (1, 65, 16) to (1, 17, 16)" in caplog.text


@pytest.mark.parametrize("has_cls_row", [True, False])
def test_positions_of_the_class_token_are_left_out_or_zero(tmp_path, has_cls_row):
    weights = mae_weights()
    table = weights["pos_embed"]
    if not has_cls_row:
        weights["pos_embed"] = table[:, 1:]
    model, _ = loaded(pyramid("MODEL.VIT.PRETRAIN_CLS_TOKEN", not has_cls_row), weights, tmp_path)
    assert torch.equal(model.net.pos_embed[:, -16:], table[:, 1:])
    assert (
        model.net.pos_embed.shape[1] == 16 if has_cls_row else not model.net.pos_embed[0, 0].any()
    )


def test_relative_positions_are_interpolated(tmp_path):
    small = ViT(**TINY, img_size=32, use_rel_pos=True)
    large = ViT(**TINY, img_size=64, use_rel_pos=True)
    weights = random_state(small)
    loaded(large, weights, tmp_path)
    table = weights["blocks.1.attn.rel_pos_h"]
    wanted = F.interpolate(table.T[None], size=15, mode="linear")[0].T
    assert torch.allclose(large.blocks[1].attn.rel_pos_h, wanted)


def dinov2_weights(registers=0):
    """As in dinov2_vits14_pretrain.pth, with layer scale and, in `_reg4`, register tokens."""
    weights = mae_weights(image_size=48) | {"mask_token": torch.zeros(1, 16)}
    for block in range(2):
        for scale in ("ls1", "ls2"):
            weights[f"blocks.{block}.{scale}.gamma"] = torch.rand(16)
    if registers:
        weights["register_tokens"] = torch.randn(1, registers, 16)
    return weights


def test_dinov2s_layer_scale_is_folded_where_the_model_has_none(tmp_path, caplog):
    weights = dinov2_weights()
    with caplog.at_level(logging.INFO, logger="detkit"):
        model, report = loaded(pyramid(), weights, tmp_path)
    assert report.layout == "DINOv2"
    gamma = weights["blocks.1.ls1.gamma"]
    proj = model.net.blocks[1].attn.proj
    assert torch.equal(proj.weight, weights["blocks.1.attn.proj.weight"] * gamma[:, None])
    assert torch.equal(proj.bias, weights["blocks.1.attn.proj.bias"] * gamma)
    assert "multiplied 4 layer scales" in caplog.text


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_gives_the_features_of_timms_own_loading(tmp_path, registers):
    timm = pytest.importorskip("timm")
    from detkit.modeling.backbone import TimmViT

    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    theirs = timm.create_model(name, dynamic_img_size=True).eval()
    weights = random_state(theirs)
    theirs.load_state_dict(weights)
    # Under the names of the authors: positions include the class token's.
    published = dict(weights)
    if registers:
        published["register_tokens"] = published.pop("reg_token")
        row = torch.randn(1, 1, 384)
        published["cls_token"] = weights["cls_token"] - row
        published["pos_embed"] = torch.cat([row, weights["pos_embed"]], dim=1)
    published["mask_token"] = torch.zeros(1, 384)
    ours, report = loaded(TimmViT(name=name).eval(), published, tmp_path)
    assert report.is_complete
    image = torch.randn(1, 3, 42, 56)
    with torch.no_grad():
        tokens = theirs.forward_features(image)[:, theirs.num_prefix_tokens :]
        found = ours(image)["last_feat"]
    assert torch.allclose(found.flatten(2).transpose(1, 2), tokens, atol=1e-4)


def test_swin_of_imagenet(tmp_path):
    arguments = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2]}
    weights = random_state(SwinTransformer(**arguments, out_indices=[0], window_size=5))
    extra = {"head.weight": torch.zeros(9, 16), "layers.0.blocks.1.attn_mask": torch.zeros(3, 3)}
    model = SwinTransformer(**arguments, out_indices=[0, 1], window_size=7)
    index = model.layers[0].blocks[0].attn.relative_position_index.clone()
    model, report = loaded(model, weights | extra, tmp_path)
    assert report.layout == "Swin"
    assert report.missing == ("norm1.weight", "norm1.bias")
    assert report.unexpected == ("head.weight",)
    assert not report.mismatched
    attn = model.layers[0].blocks[0].attn
    assert torch.equal(attn.relative_position_index, index)
    table = weights["layers.0.blocks.0.attn.relative_position_bias_table"]
    wanted = F.interpolate(table.T.view(1, 1, 9, 9), size=(13, 13), mode="bicubic").view(1, -1).T
    assert torch.allclose(attn.relative_position_bias_table, wanted, atol=1e-6)


def test_mvit_of_imagenet_in_pycls_files(tmp_path):
    arguments = {"embed_dim": 8, "depth": 4, "last_block_indexes": [0, 1, 2, 3], "img_size": 64}
    model = MViT(**arguments, adaptive_window_size=8)
    weights = random_state(model) | {"head.projection.weight": torch.zeros(5, 64)}
    for name in [name for name in weights if name.startswith("scale")]:
        del weights[name]
    model, report = loaded(model, weights, tmp_path, key="model_state")
    assert report.layout == "MViT"
    assert report.unexpected == ("head.projection.weight",)
    assert {name.partition("_")[0] for name in report.missing} == {
        "scale2",
        "scale3",
        "scale4",
        "scale5",
    }
    assert torch.equal(model.blocks[3].attn.pool_q.weight, weights["blocks.3.attn.pool_q.weight"])


def test_detector_with_its_own_names_is_as_it_is(tmp_path):
    weights = random_state(pyramid())
    model, report = loaded(pyramid(), weights, tmp_path)
    assert report.is_complete
    assert report.layout == ""
    assert torch.equal(model.net.pos_embed, weights["net.pos_embed"])


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_stem_for_colour_is_repeated_for_other_channels(channels: int) -> None:
    name = "backbone.stem.conv1.weight"
    colour = torch.randn(5, 3, 7, 7, dtype=torch.float64)
    model_state = {name: torch.zeros(5, channels, 7, 7)}
    fitted, (remark,) = fitted_to_model({name: colour}, model_state)
    assert remark == f"{name}: filters of 3 channels repeated for {channels}"
    assert fitted[name].shape == model_state[name].shape
    if channels == 1:
        assert torch.allclose(fitted[name].sum(dim=1), colour.sum(dim=1))
    else:
        assert torch.allclose(fitted[name][:, 0] * channels / 3, colour[:, 0])


def test_stem_of_another_size_is_left() -> None:
    weights = {"stem.weight": torch.zeros(5, 3, 7, 7)}
    fitted, remarks = fitted_to_model(weights, {"stem.weight": torch.zeros(5, 4, 3, 3)})
    assert fitted["stem.weight"].shape == (5, 3, 7, 7)
    assert not remarks
