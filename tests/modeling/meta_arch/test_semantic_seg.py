"""Tests of detkit.modeling.meta_arch.semantic_seg."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detkit.layers import ShapeSpec
from detkit.modeling import (
    BACKBONE_REGISTRY,
    Backbone,
    SemSegFPNHead,
    build_model,
    build_sem_seg_head,
)
from tests.configs import cfg_with

K, IGNORED = 4, 255
SHAPES = {f"p{i}": ShapeSpec(channels=8, stride=2**i) for i in (2, 3, 4)}


@BACKBONE_REGISTRY.register()
class ThreeLevels(Backbone):
    """Strides 4, 8 and 16 by strided convolutions."""

    size_divisibility = 16

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(c, 8, stride, stride=stride)
            for c, stride in ((input_shape.channels, 4), (8, 2), (8, 2))
        )

    def output_shape(self):
        return SHAPES

    def forward(self, x):
        features = list(itertools.accumulate(self.convs, lambda y, conv: conv(y).relu(), initial=x))
        return dict(zip(SHAPES, features[1:], strict=True))


def config(*overrides):
    options = {
        "MODEL.DEVICE": "cpu",
        "MODEL.META_ARCHITECTURE": "SemanticSegmentor",
        "MODEL.BACKBONE.NAME": "ThreeLevels",
        "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["p4", "p2", "p3"],
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": K,
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
        "MODEL.PIXEL_STD": [50.0, 50.0, 50.0],
    }
    return cfg_with(options, overrides)


def make(*overrides):
    torch.manual_seed(0)
    return build_model(config(*overrides))


def inputs(*sizes, **fields):
    generator = torch.Generator().manual_seed(1)
    batch = []
    for height, width in sizes:
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        batch.append(
            {
                "image": image,
                "sem_seg": torch.randint(0, K, (height, width), generator=generator),
                **fields,
            }
        )
    return batch


def head(**arguments):
    torch.manual_seed(0)
    return SemSegFPNHead(
        SHAPES,
        **{
            "num_classes": K,
            "conv_dims": 32,
            "common_stride": 4,
            "ignore_value": IGNORED,
            "norm": "GN",
        }
        | arguments,
    )


def features(num=2, size=32):
    torch.manual_seed(1)
    return {
        name: torch.randn(num, 8, size // s.stride, size // s.stride) for name, s in SHAPES.items()
    }


def upsampled(x, factor):
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def logits_by_names(state, x, norm):
    """The head written out, from the names in its state_dict."""
    merged = 0
    for name, layers, num_upsamplings in (("p2", [0], 0), ("p3", [0], 1), ("p4", [0, 2], 2)):
        y = x[name]
        for layer in layers:
            y = F.conv2d(
                y, state[f"{name}.{layer}.weight"], state.get(f"{name}.{layer}.bias"), padding=1
            )
            if norm:
                y = F.group_norm(
                    y, 32, state[f"{name}.{layer}.norm.weight"], state[f"{name}.{layer}.norm.bias"]
                )
            y = y.relu()
            y = upsampled(y, 2) if num_upsamplings else y
        merged = merged + y
    return F.conv2d(merged, state["predictor.weight"], state["predictor.bias"])


# --- the head ---


@pytest.mark.parametrize("norm", ["GN", ""])
def test_head_is_convolutions_and_upsampling_under_detectron2s_names(norm):
    model, x = head(norm=norm), features()
    scores, losses = model.eval()(x)
    torch.testing.assert_close(scores, upsampled(logits_by_names(model.state_dict(), x, norm), 4))
    assert losses == {}


def test_order_of_features_in_the_config_does_not_matter():
    torch.manual_seed(0)
    model = build_sem_seg_head(config("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p4", "p3", "p2"]), SHAPES)
    assert model.in_features == ["p2", "p3", "p4"]


def test_loss_is_the_mean_over_labelled_pixels():
    model, x = head(loss_weight=0.5), features()
    targets = torch.randint(0, K, (2, 32, 32))
    targets[0, :20] = IGNORED
    _, losses = model(x, targets)
    log_probabilities = upsampled(model.layers(x), 4).log_softmax(1)
    picked = [
        -log_probabilities[n, targets[n, r, c], r, c]
        for n, r, c in (targets != IGNORED).nonzero().tolist()
    ]
    torch.testing.assert_close(losses["loss_sem_seg"], 0.5 * torch.stack(picked).mean())


def test_batch_without_a_labelled_pixel_has_no_loss_but_gradients():
    model = head()
    _, losses = model(features(), torch.full((2, 32, 32), IGNORED))
    assert losses["loss_sem_seg"].item() == 0
    losses["loss_sem_seg"].backward()
    assert all(
        parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters()
    )


def test_empty_batch_gives_no_scores():
    assert head().eval()(features(num=0))[0].shape == (0, K, 32, 32)


def test_coarser_common_stride_takes_fewer_layers():
    shapes = {name: shape for name, shape in SHAPES.items() if name != "p2"}
    model = SemSegFPNHead(shapes, num_classes=K, conv_dims=32, common_stride=8, norm="GN")
    assert {name.split(".")[0] for name in model.state_dict()} == {"p3", "p4", "predictor"}
    assert "p4.2.weight" not in model.state_dict()
    assert model.eval()(features())[0].shape == (2, K, 32, 32)


@pytest.mark.parametrize("stride", [2, 12], ids=["finer", "no-power-of-two"])
def test_stride_that_cannot_be_brought_to_the_common_one_is_an_error(stride):
    with pytest.raises(ValueError, match=rf"'x' of stride {stride}, .*common_stride = 4"):
        SemSegFPNHead(
            {"x": ShapeSpec(channels=8, stride=stride)},
            num_classes=K,
            conv_dims=32,
            common_stride=4,
        )


def test_head_without_features_is_an_error():
    with pytest.raises(ValueError, match=r"must have at least one feature"):
        SemSegFPNHead({}, num_classes=K, conv_dims=32, common_stride=4)


def test_unknown_feature_is_an_error():
    with pytest.raises(ValueError, match=r"MODEL.SEM_SEG_HEAD.IN_FEATURES must be of .*: got 'p7'"):
        build_sem_seg_head(config("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p7"]), SHAPES)


def test_training_without_targets_is_an_error():
    with pytest.raises(ValueError, match="needs targets in training"):
        head()(features())


# --- the model ---


@pytest.mark.parametrize(
    "sizes", [[(48, 64)], [(40, 64), (30, 45)]], ids=["one", "two-of-different-sizes"]
)
def test_losses_reach_every_parameter(sizes):
    model = make()
    losses = model(inputs(*sizes))
    assert set(losses) == {"loss_sem_seg"}
    losses["loss_sem_seg"].backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for parameter in model.parameters()
    )


def test_padding_is_not_trained():
    model = make("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", 77)
    (x,) = inputs((30, 45))
    padded = {
        "image": torch.zeros(3, 32, 48, dtype=torch.uint8),
        "sem_seg": torch.full((32, 48), 77),
    }
    padded["image"][:, :30, :45] = x["image"]
    padded["sem_seg"][:30, :45] = x["sem_seg"]
    model.pixel_mean.zero_()  # so that padding before and after the normalisation is the same
    torch.testing.assert_close(model([x])["loss_sem_seg"], model([padded])["loss_sem_seg"])


def test_scores_come_in_the_size_that_is_asked_for():
    (output,) = make().eval()(inputs((30, 45), height=61, width=33))
    assert list(output) == ["sem_seg"]
    assert output["sem_seg"].shape == (K, 61, 33)


def test_without_a_wanted_size_scores_have_that_of_the_image_and_the_padding_is_gone():
    model = make().eval()
    batch = [{"image": x["image"]} for x in inputs((30, 45), (48, 20))]
    outputs = model(batch)
    assert [output["sem_seg"].shape for output in outputs] == [(K, 30, 45), (K, 48, 20)]
    images = model.preprocess_image(batch)
    scores, _ = model.sem_seg_head(model.backbone(images.tensor))
    torch.testing.assert_close(outputs[1]["sem_seg"], scores[1, :, :48, :20])


def test_four_images_are_learnt_by_heart():
    model, batch = make(), inputs(*[(32, 48)] * 4)
    for i, x in enumerate(batch):
        x["sem_seg"] = torch.full((32, 48), i % K)
        x["sem_seg"][:, 24:] = (i + 1) % K
        x["image"] = (60 * x["sem_seg"]).to(torch.uint8).expand(3, -1, -1).clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        model(batch)["loss_sem_seg"].backward()
        optimizer.step()
    with torch.no_grad():
        outputs = model.eval()(batch)
    correct = [
        (o["sem_seg"].argmax(0) == x["sem_seg"]).float().mean()
        for o, x in zip(outputs, batch, strict=True)
    ]
    assert min(correct) > 0.93


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
def test_labels_of_any_integer_type_are_the_same(dtype):
    model, batch = make(), inputs((32, 48))
    wanted = model(batch)["loss_sem_seg"]
    batch[0]["sem_seg"] = batch[0]["sem_seg"].to(dtype)
    assert torch.equal(model(batch)["loss_sem_seg"], wanted)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        pytest.param(None, ValueError, r"needs 'sem_seg' in training: image 1 .*only \['file_name', 'image'\]", id="none"),
        pytest.param(torch.zeros(32, 47).long(), ValueError, r"\(32, 48\): that of image 1 .* has \(32, 47\)", id="size"),
        pytest.param(torch.zeros(32, 48), TypeError, r"integer labels: that of image 1 .*float32", id="floats"),
        pytest.param(
            torch.full((32, 48), K),
            ValueError,
            r"image 1 of the batch \(b.png\) has the labels \[4\]; legal are 0 to 3 .* and 255",
            id="unknown",
        ),
        pytest.param(torch.full((32, 48), -1), ValueError, r"has the labels \[-1\]", id="negative"),
    ],
)  # fmt: skip
def test_bad_labels_are_named(labels, error, message):
    batch = inputs((32, 48), (32, 48), file_name="b.png")
    del batch[1]["sem_seg"]
    if labels is not None:
        batch[1]["sem_seg"] = labels
    with pytest.raises(error, match=message):
        make()(batch)
