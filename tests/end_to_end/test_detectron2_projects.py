"""Projects written for Detectron2, in small: their configs, parts and train scripts, through the alias.

Each is of our own, and uses of the API what a project of Detectron2's uses: multi-branch backbones (TridentNet), atrous
networks with a schedule of their own (DeepLab), mask heads over feature maps (PointRend), segments read by a mapper and
predicted in one map (Panoptic-DeepLab).
"""

import detkit.as_detectron2  # noqa: F401

# isort: split
import copy
import math

import detectron2.data.transforms as T
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode as CN
from detectron2.config import configurable
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_train_loader
from detectron2.data import detection_utils as utils
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOPanopticEvaluator, DatasetEvaluators
from detectron2.layers import ASPP, Conv2d, ShapeSpec, batched_nms, cat, get_norm
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    ResNet,
    ResNetBlockBase,
    StandardROIHeads,
    build_backbone,
    build_sem_seg_head,
)
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.modeling.proposal_generator.rpn import RPN
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_inference, mask_rcnn_loss
from detectron2.solver import build_lr_scheduler
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.solver.lr_scheduler import _get_warmup_factor_at_iter
from detectron2.structures import ImageList, Instances
from panopticapi.utils import rgb2id
from torch import nn
from torch.nn import functional as F

from tests.end_to_end.families import family_config

NUM_BRANCHES = 3


class BranchBlock(ResNetBlockBase):
    """One convolution at several rates; the results become images of a larger batch."""

    def __init__(self, in_channels, out_channels, *, stride, norm):
        super().__init__(in_channels, out_channels, stride)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3) * 0.05)
        self.norm = get_norm(norm, out_channels)

    def forward(self, x):
        found = [
            self.norm(F.conv2d(x, self.weight, stride=self.stride, padding=d, dilation=d)).relu()
            for d in range(1, NUM_BRANCHES + 1 if self.training else 2)
        ]
        return torch.cat(found)


@BACKBONE_REGISTRY.register()
def build_branching_resnet_backbone(cfg, input_shape):
    norm = cfg.MODEL.RESNETS.NORM
    stem = BasicStem(in_channels=input_shape.channels, out_channels=16, norm=norm)
    first = ResNet.make_stage(
        block_class=BottleneckBlock,
        num_blocks=2,
        stride_per_block=[2, 1],
        dilation_per_block=[1, 2],
        in_channels=16,
        out_channels=32,
        bottleneck_channels=8,
        norm=norm,
        stride_in_1x1=False,
    )
    last = ResNet.make_stage(
        BranchBlock, 1, stride_per_block=[2], in_channels=32, out_channels=32, norm=norm
    )
    return ResNet(stem, [first, last], out_features=["res3"], freeze_at=1)


@PROPOSAL_GENERATOR_REGISTRY.register()
class BranchingRPN(RPN):
    def __init__(self, cfg, shape):
        super().__init__(cfg, shape)
        self.num_branch = cfg.MODEL.TINY_BRANCHES.NUM_BRANCH

    def forward(self, images, features, gt_instances=None):
        times = self.num_branch if self.training else 1
        all_images = ImageList(torch.cat([images.tensor] * times), images.image_sizes * times)
        all_gt = gt_instances * times if gt_instances is not None else None
        return super().forward(all_images, features, all_gt)


@ROI_HEADS_REGISTRY.register()
class BranchingHeads(StandardROIHeads):
    def __init__(self, cfg, input_shape):
        super().__init__(cfg, input_shape)
        self.num_branch = cfg.MODEL.TINY_BRANCHES.NUM_BRANCH

    def forward(self, images, features, proposals, targets=None):
        all_targets = targets * self.num_branch if targets is not None else None
        found, losses = super().forward(images, features, proposals, all_targets)
        if self.training:
            return found, losses
        merged = Instances.cat(found[:1])
        keep = batched_nms(merged.pred_boxes.tensor, merged.scores, merged.pred_classes, 0.5)
        return [merged[keep], *found[1:]], {}


@SEM_SEG_HEADS_REGISTRY.register()
class AtrousHead(nn.Module):
    @configurable
    def __init__(self, input_shape, *, channels, dilations, num_classes, ignore_value, stride):
        super().__init__()
        self.in_feature = min(input_shape, key=lambda name: -input_shape[name].stride)
        self.aspp = ASPP(
            input_shape[self.in_feature].channels, channels, dilations, norm="SyncBN",
            activation=F.relu, dropout=0.1, use_depthwise_separable_conv=True,
        )  # fmt: skip
        self.predictor = Conv2d(channels, num_classes, kernel_size=1)
        self.ignore_value, self.stride = ignore_value, input_shape[self.in_feature].stride

    @classmethod
    def from_config(cls, cfg, input_shape):
        head = cfg.MODEL.SEM_SEG_HEAD
        return {
            "input_shape": {k: v for k, v in input_shape.items() if k in head.IN_FEATURES},
            "channels": head.ASPP_CHANNELS,
            "dilations": head.ASPP_DILATIONS,
            "num_classes": head.NUM_CLASSES,
            "ignore_value": head.IGNORE_VALUE,
            "stride": head.COMMON_STRIDE,
        }

    def forward(self, features, targets=None):
        y = self.predictor(self.aspp(features[self.in_feature]))
        y = F.interpolate(y, scale_factor=self.stride, mode="bilinear", align_corners=False)
        if self.training:
            return None, {
                "loss_sem_seg": F.cross_entropy(y, targets, ignore_index=self.ignore_value)
            }
        return y, {}


