"""Small models of each architecture with random weights, images for them, and the comparison of their outputs."""

import numpy as np
import torch

from detkit.config import get_cfg
from detkit.model_zoo import find_config
from detkit.modeling import build_model
from detkit.structures import paste_masks_in_image

# A few channels have all that many have.
SMALL = [
    "MODEL.DEVICE", "cpu",
    "MODEL.WEIGHTS", "",
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 8,
    "MODEL.BACKBONE.FREEZE_AT", 0,
    "MODEL.FPN.OUT_CHANNELS", 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 16,
    "MODEL.ROI_MASK_HEAD.NUM_CONV", 1,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [16],
    "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32,
    "MODEL.RPN.PRE_NMS_TOPK_TEST", 60,
    "MODEL.RPN.POST_NMS_TOPK_TEST", 40,
    "MODEL.ROI_HEADS.NUM_CLASSES", 5,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.5,
    "TEST.DETECTIONS_PER_IMAGE", 8,
]  # fmt: skip
R18 = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.STRIDE_IN_1X1", False]
QUICK = "quick_start/faster_rcnn_R_18_FPN_shapes.yaml"
MODELS = {
    "faster": (QUICK, []),
    "mask and keypoints": (
        "quick_start/keypoint_rcnn_R_18_FPN_shapes.yaml",
        ["MODEL.MASK_ON", True],
    ),
    "cascade, class-agnostic": (
        QUICK,
        [
            "MODEL.ROI_HEADS.NAME",
            "CascadeROIHeads",
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
            True,
            "TEST.NMS.CLASS_AGNOSTIC",
            True,
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
            0.4,
        ],
    ),
    "C4 with masks": ("mask_rcnn_R_50_C4_1x", R18),
    "DC5": (
        "faster_rcnn_R_50_DC5_1x",
        [*R18, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.3, "TEST.DETECTIONS_PER_IMAGE", 4],
    ),
    "deformable": (
        QUICK,
        [
            "MODEL.RESNETS.DEPTH",
            50,
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE",
            [False, False, False, True],
            "MODEL.RESNETS.DEFORM_MODULATED",
            True,
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
            0.3,
        ],
    ),
    "RetinaNet": (
        "retinanet_R_50_FPN_1x",
        [
            *R18,
            "MODEL.RETINANET.NUM_CONVS",
            1,
            "MODEL.RETINANET.NUM_CLASSES",
            5,
            "MODEL.RETINANET.TOPK_CANDIDATES_TEST",
            50,
            "MODEL.RETINANET.SCORE_THRESH_TEST",
            0.1,
        ],
    ),
    "FCOS": (
        "quick_start/fcos_R_18_FPN_shapes.yaml",
        [
            "MODEL.FCOS.NUM_CONVS",
            1,
            "MODEL.FCOS.SCORE_THRESH_TEST",
            0.0741,
            "MODEL.FCOS.TOPK_CANDIDATES_TEST",
            50,
        ],
    ),
    "panoptic": ("quick_start/panoptic_fpn_R_18_FPN_shapes.yaml", []),
    "semantic": ("quick_start/semantic_R_18_FPN_shapes.yaml", []),
    "proposals": (QUICK, ["MODEL.META_ARCHITECTURE", "ProposalNetwork"]),
}
"""Name -> config, and settings."""

