"""What runs on a GPU: every family of models, the layers beside their numbers on a CPU, a resumed run, an evaluation.

`DETKIT_TEST_DEVICE=cpu python -m pytest -m gpu tests/end_to_end/test_on_gpu.py` runs the same on a CPU, where there is no GPU to
try these tests on. Numbers are compared in full float32: TensorFloat-32, torch's default in convolutions, keeps three digits.
"""

import copy
import math
import os

import pytest
import torch
from torch import nn

from detkit.data import DatasetCatalog, DatasetMapper
from detkit.engine import DefaultPredictor, DefaultTrainer
from detkit.evaluation import build_evaluator
from detkit.layers import (
    Conv2d,
    ModulatedDeformConv,
    NMSMethod,
    ROIAlign,
    batched_nms,
    get_norm,
    sigmoid_focal_loss,
    suppress,
)
from detkit.modeling import Matcher, ROIPooler, build_model
from detkit.modeling.sampling import subsample_masks
from detkit.structures import (
    Boxes,
    ROIMasks,
    RotatedBoxes,
    pairwise_iou,
    pairwise_iou_rotated,
)
from detkit.utils.env import seed_all_rng
from detkit.utils.image import read_image
from tests.end_to_end.families import FAMILIES, family_config
from tests.end_to_end.test_perfect_predictions import perfect_instances
from tests.helpers import random_boxes

DEVICE = os.environ.get("DETKIT_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"
    ),
]
PRECISIONS = ["float32", "bf16", "fp16"]


@pytest.fixture(autouse=True)
def full_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def is_on_device(tensor):
    return tensor.device.type == DEVICE


def config_on_device(family):
    cfg = family_config(family)
    cfg.MODEL.DEVICE = DEVICE
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 2, 2, ()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.TEST.EVAL_PERIOD = 0
    cfg.VIS_PERIOD = 0
    return cfg


def training_batch(cfg):
    records = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])[:2]
    return [DatasetMapper(cfg, is_train=True)(record) for record in records]


# --- Models ---


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_trains_and_predicts(family, precision, workplace):
    if precision == "fp16" and DEVICE == "cpu":
        pytest.skip("float16 trains on CUDA only")
    cfg = config_on_device(family)
    if precision != "float32":
        cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = True, precision
    cfg.DATASETS.TEST = ()
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    losses = [value for value, _ in trainer.storage.history("total_loss").values()]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    assert all(is_on_device(parameter) for parameter in trainer.model.parameters())
    with torch.no_grad():
        (output,) = trainer.model.eval()([{"image": training_batch(cfg)[0]["image"]}])
    if "instances" in output:
        assert is_on_device(output["instances"].scores)
        assert output["instances"].pred_boxes.tensor.isfinite().all()
    if "sem_seg" in output:
        assert output["sem_seg"].isfinite().all()
    if "panoptic_seg" in output:
        assert is_on_device(output["panoptic_seg"][0])


def sampling_everything(family):
    """A family's config in which losses take all anchors and proposals: what differs is the arithmetic, not the draw."""
    cfg = family_config(family)
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 100_000
    cfg.MODEL.RPN.POSITIVE_FRACTION = cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION = 1.0
    return cfg


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_the_cpu(family, workplace):
    cfg = sampling_everything(family)
    batch = training_batch(cfg)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    models = [model, copy.deepcopy(model).to(DEVICE)]
    losses = [model(batch) for model in models]
    assert all(map(is_on_device, losses[1].values()))
    # A proposal whose score or overlap is at a limit may fall on the other side of it.
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name].cpu(), loss, rtol=5e-3, atol=1e-4, msg=name)
    for losses_of_one in losses:
        sum(losses_of_one.values()).backward()
    gradients = [
        torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])
        for model in models
    ]
    # Smooth L1 without a quadratic part, as RetinaNet's and the RPN's, has gradients of -1 or 1:
    # rounding turns the sign of a few (an H200: 2.8 % of RetinaNet's norm, below 2 % elsewhere).
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_are_those_of_the_cpu(family, workplace):
    cfg = family_config(family)
    batch = [{"image": x["image"]} for x in training_batch(cfg)]
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    with torch.no_grad():
        want = model(batch)
        found = copy.deepcopy(model).to(DEVICE)(batch)
    for want_i, found_i in zip(want, found, strict=True):
        if "instances" in want_i:
            check_same_instances(want_i["instances"], found_i["instances"].to("cpu"))
        if "sem_seg" in want_i:
            torch.testing.assert_close(
                found_i["sem_seg"].cpu(), want_i["sem_seg"], rtol=1e-3, atol=1e-3
            )
        if "panoptic_seg" in want_i:
            same = found_i["panoptic_seg"][0].cpu() == want_i["panoptic_seg"][0]
            assert same.float().mean() > 0.95


