"""Each family of models learns four generated pictures by heart: what it finds in them then is what is there."""

import pytest
import torch

from detkit.config import get_cfg
from detkit.data import DatasetCatalog, DatasetMapper
from detkit.data.datasets.shapes import generate_shapes
from detkit.data.datasets.shapes_scene import SHAPES_KEYPOINTS
from detkit.model_zoo import find_config
from detkit.modeling import build_model
from detkit.structures import BitMasks, pairwise_iou

pytestmark = pytest.mark.slow

COMMON = {
    "MODEL.DEVICE": "cpu",
    "MODEL.ROI_BOX_HEAD.FC_DIM": 128,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 64,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 64,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [128]],
    "INPUT.MIN_SIZE_TRAIN": [64],
    "INPUT.MAX_SIZE_TRAIN": 96,
    "INPUT.RANDOM_FLIP": "none",
    "SEED": 1,
}
CASCADE = {"MODEL.ROI_HEADS.NAME": "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}
KEYPOINT = {
    "MODEL.KEYPOINT_ON": True,
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": len(SHAPES_KEYPOINTS),
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [64, 64],
    "DATASETS.TRAIN": ["shapes_train_keypoints"],
}
RETINANET = {
    "MODEL.META_ARCHITECTURE": "RetinaNet",
    "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.RETINANET.NUM_CLASSES": 5,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[12, 17], [24, 34], [48, 68], [96, 136], [192, 270]],
}
FAMILIES = {
    "box": {},
    "mask": {"MODEL.MASK_ON": True},
    "keypoint": KEYPOINT,
    "cascade": CASCADE,
    "RetinaNet": RETINANET,
}
NUM_STEPS = 80  # 3 to 7 s on a processor that has nothing else to do


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    generate_shapes(folder / "shapes", num_train=4, num_val=1, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETKIT_DATASETS", str(folder))
        yield DatasetCatalog.get("shapes_train")


@pytest.mark.parametrize("family", FAMILIES)
def test_four_pictures_are_learnt(family, pictures):
    cfg = get_cfg()
    cfg.merge_from_file(find_config("quick_start/faster_rcnn_R_18_FPN_shapes.yaml"))
    cfg.merge_from_list([item for pair in {**COMMON, **FAMILIES[family]}.items() for item in pair])
    torch.manual_seed(1)
    batch = [DatasetMapper(cfg, is_train=True)(record) for record in pictures]
    model = build_model(cfg)
    learn(model, batch)
    with torch.no_grad():
        outputs = model.eval()([{"image": x["image"]} for x in batch])
    num_confident = 0
    for x, output in zip(batch, outputs, strict=True):
        found = output["instances"]
        found = found[found.scores > 0.5]
        num_confident += len(found)
        best = match(x["instances"], found)
        if cfg.MODEL.MASK_ON:
            assert (mask_iou(x["instances"].gt_masks, found.pred_masks[best]) > 0.5).all()
        if cfg.MODEL.KEYPOINT_ON:
            truth = x["instances"].gt_keypoints.tensor
            distance = (truth[..., :2] - found.pred_keypoints[best][..., :2]).norm(dim=2)
            assert distance[truth[..., 2] > 0].median() < 4
    assert num_confident <= 2 * sum(len(x["instances"]) for x in batch)


def learn(model, batch):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.004, total_steps=NUM_STEPS)
    for _ in range(NUM_STEPS):
        loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def match(truth, found):
    """Give each object the detection of its class that overlaps it most, by an IoU above 0.6."""
    iou = pairwise_iou(truth.gt_boxes, found.pred_boxes) * (truth.gt_classes[:, None] == found.pred_classes)
    assert (iou.max(dim=1).values > 0.6).all()
    return iou.argmax(dim=1)


def mask_iou(truth, masks):
    """Give (M,) IoU of polygons with (M, H, W) masks."""
    truth = BitMasks.from_polygon_masks(truth, *masks.shape[1:]).tensor
    return (truth & masks).sum(dim=(1, 2)) / (truth | masks).sum(dim=(1, 2))