class PolySchedule(torch.optim.lr_scheduler.LRScheduler):
    def __init__(self, optimizer, max_iters, power, warmup_iters):
        self.max_iters, self.power, self.warmup_iters = max_iters, power, warmup_iters
        super().__init__(optimizer)

    def get_lr(self):
        warmup = _get_warmup_factor_at_iter("linear", self.last_epoch, self.warmup_iters, 0.001)
        left = math.pow(1.0 - self.last_epoch / self.max_iters, self.power)
        return [base_lr * warmup * left for base_lr in self.base_lrs]


@ROI_MASK_HEAD_REGISTRY.register()
class MapsMaskHead(nn.Module):
    """Takes the feature maps themselves, by name."""

    @configurable
    def __init__(self, input_shape, *, in_features, num_classes):
        super().__init__()
        assert all(isinstance(shape, ShapeSpec) for shape in input_shape.values())
        self.in_features = in_features
        channels = sum(input_shape[name].channels for name in in_features)
        self.fc = nn.Linear(channels, num_classes * 49)

    @classmethod
    def from_config(cls, cfg, input_shape):
        head = cfg.MODEL.ROI_MASK_HEAD
        classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        return {"input_shape": input_shape, "in_features": head.IN_FEATURES, "num_classes": classes}

    def forward(self, features, instances):
        means = cat([features[name].mean(dim=(2, 3)) for name in self.in_features], dim=1)
        counts = torch.tensor([len(x) for x in instances], device=means.device)
        logits = self.fc(means).repeat_interleave(counts, dim=0).view(int(counts.sum()), -1, 7, 7)
        if self.training:
            return {"loss_mask": mask_rcnn_loss(logits, instances)}
        mask_rcnn_inference(logits, instances)
        return instances


class ContrastTransform(T.Transform):
    def apply_image(self, img, interp=None):
        return (img * 0.9).astype(img.dtype)

    def apply_coords(self, coords):
        return coords

    def apply_segmentation(self, segmentation):
        return segmentation


class SemanticTrainer(DefaultTrainer):
    @classmethod
    def build_train_loader(cls, cfg):
        crop = cfg.INPUT.CROP
        augs = [
            T.ResizeShortestEdge(
                cfg.INPUT.MIN_SIZE_TRAIN,
                cfg.INPUT.MAX_SIZE_TRAIN,
                cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING,
            ),
            T.RandomCrop_CategoryAreaConstraint(
                crop.TYPE,
                crop.SIZE,
                crop.SINGLE_CATEGORY_MAX_AREA,
                cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            ),
            ContrastTransform(),
            T.RandomFlip(),
        ]
        mapper = DatasetMapper(cfg, is_train=True, augmentations=augs)
        return build_detection_train_loader(cfg, mapper=mapper)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        if cfg.SOLVER.LR_SCHEDULER_NAME != "TinyPolyLR":
            return build_lr_scheduler(cfg, optimizer)
        solver = cfg.SOLVER
        return PolySchedule(optimizer, solver.MAX_ITER, solver.POLY_LR_POWER, solver.WARMUP_ITERS)

    @classmethod
    def build_optimizer(cls, cfg, model):
        params = get_default_optimizer_params(
            model, base_lr=cfg.SOLVER.BASE_LR, weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM
        )
        assert cfg.SOLVER.OPTIMIZER == "ADAM"
        return maybe_add_gradient_clipping(cfg, torch.optim.Adam)(params, cfg.SOLVER.BASE_LR)


def small(cfg, folder):
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, cfg.VIS_PERIOD = "", str(folder), 0
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 2, 2, 0
    cfg.SOLVER.STEPS = ()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    return cfg


def run(trainer_class, cfg):
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=False)
    return trainer, trainer.train()


def test_backbone_of_many_branches_trains_and_predicts(workplace):
    cfg = small(family_config("box"), workplace / "out")
    cfg.MODEL.TINY_BRANCHES = CN({"NUM_BRANCH": NUM_BRANCHES})
    cfg.MODEL.BACKBONE.NAME = "build_branching_resnet_backbone"
    cfg.MODEL.PROPOSAL_GENERATOR.NAME, cfg.MODEL.ROI_HEADS.NAME = "BranchingRPN", "BranchingHeads"
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res3"]
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8, 16, 32, 64]]
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.SOLVER.IMS_PER_BATCH = 1
    _, results = run(DefaultTrainer, cfg)
    assert "AP" in results["bbox"]