STAGES = ["MODEL.FPN.IN_FEATURES", ["s4", "s8", "s16", "s32"]]
TORCHVISION = ["MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone", *STAGES]
TIMM = ["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", *STAGES]
TIMM_VIT = ["MODEL.BACKBONE.NAME", "build_timm_vit_fpn_backbone", "MODEL.FPN.NORM", "LN"]
VIT = [
    "MODEL.BACKBONE.NAME", "build_vit_fpn_backbone",
    "MODEL.VIT.PATCH_SIZE", 8,
    "MODEL.VIT.EMBED_DIM", 32,
    "MODEL.VIT.DEPTH", 3,
    "MODEL.VIT.NUM_HEADS", 2,
    "MODEL.VIT.WINDOW_SIZE", 4,
    "MODEL.VIT.GLOBAL_BLOCKS", [2],
    "MODEL.VIT.RESIDUAL_BLOCKS", [1],
    "MODEL.VIT.IMAGE_SIZE", 128,
    "MODEL.VIT.PRETRAIN_IMAGE_SIZE", 64,
    "MODEL.FPN.NORM", "LN",
    "MODEL.FPN.SCALE_FACTORS", [2.0, 1.0, 0.5],
    "MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4"],
    "MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128]],
]  # fmt: skip
SWIN = [
    "MODEL.BACKBONE.NAME", "build_swin_fpn_backbone",
    "MODEL.SWIN.EMBED_DIM", 16,
    "MODEL.SWIN.DEPTHS", [2, 2, 1, 1],
    "MODEL.SWIN.NUM_HEADS", [1, 2, 2, 2],
    "MODEL.SWIN.WINDOW_SIZE", 4,
    "MODEL.FPN.IN_FEATURES", ["p0", "p1", "p2", "p3"],
]  # fmt: skip
MVIT = [
    "MODEL.BACKBONE.NAME", "build_mvit_fpn_backbone",
    "MODEL.MVIT.EMBED_DIM", 16,
    "MODEL.MVIT.DEPTH", 5,
    "MODEL.MVIT.LAST_BLOCKS", [0, 2, 3, 4],
    "MODEL.MVIT.WINDOW_SIZE", 16,
    "MODEL.MVIT.IMAGE_SIZE", 64,
    "MODEL.FPN.IN_FEATURES", ["scale2", "scale3", "scale4", "scale5"],
]  # fmt: skip
REGNET = [
    "MODEL.BACKBONE.NAME", "build_regnet_fpn_backbone",
    "MODEL.REGNET.DEPTH", 5,
    "MODEL.REGNET.W_0", 16,
    "MODEL.REGNET.W_A", 8.0,
    "MODEL.REGNET.W_M", 1.5,
    "MODEL.REGNET.GROUP_WIDTH", 8,
    "MODEL.REGNET.STEM_WIDTH", 8,
    "MODEL.REGNET.SE_RATIO", 0.25,
    "MODEL.FPN.IN_FEATURES", ["s1", "s2", "s3", "s4"],
]  # fmt: skip
RESNEXT = ["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.NUM_GROUPS", 2]
BACKBONES = {
    "ResNeXt": [*RESNEXT, "MODEL.RESNETS.WIDTH_PER_GROUP", 8],
    "bilinear pyramid": ["MODEL.FPN.UPSAMPLE_MODE", "bilinear", "MODEL.FPN.FUSE_TYPE", "avg"],
    "RegNet": REGNET,
    "ViT": VIT,
    "ViT, square": [*VIT, "MODEL.FPN.SQUARE_PAD", 160],
    "Swin": SWIN,
    "Swin with positions": [*SWIN, "MODEL.SWIN.ABSOLUTE_POSITIONS", True],
    "MViT": MVIT,
    "MViT with positions": [*MVIT, "MODEL.MVIT.ABSOLUTE_POSITIONS", True],
    "torchvision's EfficientNet": [*TORCHVISION, "MODEL.TORCHVISION.NAME", "efficientnet_b0"],
    "torchvision's MobileNet": [*TORCHVISION, "MODEL.TORCHVISION.NAME", "mobilenet_v3_small"],
    "torchvision's ShuffleNet": [*TORCHVISION, "MODEL.TORCHVISION.NAME", "shufflenet_v2_x0_5"],
    "torchvision's ConvNeXt": [*TORCHVISION, "MODEL.TORCHVISION.NAME", "convnext_tiny"],
    "timm's ConvNeXt": [*TIMM, "MODEL.TIMM.NAME", "convnext_atto"],
    "timm's RegNet": [*TIMM, "MODEL.TIMM.NAME", "regnetx_002"],
    "timm's ViT": [*TIMM_VIT, "MODEL.TIMM.NAME", "vit_tiny_patch16_224"],
}
"""Name -> settings for Faster R-CNN."""