def check_same_instances(want, found):
    """All but few objects are found alike: with random weights many scores are close to each other or to a threshold."""
    assert abs(len(want) - len(found)) <= 0.05 * len(want) + 1
    if len(want) == 0:
        return
    assert len(found) > 0
    is_rotated = isinstance(want.pred_boxes, RotatedBoxes)
    iou = (pairwise_iou_rotated if is_rotated else pairwise_iou)(want.pred_boxes, found.pred_boxes)
    is_same = (
        (iou > 0.95)
        & (want.pred_classes[:, None] == found.pred_classes)
        & ((want.scores[:, None] - found.scores).abs() < 1e-3)
    )
    assert is_same.any(dim=1).float().mean() > 0.9
    if want.has("pred_masks"):
        pairs = is_same.any(dim=1), is_same.float().argmax(dim=1)
        differs = want.pred_masks[pairs[0]] != found.pred_masks[pairs[1][pairs[0]]]
        assert differs.float().mean() < 0.02


def test_all_that_a_run_can_do_beside_training(workplace):
    cfg = config_on_device("mask")
    cfg.TEST.EVAL_PERIOD, cfg.SOLVER.MAX_ITER, cfg.VIS_PERIOD = 2, 4, 2
    cfg.TEST.COMPUTE_LOSS = cfg.TEST.AUG.ENABLED = cfg.TEST.PRECISE_BN.ENABLED = True
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE = (64, 80), 120
    cfg.TEST.PRECISE_BN.NUM_ITER = 2
    cfg.MODEL_EMA.ENABLED = cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.ACCUM_STEPS = 2
    cfg.DATALOADER.NUM_WORKERS = 1
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    assert {"bbox", "segm", "bbox_TTA", "bbox_EMA"} <= set(results)


def test_resumed_run_goes_on_with_the_losses_of_the_whole_one(workplace):
    # Not bit for bit: on a GPU the gradient of ROIAlign is added up in any order. Another draw of anchors, from random numbers
    # that were not put back, would change losses by a tenth.
    def losses_of_run(name, stops):
        seed_all_rng(1)
        cfg = config_on_device("box")
        cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 4, 2
        cfg.OUTPUT_DIR = str(workplace / name)
        cfg.DATASETS.TEST = ()
        for start, stop in stops:
            trainer = DefaultTrainer(cfg)
            trainer.resume_or_load(resume=start > 0)
            assert trainer.start_iter == start
            trainer.max_iter = stop
            trainer.train()
        return {int(i): value for value, i in trainer.storage.history("total_loss").values()}

    whole = losses_of_run("whole", [(0, 4)])
    resumed = losses_of_run("resumed", [(0, 2), (2, 4)])
    for iteration in (2, 3):
        assert resumed[iteration] == pytest.approx(whole[iteration], rel=5e-3)


def test_predictor_finds_what_it_finds_on_the_cpu(trained, workplace, datasets):
    record = DatasetCatalog.get("shapes_val")[0]
    image = read_image(record["file_name"], "BGR")
    found = []
    for device in ("cpu", DEVICE):
        cfg = family_config("box").clone()
        cfg.merge_from_file(str(trained / "config.yaml"))
        cfg.merge_from_list(
            ["MODEL.DEVICE", device, "MODEL.WEIGHTS", str(trained / "model_final.pth")]
        )
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
        predictor = DefaultPredictor(cfg)
        predictor(image)  # prepared weights are made here, and used below
        found.append(predictor(image)["instances"])
    assert is_on_device(found[1].scores)
    check_same_instances(found[0], found[1].to("cpu"))


def test_objects_on_the_device_are_evaluated(workplace, tmp_path):
    cfg = config_on_device("mask")
    records = DatasetCatalog.get("shapes_val")
    evaluator = build_evaluator(cfg, "shapes_val", str(tmp_path))
    evaluator.reset()
    for record in records:
        instances = perfect_instances(record).to(DEVICE)
        instances.remove("pred_keypoints")
        evaluator.process(
            [{key: record[key] for key in ("image_id", "file_name")}], [{"instances": instances}]
        )
    results = evaluator.evaluate()
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)


# --- Layers and structures ---


def both(function, *arguments):
    """Return the results of a function of tensors on the CPU and on the device, the second moved to the CPU."""
    results = [function(*(a.to(device) for a in arguments)) for device in ("cpu", DEVICE)]
    results = [result if isinstance(result, tuple) else (result,) for result in results]
    assert all(map(is_on_device, results[1]))
    return results[0], tuple(result.cpu() for result in results[1])


def check_same(function, *arguments, rtol=1e-4, atol=1e-5):
    want, found = both(function, *arguments)
    torch.testing.assert_close(found, want, rtol=rtol, atol=atol)


