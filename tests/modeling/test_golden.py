"""Models held against Detectron2 0.6: tests/golden holds its numbers on a CPU.

No weights travel: every parameter and buffer is drawn from a random stream that its own name seeds, so a model with the
same names and shapes is the same model. Sampling is switched off by sampling everything.
"""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from detkit.config import find_architecture, get_cfg
from detkit.layers import ShapeSpec
from detkit.modeling import (
    build_backbone,
    build_model,
    build_proposal_generator,
    build_roi_heads,
)
from detkit.modeling.backbone.transformer.attention import DropPath
from detkit.solver import build_lr_scheduler, build_optimizer
from detkit.structures import (
    BitMasks,
    Boxes,
    ImageList,
    Instances,
    PolygonMasks,
    RotatedBoxes,
    pairwise_iou,
)

CASES = {
    "mask_fpn": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "faster_fpn": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
}
# Those that it describes in Python: one image, no steps, but the settings of each parameter's optimizer.
LAZY_CASES = {
    "fcos_R_50_FPN_1x": "COCO-Detection/fcos_R_50_FPN_1x.yaml",
    "mask_rcnn_mvitv2_t_3x": "MViTv2/mask_rcnn_mvitv2_t_3x.yaml",
    "cascade_mask_rcnn_vitdet_b_100ep": "ViTDet/COCO/cascade_mask_rcnn_vitdet_b_100ep.yaml",
}
ROOT = Path(__file__).resolve().parents[2]
SIZE = (240, 320)
LAST_LAYERS = ("cls_score", "bbox_pred", "predictor", "objectness_logits", "anchor_deltas")
SETTINGS = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 1_000_000,
    "MODEL.RPN.POSITIVE_FRACTION": 1.0,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 500,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 200,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 100_000,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.02,
    "SOLVER.BASE_LR": 0.0005,
    "SOLVER.WARMUP_ITERS": 2,
}


@pytest.fixture(
    scope="module", params=["mask_fpn", pytest.param("faster_fpn", marks=pytest.mark.slow)]
)
def case(request):
    """Each part of Faster R-CNN is one of Mask R-CNN too: by itself it is only looked at among the slow tests."""
    return request.param


@pytest.fixture(scope="module")
def recorded(case):
    return load(case)


def load(case):
    with np.load(ROOT / f"tests/golden/{case}.npz") as numbers:
        return {name: numbers[name] for name in numbers.files}


@pytest.fixture(scope="module")
def observed(case):
    """Numbers of detkit under the names of the recorded ones: of inference first, since training changes the weights."""
    cfg, model = build(CASES[case])
    batch = [training_input(seed, cfg.MODEL.ROI_HEADS.NUM_CLASSES) for seed in (21, 22)]
    return {**inference_numbers(model.eval(), (11, 12)), **training_numbers(cfg, model, batch)}


def build(config):
    cfg = get_cfg()
    cfg.merge_from_file(str(ROOT / "configs" / config))
    base_lr = cfg.SOLVER.BASE_LR
    cfg.merge_from_list([item for pair in SETTINGS.items() for item in pair])
    if config in LAZY_CASES.values():
        cfg.SOLVER.BASE_LR = base_lr
    if cfg.MODEL.META_ARCHITECTURE == "FCOS":
        cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.02
    model = build_model(cfg)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            t.copy_(torch.from_numpy(values_for(name, tuple(t.shape))))
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return cfg, model


@torch.no_grad()
def inference_numbers(model, seeds):
    inputs = [{"image": picture(seed), "height": 360, "width": 480} for seed in seeds]
    numbers = {}
    for name, feature in model.backbone(model.preprocess_image(inputs).tensor).items():
        values = feature.double().flatten()
        probe = values[torch.linspace(0, len(values) - 1, 48).long()]
        numbers[f"feat/{name}"] = [
            *feature.shape,
            *probe.tolist(),
            values.mean().item(),
            values.std().item(),
        ]
    for i, output in enumerate(model(inputs)):
        numbers[f"det{i}"] = output["instances"]
    return numbers


def training_numbers(cfg, model, batch):
    model.train()
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    numbers = {}
    for step in range(3):
        numbers.update(loss_numbers(model, batch, step))
        numbers[f"lr{step}"] = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
    return numbers


def loss_numbers(model, batch, step):
    """Return the losses and, of the first step, the norms of the gradients, which stay."""
    model.zero_grad()
    losses = model(batch)
    numbers = {f"loss{step}/{name}": loss.item() for name, loss in losses.items()}
    sum(losses.values()).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if step == 0:
        norms = {name: grad.double().norm().item() for name, grad in trained.items()}
        numbers.update({f"gradnorm/{name}": norm for name, norm in norms.items()})
    return numbers