def small_config(name: str, folder, *settings):
    """The config of one of `MODELS`, with a file of random weights that spread the scores.

    Args:
        name: Of `MODELS`, or of `BACKBONES`.
        folder: Of the file.
        settings: Further ones.
    """
    few = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.25]
    file, own = MODELS[name] if name in MODELS else (QUICK, [*few, *BACKBONES[name]])
    cfg = get_cfg()
    cfg.merge_from_file(find_config(file))
    cfg.merge_from_list([*SMALL, *own, *settings])
    torch.manual_seed(0)
    model = build_model(cfg)
    spread_scores(model)
    if name == "C4 with masks":
        normalise_maps(model, [model.backbone, model.roi_heads.res5])
    elif name in ("DC5", "deformable") or name.startswith("torchvision"):
        normalise_maps(model, [model.backbone])
    elif hasattr(model, "head") and "build_one_convolution" in settings:
        normalise_maps(model, [model.backbone, model.head])
    cfg.MODEL.WEIGHTS = str(folder / "weights.pth")
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    return cfg


LARGE = [
    "faster_rcnn_R_50_FPN_1x",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "retinanet_R_50_FPN_1x",
]


@torch.no_grad()
def large_config(file: str, folder):
    """A config of the zoo, with a file of random weights that spread the scores."""
    cfg = get_cfg()
    cfg.merge_from_file(find_config(file))
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    spread_scores(model)
    normalise_maps(model, [model.backbone, *([model.head] if hasattr(model, "head") else [])])
    cfg.MODEL.WEIGHTS = str(folder / "weights.pth")
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    return cfg


def spread_scores(model):
    """Draw weights of scores anew: they start near 0, where the order of nearly equal ones is chance.

    Those of the offsets of deformable convolutions as well, which start at 0.
    """
    drawn = ("objectness_logits", "cls_score", "predictor", "offset")
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and layer.endswith(drawn):
            gain = 0.2 if layer.startswith("head.") else 2
            torch.nn.init.normal_(parameter, std=gain / parameter[0].numel() ** 0.5)


@torch.no_grad()
def normalise_maps(model, parts):
    """Scale the convolutions of parts of a model so that their outputs have a deviation of 1.

    Without norms, or with fixed ones of 1, they would grow from block to block until all scores are 1.
    """
    spreads, hooks = {}, []

    def rescale(layer, _, output):
        spread = spreads.setdefault(layer, output.std())
        return output / spread

    for part in parts:
        layers = [layer for layer in part.modules() if isinstance(layer, torch.nn.Conv2d)]
        hooks += [layer.register_forward_hook(rescale) for layer in layers]
    model.eval()([{"image": noise((256, 320))}])
    for hook in hooks:
        hook.remove()
    for layer, spread in spreads.items():
        layer.weight /= spread