def scored_boxes(count=2000, num_classes=5):
    generator = torch.Generator().manual_seed(1)
    # Distinct scores: which of two equal ones comes first is not said.
    scores = torch.randperm(count, generator=generator).float() / count
    return (
        random_boxes(count),
        scores + 1e-3,
        torch.randint(num_classes, (count,), generator=generator),
    )


@pytest.mark.parametrize("num_classes", [1, 5, 900])
def test_nms_keeps_the_same_boxes(num_classes):
    check_same(
        lambda *a: batched_nms(*a, iou_threshold=0.5), *scored_boxes(num_classes=num_classes)
    )


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_keeps_the_same_boxes(method):
    check_same(
        lambda *a: suppress(*a, 0.5, NMSMethod(method), min_score=0.05, topk=50), *scored_boxes(300)
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_align_has_the_same_values_and_gradients(memory_format, sampling_ratio):
    features = torch.randn(2, 8, 40, 50).to(memory_format=memory_format)
    rois = torch.cat([torch.arange(100)[:, None] % 2, random_boxes(100, 150.0)], dim=1)
    pool = ROIAlign(7, 1 / 4, sampling_ratio)

    def run(features, rois):
        features = features.detach().requires_grad_()
        pooled = pool(features, rois)
        pooled.square().sum().backward()
        return pooled.detach(), features.grad

    check_same(run, features, rois, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_regions_are_pooled_from_the_same_levels(dtype):
    features = [torch.randn(2, 8, 64 // 2**i, 96 // 2**i).to(dtype) for i in range(4)]
    pooler = ROIPooler(7, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 0, "ROIAlignV2", canonical_box_size=80)

    def pool(boxes, *features):
        return pooler(features, [Boxes(boxes), Boxes(boxes[:10])])

    # In half precision the pooled values are rounded once more.
    check_same(pool, random_boxes(60, 250.0), *features, atol=1e-4 if dtype.itemsize == 4 else 0.05)


def test_matcher_gives_the_same_labels():
    matcher = Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True)

    def match(objects, anchors):
        return matcher.match_boxes(Boxes(objects), Boxes(anchors), max_pairs=10_000)

    check_same(match, random_boxes(30, seed=1), random_boxes(3000, seed=2))
    check_same(match, torch.zeros(0, 4), random_boxes(30, seed=2))


def test_sample_has_the_wanted_sizes():
    labels = torch.randint(-1, 2, (3, 5000), device=DEVICE)
    positive, negative = subsample_masks(labels, 256, 0.5, bg_label=0)
    assert positive.sum(dim=1).tolist() == [128] * 3
    assert negative.sum(dim=1).tolist() == [128] * 3
    assert (labels[positive] == 1).all()
    assert (labels[negative] == 0).all()


def test_deformable_convolution_has_the_same_values_and_gradients():
    torch.manual_seed(0)
    layer = ModulatedDeformConv(4, 6, 3, padding=1, deformable_groups=2)
    x, offset, mask = torch.randn(2, 4, 9, 10), torch.randn(2, 36, 9, 10), torch.rand(2, 18, 9, 10)

    def run(*inputs):
        on_device = copy.deepcopy(layer).to(inputs[0].device)
        inputs = [t.detach().requires_grad_() for t in inputs]
        y = on_device(*inputs)
        y.square().sum().backward()
        return (
            y.detach(),
            *(t.grad for t in inputs),
            on_device.weight.grad,
            on_device.bias.grad,
        )

    check_same(run, x, offset, mask, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN"])
def test_convolution_with_its_norm_has_the_same_values(norm):
    torch.manual_seed(0)
    conv = Conv2d(64, 64, 3, padding=1, bias=False, norm=get_norm(norm, 64), activation=nn.ReLU())
    conv = conv.eval().to(memory_format=torch.channels_last)

    @torch.no_grad()
    def run(x):
        return copy.deepcopy(conv).to(x.device)(x)

    x = torch.randn(1, 64, 60, 60).to(memory_format=torch.channels_last)  # Winograd's on the CPU
    check_same(run, x, rtol=1e-3, atol=1e-3)


def test_focal_loss_has_the_same_value():
    logits, targets = torch.randn(1000, 20) * 4, torch.randint(0, 2, (1000, 20)).float()
    check_same(lambda *a: sigmoid_focal_loss(*a, 0.25, 2.0, "sum"), logits, targets)


def test_masks_are_pasted_alike():
    masks, boxes = torch.rand(40, 28, 28), random_boxes(40, 110.0)

    def paste(masks, boxes):
        return ROIMasks(masks).to_bitmasks(Boxes(boxes), 100, 120, 0.5).tensor

    want, found = both(paste, masks, boxes)
    assert (want[0] != found[0]).float().mean() < 1e-3  # where a value is the threshold