def values_for(name, shape):
    """Draw a parameter or buffer from the stream of its name, at a scale that keeps activations in range."""
    noise = (
        np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    )
    if len(shape) > 1:
        is_last = any(part in name for part in LAST_LAYERS)
        gain = 1.0 if is_last else np.sqrt(2.0)
        return (noise * gain / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    if name.endswith("running_var"):
        return 1.0 + 0.1 * np.abs(noise)
    if name.endswith("weight"):
        scale = (
            0.015
            if "stem" in name
            else 0.3
            if ".conv3.norm" in name or ".conv2.norm" in name
            else 1.0
        )
        return (scale * (1 + 0.05 * noise)).astype(np.float32)
    return 0.05 * noise


def picture(seed):
    """Draw a smooth colour field with six rectangles and noise: (3, 240, 320) uint8."""
    random, (height, width) = np.random.RandomState(seed), SIZE
    y, x = np.mgrid[0:height, 0:width]
    channels = []
    for _ in range(3):
        wave = np.sin(x / random.uniform(15, 60) + random.uniform(0, 6))
        channels.append(127 + 60 * wave * np.cos(y / random.uniform(15, 60)))
    image = np.stack(channels)
    for _ in range(6):
        left, top = random.randint(0, width - 60), random.randint(0, height - 60)
        wide, high = random.randint(20, 60), random.randint(20, 60)
        image[:, top : top + high, left : left + wide] = random.uniform(0, 255, (3, 1, 1))
    return torch.from_numpy(
        np.clip(image + random.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
    )


def training_input(seed, num_classes):
    random, (height, width) = np.random.RandomState(seed + 7), SIZE
    corner = random.uniform(0, [width - 130, height - 130], (5, 2))
    boxes = np.concatenate([corner, corner + random.uniform(25, 125, (5, 2))], axis=1).astype(
        np.float32
    )
    classes = torch.from_numpy(random.randint(0, num_classes, 5))
    masks = PolygonMasks([[ellipse(box)] for box in boxes])
    instances = Instances(SIZE, gt_boxes=Boxes(boxes), gt_classes=classes, gt_masks=masks)
    return {"image": picture(seed), "instances": instances}


def ellipse(box):
    """Return the twelve-sided polygon within an ellipse that fills the box."""
    x0, y0, x1, y1 = box
    angle = np.linspace(0, 2 * np.pi, 13)[:-1]
    x, y = (
        (x0 + x1) / 2 + (x1 - x0) / 2 * np.cos(angle),
        (y0 + y1) / 2 + (y1 - y0) / 2 * np.sin(angle),
    )
    return np.stack([x, y], axis=1).reshape(-1).astype(np.float64)


@pytest.mark.parametrize("kind", ["feat/", "loss", "gradnorm/", "lr"])
def test_numbers_are_those_of_detectron2(kind, recorded, observed):
    names = {name for name in recorded if name.startswith(kind)}
    assert names == {name for name in observed if name.startswith(kind)}
    errors = {name: relative_error(observed[name], recorded[name]) for name in names}
    assert {name: error for name, error in errors.items() if not error < 2e-3} == {}


def relative_error(number, expected):
    return np.abs(np.asarray(number) - expected).max() / (np.abs(expected).max() + 1e-8)


@pytest.mark.parametrize("image", [0, 1])
def test_detections_are_those_of_detectron2(image, recorded, observed):
    check_detections(image, recorded, observed)


def check_detections(image, recorded, observed):
    """Of the recorded detections, 97 % are there: same class, score and place.

    That is an IoU above 0.98, or corners within 0.05 pixels, of which small boxes have fewer.
    """
    found = observed[f"det{image}"]
    boxes = torch.from_numpy(recorded[f"det{image}/boxes"])
    is_near = (boxes[:, None] - found.pred_boxes.tensor).abs().amax(dim=2) < 0.05
    same_place = (pairwise_iou(Boxes(boxes), found.pred_boxes) > 0.98) | is_near
    scores = torch.from_numpy(recorded[f"det{image}/scores"])[:, None]
    same_score = (scores - found.scores).abs() < 1e-3 * (1 + scores)
    same_class = torch.from_numpy(recorded[f"det{image}/classes"])[:, None] == found.pred_classes
    is_same = same_place & same_score & same_class
    assert is_same.any(dim=1).float().mean() >= 0.97
    if f"det{image}/mask_area" in recorded:
        areas, match = (
            torch.from_numpy(recorded[f"det{image}/mask_area"]),
            is_same.float().argmax(dim=1),
        )
        found_areas = found.pred_masks.flatten(1).sum(dim=1)[match]
        is_close = (found_areas - areas).abs() <= 0.02 * areas + 2
        assert is_close[is_same.any(dim=1)].float().mean() >= 0.97


@pytest.mark.parametrize(
    "case",
    [
        case if case.startswith("fcos") else pytest.param(case, marks=pytest.mark.slow)
        for case in LAZY_CASES
    ],
)
def test_model_that_detectron2_describes_in_python_has_its_numbers(case):
    recorded = load(case)
    cfg, model = build(LAZY_CASES[case])
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    observed = inference_numbers(model.eval(), (11,))
    num_classes = cfg.get_by_full_key(find_architecture(cfg.MODEL.META_ARCHITECTURE).num_classes)
    observed |= loss_numbers(model.train(), [training_input(21, num_classes)], step=0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in build_optimizer(cfg, model).param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            observed[f"lr_factor/{name}"] = group["lr"] / cfg.SOLVER.BASE_LR
            observed[f"weight_decay/{name}"] = group["weight_decay"]
    kinds = ("feat/", "loss", "gradnorm/", "lr_factor/", "weight_decay/")
    assert {name for name in recorded if name.startswith(kinds)} == observed.keys() - {"det0"}
    errors = {
        name: relative_error(observed[name], recorded[name])
        for name in recorded
        # The bias of the keys adds the same to all logits of a query: its gradient is rounding.
        if name.startswith(kinds) and not name.endswith("attn.norm_k.bias")
    }
    assert {name: error for name, error in errors.items() if not error < 2e-3} == {}
    check_detections(0, recorded, observed)


def _drawn_batch():
    images = ImageList(torch.rand(2, 20, 30), [(10, 10), (20, 30)])
    return images, {"res4": torch.rand(2, 1024, 1, 2)}


@pytest.mark.parametrize(
    ("settings", "boxes", "expected"),
    [
        pytest.param(
            [], Boxes([[1, 1, 3, 3], [2, 2, 6, 6]]), (0.08011703193, 0.101470276), id="upright"
        ),
        pytest.param(
            [
                *("MODEL.PROPOSAL_GENERATOR.NAME", "RRPN"),
                *("MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator"),
                *("MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64]]),
                *("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.25, 1]]),
                *("MODEL.ANCHOR_GENERATOR.ANGLES", [[0, 60]]),
                *("MODEL.RPN.BBOX_REG_WEIGHTS", [1, 1, 1, 1, 1]),
            ],
            RotatedBoxes([[2, 2, 2, 2, 0], [4, 4, 4, 4, 0]]),
            (0.04291602224, 0.14507764578),
            id="rotated",
        ),
    ],
)
def test_seed_gives_the_proposal_losses_that_detectron2s_tests_record(settings, boxes, expected):
    torch.manual_seed(121)
    cfg = get_cfg()
    cfg.merge_from_list(settings)
    generator = build_proposal_generator(cfg, build_backbone(cfg).output_shape())
    images, features = _drawn_batch()
    truth = Instances((15, 15), gt_boxes=boxes)
    losses = generator(images, features, [truth[0], truth[1]])[1]
    found = [float(losses[name].detach()) for name in ("loss_rpn_cls", "loss_rpn_loc")]
    assert found == pytest.approx(expected, rel=1e-5)


def test_seed_gives_the_losses_of_regions_that_detectron2s_tests_record():
    torch.manual_seed(121)
    cfg = get_cfg()
    cfg.MODEL.ROI_BOX_HEAD.NAME, cfg.MODEL.ROI_BOX_HEAD.NUM_FC = "FastRCNNConvFCHead", 2
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.MASK_ON = "StandardROIHeads", True
    images, features = _drawn_batch()
    truths = []
    for boxes, classes in (
        ([[1, 1, 3, 3], [2, 2, 6, 6]], [2, 1]),
        ([[1, 5, 2, 8], [7, 3, 10, 5]], [1, 2]),
    ):
        masks = BitMasks(torch.rand(2, 15, 15) > 0.5)
        fields = {"gt_boxes": Boxes(boxes), "gt_classes": torch.tensor(classes), "gt_masks": masks}
        truths.append(Instances((15, 15), **fields))
    shapes = {"res4": ShapeSpec(channels=1024, stride=16)}
    generator, heads = build_proposal_generator(cfg, shapes), build_roi_heads(cfg, shapes)
    proposals, losses = generator(images, features, truths)
    losses |= heads(images, features, proposals, truths)[1]
    assert {name: float(loss.detach()) for name, loss in losses.items()} == pytest.approx(
        {
            "loss_rpn_cls": 0.08186662942,
            "loss_rpn_loc": 0.11048381031,
            "loss_cls": 4.52537298203,
            "loss_box_reg": 0.00978572015,
            "loss_mask": 0.69318449497,
        },
        rel=1e-5,
    )
