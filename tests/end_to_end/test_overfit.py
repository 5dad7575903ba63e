"""Each family of models learns four generated pictures by heart: what it finds in them then is what is there."""

import pytest
import torch

from detkit.data import DatasetCatalog, DatasetMapper
from detkit.data.datasets.shapes import generate_shapes
from detkit.modeling import build_model
from detkit.structures import BitMasks, pairwise_iou
from tests.end_to_end.families import FAMILIES, SLOW_FAMILIES, family_config

pytestmark = pytest.mark.slow

NUM_STEPS = 80  # 3 to 9 s of one core
# The first two from scratch, and without convolutions; an angle more to learn.
SLOW_LEARNERS = {
    "Swin": 200,
    "MViT": 200,
    "ViT of timm": 120,
    "rotated": 140,
    "rotated on one map": 120,
}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    generate_shapes(
        folder / "shapes", num_train=4, num_val=1, seed=14
    )  # no object is smaller than 14 of 64 pixels
    generate_shapes(folder / "shapes_rotated", num_train=4, num_val=1, seed=116, rotated=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETKIT_DATASETS", str(folder))
        yield folder


@pytest.mark.parametrize("family", [*FAMILIES, *SLOW_FAMILIES])
def test_four_pictures_are_learnt(family, datasets):
    if "timm" in family:
        pytest.importorskip("timm")
    cfg = family_config(family)
    torch.manual_seed(1)
    batch = [
        DatasetMapper(cfg, is_train=True)(record)
        for record in DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    ]
    model = build_model(cfg)
    learn(model, batch, SLOW_LEARNERS.get(family, NUM_STEPS))
    with torch.no_grad():
        outputs = model.eval()([{"image": x["image"]} for x in batch])
    if "instances" in outputs[0]:
        check_instances(batch, [output["instances"] for output in outputs])
    if "sem_seg" in outputs[0]:
        assert mean_iou(batch, [output["sem_seg"].argmax(dim=0) for output in outputs]) > 0.7
    if "panoptic_seg" in outputs[0]:
        assert panoptic_quality(batch, [output["panoptic_seg"] for output in outputs]) > 0.7


def learn(model, batch, num_steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.004, total_steps=num_steps)
    for _ in range(num_steps):
        loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def check_instances(batch, found):
    """Every object is found, with its mask and its keypoints, and for two objects at most one thing that is not there."""
    confident = [found_i[found_i.scores > 0.5] for found_i in found]
    for x, found_i in zip(batch, confident, strict=True):
        truth = x["instances"]
        iou = pairwise_iou(truth.gt_boxes, found_i.pred_boxes) * (
            truth.gt_classes[:, None] == found_i.pred_classes
        )
        assert iou.shape[1] > 0, "nothing found"
        assert (iou.max(dim=1).values > 0.6).all(), iou
        best = found_i[iou.argmax(dim=1)]
        if truth.has("gt_masks") and best.has("pred_masks"):
            assert (mask_iou(truth.gt_masks, best.pred_masks) > 0.6).all()
        if best.has("pred_keypoints"):
            assert keypoint_error(truth, best) < 0.1
    num_objects = sum(len(x["instances"]) for x in batch)
    assert sum(map(len, confident)) <= num_objects * 1.5


def mask_iou(truth, masks):
    """Return (M,) IoU of polygons with (M, H, W) masks."""
    truth = BitMasks.from_polygon_masks(truth, *masks.shape[1:]).tensor
    return (truth & masks).sum(dim=(1, 2)) / (truth | masks).sum(dim=(1, 2))


def keypoint_error(truth, found):
    """Return the median distance of labelled keypoints from where they were found, in sides of their objects."""
    points = truth.gt_keypoints.tensor
    distance = (points[..., :2] - found.pred_keypoints[..., :2]).norm(dim=2)
    return (distance / truth.gt_boxes.area().sqrt()[:, None])[points[..., 2] > 0].median()


def mean_iou(batch, found):
    """Return the mean over the classes that are there of the IoU over all pictures."""
    truth, found = (
        torch.cat([maps.flatten() for maps in labels])
        for labels in ([x["sem_seg"] for x in batch], found)
    )
    ious = [
        ((truth == k) & (found == k)).sum() / ((truth == k) | (found == k)).sum()
        for k in truth.unique()
    ]
    return torch.stack(ious).mean()


def panoptic_quality(batch, found):
    """Return the sum of the IoU of matched segments over the mean number of true and of found ones, for all classes."""
    iou_sum = num_segments = 0.0
    for x, (segments, infos) in zip(batch, found, strict=True):
        truth = true_segments(x)
        num_segments += (len(truth) + len(infos)) / 2
        for info in infos:
            mask, kind = segments == info["id"], (info["isthing"], info["category_id"])
            ious = [
                ((mask & m).sum() / (mask | m).sum()).item() for other, m in truth if other == kind
            ]
            iou_sum += max((iou for iou in ious if iou > 0.5), default=0.0)
    return iou_sum / num_segments


def true_segments(x):
    """Return what kind each segment of a picture is, and its (H, W) mask."""
    things, labels = x["instances"], x["sem_seg"]
    masks = BitMasks.from_polygon_masks(things.gt_masks, *labels.shape).tensor
    stuff = [((False, k), labels == k) for k in labels.unique().tolist() if k not in (0, 255)]
    return [
        ((True, k), mask) for k, mask in zip(things.gt_classes.tolist(), masks, strict=True)
    ] + stuff