def test_atrous_network_with_a_schedule_of_its_own(workplace):
    file = workplace / "atrous.yaml"
    file.write_text(
        "MODEL:\n"
        "  SEM_SEG_HEAD: {NAME: AtrousHead, IN_FEATURES: !!python/tuple [res5], ASPP_CHANNELS: 8}\n"
        "  RESNETS: {OUT_FEATURES: [res5], RES5_DILATION: 2}\n"
        "  BACKBONE: {NAME: build_resnet_backbone}\n"
        "SOLVER: {LR_SCHEDULER_NAME: TinyPolyLR, OPTIMIZER: ADAM, WARMUP_ITERS: 0, BASE_LR: 1e-3}\n"
        "INPUT: {CROP: {ENABLED: True, TYPE: absolute, SIZE: [48, 64], SINGLE_CATEGORY_MAX_AREA: 0.9}}\n"
    )
    cfg = family_config("semantic")
    cfg.SOLVER.POLY_LR_POWER = 0.9
    cfg.MODEL.SEM_SEG_HEAD.ASPP_CHANNELS = 16
    cfg.MODEL.SEM_SEG_HEAD.ASPP_DILATIONS = [1, 2, 3]
    cfg.merge_from_file(str(file))
    trainer, results = run(SemanticTrainer, small(cfg, workplace / "out"))
    assert "mIoU" in results["sem_seg"]
    assert isinstance(trainer.optimizer, torch.optim.Adam)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == pytest.approx([0.0] * len(rates))


def test_mask_head_over_feature_maps(workplace):
    file = workplace / "maps.yaml"
    file.write_text(
        'MODEL: {ROI_MASK_HEAD: {NAME: MapsMaskHead, POOLER_TYPE: "", IN_FEATURES: [p3]}}'
    )
    cfg = family_config("mask")
    cfg.MODEL.ROI_MASK_HEAD.IN_FEATURES = ("p2",)
    cfg.merge_from_file(str(file))
    _, results = run(DefaultTrainer, small(cfg, workplace / "out"))
    assert np.isfinite(results["segm"]["AP"])


class SegmentsMapper:
    """Reads the colours of a panoptic png, turned and cut with the image, as one map of classes."""

    @configurable
    def __init__(self, *, augmentations, image_format, ignore_label):
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format, self.ignore_label = image_format, ignore_label

    @classmethod
    def from_config(cls, cfg):
        ignore_label = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).ignore_label
        return {
            "augmentations": [T.RandomCrop("absolute", (64, 64)), T.RandomFlip()],
            "image_format": cfg.INPUT.FORMAT,
            "ignore_label": ignore_label,
        }

    def __call__(self, record):
        record = copy.deepcopy(record)
        image = utils.read_image(record["file_name"], format=self.image_format)
        utils.check_image_size(record, image)
        colors = utils.read_image(record.pop("pan_seg_file_name"), "RGB")
        sample = T.AugInput(image, sem_seg=colors)
        self.augmentations(sample)
        ids = rgb2id(sample.sem_seg)
        classes = np.full(ids.shape, self.ignore_label)
        for segment in record["segments_info"]:
            classes[ids == segment["id"]] = segment["category_id"]
        record["image"] = torch.as_tensor(np.ascontiguousarray(sample.image.transpose(2, 0, 1)))
        record["sem_seg"] = torch.as_tensor(classes).long()
        return record


@META_ARCH_REGISTRY.register()
class SegmentsInOneMap(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.backbone = build_backbone(cfg)
        self.sem_seg_head = build_sem_seg_head(cfg, self.backbone.output_shape())
        mean = torch.tensor(cfg.MODEL.PIXEL_MEAN).view(-1, 1, 1)
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.label_divisor = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).label_divisor

    @property
    def device(self):
        return self.pixel_mean.device

    def forward(self, batched_inputs):
        images = [(x["image"].to(self.device) - self.pixel_mean) / 60 for x in batched_inputs]
        images = ImageList.from_tensors(images, self.backbone.size_divisibility)
        features = self.backbone(images.tensor)
        if self.training:
            targets = [x["sem_seg"].to(self.device) for x in batched_inputs]
            targets = ImageList.from_tensors(targets, self.backbone.size_divisibility, 255).tensor
            return self.sem_seg_head(features, targets)[1]
        outputs = []
        scores, _ = self.sem_seg_head(features)
        for scores_i, x, size in zip(scores, batched_inputs, images.image_sizes, strict=True):
            found = sem_seg_postprocess(scores_i, size, x["height"], x["width"]).argmax(dim=0)
            outputs.append({"panoptic_seg": (found * self.label_divisor, None)})
        return outputs


class SegmentsTrainer(DefaultTrainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(cfg, mapper=SegmentsMapper(cfg))

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        assert MetadataCatalog.get(dataset_name).evaluator_type == "coco_panoptic_seg"
        return DatasetEvaluators([COCOPanopticEvaluator(dataset_name, output_folder)])


def test_segments_in_one_map(workplace):
    cfg = small(family_config("semantic"), workplace / "out")
    cfg.MODEL.META_ARCHITECTURE = "SegmentsInOneMap"
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 9
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("shapes_train_panoptic",)
    _, results = run(SegmentsTrainer, cfg)
    assert 0 <= results["panoptic_seg"]["PQ"] <= 100
    assert results["panoptic_seg"]["SQ"] >= 0
