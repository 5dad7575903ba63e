"""From files to losses, for every family of models: what the data give is what the heads take, empty images too."""

import math
from pathlib import Path

import pytest
import torch

from detkit.config import get_cfg
from detkit.data import DatasetCatalog, DatasetMapper, build_detection_train_loader
from detkit.data.datasets.shapes import generate_shapes
from detkit.modeling import build_model
from detkit.structures.mask_formats import polygons_to_rle
from detkit.utils.file_io import packaged_configs

TINY = [
    "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
    "MODEL.FPN.OUT_CHANNELS", 32, "MODEL.ROI_HEADS.NUM_CLASSES", 5, "MODEL.ROI_BOX_HEAD.FC_DIM", 32,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16, "INPUT.MIN_SIZE_TRAIN", (64,), "SOLVER.IMS_PER_BATCH", 2,
    "DATALOADER.NUM_WORKERS", 0, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False,
]  # fmt: skip
FAMILIES = {
    "polygons": (
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x", "shapes_train", ["INPUT.CROP.ENABLED", True], "loss_mask"
    ),
    "bitmaps": (
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x", "shapes_train", ["INPUT.MASK_FORMAT", "bitmask"], "loss_mask"
    ),
    "keypoints": (
        "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x", "shapes_train_keypoints",
        ["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 5, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (16,)], "loss_keypoint",
    ),
    "panoptic": (
        "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x", "shapes_train_panoptic_separated",
        ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 5, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32], "loss_sem_seg",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generate_shapes(folder / "shapes", num_train=3, num_val=1)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_model_trains_on_generated_images_and_on_empty_ones(family, root, monkeypatch):
    monkeypatch.setenv("DETKIT_DATASETS", str(root))
    config, name, settings, loss = FAMILIES[family]
    cfg = get_cfg()
    cfg.merge_from_file(str(packaged_configs() / f"{config}.yaml"))
    cfg.merge_from_list([*TINY, "DATASETS.TRAIN", (name,), *settings])
    torch.manual_seed(0)
    model = build_model(cfg).train()
    assert model(next(iter(build_detection_train_loader(cfg))))[loss] > 0
    mapper = DatasetMapper(cfg, is_train=True)
    losses = model(
        [mapper({**record, "annotations": []}) for record in DatasetCatalog.get(name)[:2]]
    )
    assert all(math.isfinite(value) for value in (loss.detach() for loss in losses.values()))
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_mixed_masks_train_without_a_flag(root, monkeypatch):
    monkeypatch.setenv("DETKIT_DATASETS", str(root))
    config, name, _, loss = FAMILIES["polygons"]
    cfg = get_cfg()
    cfg.merge_from_file(str(packaged_configs() / f"{config}.yaml"))
    cfg.merge_from_list([*TINY, "DATASETS.TRAIN", (name,)])
    mapper, records = DatasetMapper(cfg, is_train=True), DatasetCatalog.get(name)[:2]
    first = records[0]["annotations"][0]
    first["segmentation"] = polygons_to_rle(
        first["segmentation"], records[0]["height"], records[0]["width"]
    )
    batch = [mapper(record) for record in records]
    assert {type(sample["instances"].gt_masks).__name__ for sample in batch} == {
        "BitMasks",
        "PolygonMasks",
    }
    assert build_model(cfg).train()(batch)[loss] > 0