def noise(size, contrast=1.0, seed=0):
    """An image of smooth noise, (3, H, W) uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 8, generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")[0]
    return (127 + 255 * contrast * (image - 0.5)).clamp(0, 255).to(torch.uint8)


def as_inputs(images):
    """The inputs of an exported model. What lies beside an image is not to matter."""
    sizes = torch.tensor([image.shape[1:] for image in images])
    height, width = sizes.amax(dim=0).tolist()
    batch = torch.full((len(images), 3, height, width), 77, dtype=torch.uint8)
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return {"images": batch, "image_sizes": sizes}


def expected_outputs(model, images, paste=False):
    """What the model itself finds in each image, under the names of exported outputs."""
    inputs = [{"image": image} for image in images]
    batch = model.preprocess_image(inputs)
    features = model.backbone(batch.tensor)
    instances, maps = [], None
    if hasattr(model, "sem_seg_head"):
        maps, _ = model.sem_seg_head(features, None)
    if hasattr(model, "roi_heads"):
        instances = model.find_instances(batch, features, inputs)
    elif hasattr(model, "proposal_generator"):
        instances, _ = model.proposal_generator(batch, features, None)
    elif maps is None:
        instances = model.inference(inputs, do_postprocess=False)
    outputs = [{} for _ in images]
    for i, (found, image) in enumerate(zip(instances, images, strict=bool(instances))):
        names = {"pred_boxes": "boxes", "proposal_boxes": "boxes", "objectness_logits": "scores"}
        names |= {"scores": "scores", "pred_classes": "classes", "pred_masks": "masks"}
        names |= {"pred_keypoints": "keypoints"}
        for field, value in found.get_fields().items():
            if field.endswith("_boxes"):
                value.clip(image.shape[1:])
                value = value.tensor
            if field == "pred_masks":
                value = value[:, 0]
                if paste:
                    size = tuple(as_inputs(images)["images"].shape[2:])
                    value = paste_masks_in_image(value, found.pred_boxes, size)
            if field in names:
                outputs[i][names[field]] = value.numpy()
    for i in range(len(images) if maps is not None else 0):
        height, width = images[i].shape[1:]
        outputs[i]["sem_seg"] = maps[i, :, :height, :width].numpy()
    return outputs


def assert_same(found, expected, boxes=5e-3, scores=2e-5):
    """Compare outputs of an exported model, arrays, with `expected_outputs`.

    Detections whose scores are equal within the tolerance may have changed places: in RetinaNet
    R-50 two of them lie 2e-8 apart, and the eager model swaps them in float64.
    """
    for i, wanted in enumerate(expected):
        count = len(wanted["scores"]) if "scores" in wanted else 0
        assert set(found) == {*wanted, *(["num_detections"] if "scores" in wanted else [])}
        if "scores" in wanted:
            assert found["num_detections"][i] == count
        order = slice(count)
        if "boxes" in wanted:
            rows = {
                name: np.asarray(found[name][i])[:count] for name in wanted if name != "sem_seg"
            }
            order = order_like(wanted, rows, scores)
        tolerances = {"boxes": boxes, "scores": scores, "classes": 0, "keypoints": 2 * boxes}
        for name in wanted:
            values = np.asarray(found[name][i])
            if name == "sem_seg":
                height, width = wanted[name].shape[1:]
                same = values[:, :height, :width].argmax(0) == wanted[name].argmax(0)
                assert same.mean() >= 0.999
                continue
            assert not values[count:].any(), f"{name} has rows past num_detections"
            if name == "masks":
                assert_same_masks(values[order], wanted[name])
            else:
                np.testing.assert_allclose(
                    values[order], wanted[name], rtol=0, atol=tolerances[name], err_msg=name
                )


def order_like(wanted, found, tie):
    """Return the order of found detections in which those of tied scores lie as in `wanted`.

    Args:
        wanted: Fields of M detections, their scores falling.
        found: The same fields, of M detections.
        tie: Difference of scores up to which two that follow each other are tied.
    """
    order = np.arange(len(wanted["scores"]))
    last = np.nonzero(wanted["scores"][:-1] - wanted["scores"][1:] > tie)[0]
    runs = np.split(order.copy(), last + 1)
    for run in runs:
        distance = np.abs(wanted["boxes"][run, None] - found["boxes"][run]).max(axis=2)
        if "classes" in wanted:
            distance[wanted["classes"][run, None] != found["classes"][run]] += 1e6
        for row, to_each in zip(run, distance, strict=True):
            nearest = to_each.argmin()
            order[row] = run[nearest]
            distance[:, nearest] = np.inf  # taken
    return order


def assert_same_masks(found, expected):
    found, expected = found > 0.5, expected > 0.5
    union = (found | expected).sum()
    assert union == 0 or (found & expected).sum() / union >= 0.999
