"""The same detectors in detkit and in torchvision, with the same weights and synthetic data.

What makes the comparison fair: torchvision's model as `maskrcnn_resnet50_fpn` builds it with
pretrained weights (frozen batch norm, three trained stages), and detkit's of
`configs/torchvision/`, which gives the same boxes, loaded with the same random weights. Residual
branches are damped and last layers scaled so that features, scores and boxes are as far apart as
those of a trained model: about as many proposals and detections have to be suppressed. Images are
as large as the models resize to, and lie on the device as bytes.
"""

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contest import Contest, OwnProcess, Setting
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import misc
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detkit.checkpoint import DetectionCheckpointer
from detkit.config import CfgNode
from detkit.engine import SimpleTrainer, create_ddp_model
from detkit.layers import PreparedWeights
from detkit.model_zoo import get_config
from detkit.modeling import build_model
from detkit.solver import build_optimizer
from detkit.structures import BitMasks, Boxes, Instances, PolygonMasks
from detkit.utils.env import reuse_freed_memory
from detkit.utils.events import EventStorage

KINDS = {
    "mask": "torchvision/maskrcnn_resnet50_fpn.yaml",
    "faster": "torchvision/fasterrcnn_resnet50_fpn.yaml",
    "retinanet": "torchvision/retinanet_resnet50_fpn.yaml",
}
_NUM_CLASSES = 90
# Arguments of torchvision's R-CNNs, the keys of the same numbers, and what a try takes.
_TINY = {
    "rpn_post_nms_top_n_train": ("MODEL.RPN.POST_NMS_TOPK_TRAIN", 20),
    "rpn_post_nms_top_n_test": ("MODEL.RPN.POST_NMS_TOPK_TEST", 20),
    "box_batch_size_per_image": ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16),
    "box_detections_per_img": ("TEST.DETECTIONS_PER_IMAGE", 5),
}
# So small that the weights, and with them the work to do, stay what they are.
_LEARNING_RATE = 1e-8
# Standard deviation of the outputs of last layers, as far as a trained model's.
_SPREADS = {
    "rpn.head.cls_logits": 2.0,
    "rpn.head.bbox_pred": 0.3,
    "roi_heads.box_predictor.cls_score": 2.0,
    "roi_heads.box_predictor.bbox_pred": 1.0,
    "head.classification_head.cls_logits": 1.0,
    "head.regression_head.bbox_reg": 0.3,
}


@dataclass(frozen=True)
class Task:
    """What is done, and on what.

    Attributes:
        device: Runs it.
        image_size: (height, width).
        num_objects: Per image, in training.
        is_tiny: Whether a few proposals and detections are enough, to try a program out.
    """

    device: torch.device
    image_size: tuple[int, int]
    num_objects: int = 10
    is_tiny: bool = False


class Pair:
    """A detector of one kind in both libraries."""

    def __init__(self, kind: str, task: Task) -> None:
        """Build both.

        Args:
            kind: Of `KINDS`.
            task: Device and image size.
        """
        self.kind, self.task = kind, task
        self.theirs = _torchvision_model(kind, task)
        cfg = get_config(KINDS[kind])
        if task.is_tiny:
            cfg.merge_from_list(
                [word for key_and_value in _TINY.values() for word in key_and_value]
            )
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "theirs.pth")
            torch.save(self.theirs.state_dict(), path)
            cfg.merge_from_list(["MODEL.WEIGHTS", path, "MODEL.DEVICE", str(task.device)])
            cfg.merge_from_list(["SOLVER.BASE_LR", _LEARNING_RATE])
            self.ours = build_model(cfg)
            DetectionCheckpointer(self.ours).load(path, checkpointables=[])
        self.backbone = self.ours.get_submodule("backbone")
        self.cfg = cfg

    def infer(self, batch_size: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
        """Return functions that run inference once, by library; they return the detections."""
        images = example_images(batch_size, self.task)
        inputs = [{"image": _interleaved(image)} for image in images]
        self.ours.eval()
        self.theirs.eval()
        # As evaluation and predictor run it: what is computed from the weights is kept.
        prepared = PreparedWeights()

        def ours() -> Any:
            with torch.no_grad(), prepared.in_use(), autocast(self.task.device, dtype):
                return [output["instances"] for output in self.ours(inputs)]

        def theirs() -> Any:
            with torch.no_grad(), autocast(self.task.device, dtype):
                return self.theirs([image.float() / 255 for image in images])

        return {"detkit": ours, "torchvision": theirs}

    def train(self, batch_size: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
        """Return functions that train one step, by library, as each is trained by its users."""
        images = example_images(batch_size, self.task)
        objects = [example_objects(i, self.task) for i in range(batch_size)]
        batch = [
            self._our_input(image, *of_image)
            for image, of_image in zip(images, objects, strict=True)
        ]
        step = _training_step(self.cfg, self.ours, batch, dtype)
        theirs = self.theirs.train()
        optimizer = torch.optim.SGD(
            [p for p in theirs.parameters() if p.requires_grad],
            lr=_LEARNING_RATE,
            momentum=0.9,
            weight_decay=1e-4,
        )
        targets = [self._their_target(*of_image) for of_image in objects]

        def step_of_theirs() -> None:
            with autocast(self.task.device, dtype):
                losses = theirs([image.float() / 255 for image in images], targets)
                loss = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad()
            loss.backward()
            # As torchvision's own training script, which stops where the loss is not finite.
            if not loss.isfinite():
                raise FloatingPointError("torchvision's loss is not finite")
            optimizer.step()

        return {"detkit": step, "torchvision": step_of_theirs}

    def _our_input(
        self, image: Tensor, boxes: Tensor, classes: Tensor, polygons: list[np.ndarray]
    ) -> Any:
        return _model_input(image, boxes, classes, polygons if self.kind == "mask" else None)

    def _their_target(
        self, boxes: Tensor, classes: Tensor, polygons: list[np.ndarray]
    ) -> dict[str, Tensor]:
        device = self.task.device
        target = {"boxes": boxes.to(device), "labels": classes.to(device) + 1}
        if self.kind == "mask":
            masks = PolygonMasks([[polygon] for polygon in polygons])
            bitmaps = BitMasks.from_polygon_masks(masks, *self.task.image_size)
            target["masks"] = bitmaps.tensor.to(device, torch.uint8)
        return target


def pair_contest(
    setting: Setting, *, kind: str, image_size: tuple[int, int], train_batch: int, target: float
) -> Contest:
    """Inference of one image, or with `train_batch` images a training step, without resizing.

    Args:
        setting: Device and type; `quick` takes fewer rounds.
        kind: Of `KINDS`.
        image_size: (height, width).
        train_batch: Images per training step; 0 for inference.
        target: How many times faster detkit is meant to be.
    """
    size = "x".join(map(str, image_size))
    what = f"a training step of {train_batch} images of {size}" if train_batch else f"one {size}"
    task = Task(setting.device, image_size)
    arguments = (kind, task, train_batch, setting.dtype)
    return Contest(
        name=f"{kind} {'train' if train_batch else 'infer'} {size}",
        task=f"{kind}, R50-FPN: {what}",
        opponent="torchvision, same weights",
        ours=OwnProcess(_side, "detkit", *arguments),
        theirs=OwnProcess(_side, "torchvision", *arguments),
        target=target,
        rounds=2 if setting.quick else 9,
        check=None if train_batch else _require_like_many,
        shares=lambda: {
            name: OwnProcess(_profiled_side, name, *arguments)()
            for name in ("detkit", "torchvision")
        },
    )


def _side(
    name: str, kind: str, task: Task, train_batch: int, dtype: torch.dtype
) -> Callable[[], int]:
    """Return a function that does it once with that library, and returns the number of objects."""
    pair = Pair(kind, task)
    # As detkit's predictor, evaluation and trainer set it; the other side keeps torch's default.
    if name == "detkit" and task.device.type == "cpu":
        reuse_freed_memory()
    functions = pair.train(train_batch, dtype) if train_batch else pair.infer(1, dtype)
    run = functions[name]

    def once() -> int:
        found: Any = run()
        if train_batch:
            return 0
        return sum(len(f["scores"] if name == "torchvision" else f) for f in found)

    return once


# Part of an operator's name -> what it is for; the first that fits counts. detkit's ROIAlign sums
# weighted rows (an embedding bag), its large 3x3 convolutions are matrix products.
_USES = {
    "conv": "convolutions, matrix products",
    "aten::mm": "convolutions, matrix products",
    "aten::bmm": "convolutions, matrix products",
    "aten::addmm": "convolutions, matrix products",
    "roi_align": "ROIAlign",
    "embedding_bag": "ROIAlign",
    "nms": "NMS, sorting",
    "sort": "NMS, sorting",
    "topk": "NMS, sorting",
    "optimizer": "optimizer",
    "_foreach": "optimizer",
    "_fused": "optimizer",
    "copy_": "copies",
    "fill_": "copies",
    "index": "copies",
    "aten::cat": "copies",
    "add": "additions, products, norms, ReLU",
    "mul": "additions, products, norms, ReLU",
    "sum": "additions, products, norms, ReLU",
    "clamp": "additions, products, norms, ReLU",
    "relu": "additions, products, norms, ReLU",
    "threshold": "additions, products, norms, ReLU",
}


def _profiled_side(*arguments: Any) -> Callable[[], dict[str, float]]:
    """Return a function that returns the seconds of a call of `_side` by use of the operators."""
    once, num_calls = _side(*arguments), 3

    def profiled() -> dict[str, float]:
        once()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(num_calls):
                once()
        seconds: dict[str, float] = {}
        for event in profiler.key_averages():
            name = event.key.lower()
            use = next((use for part, use in _USES.items() if part in name), "all else")
            seconds[use] = seconds.get(use, 0.0) + event.self_cpu_time_total / 1e6 / num_calls
        return seconds

    return profiled


def _require_like_many(ours: int, theirs: int) -> None:
    if abs(ours - theirs) > 0.02 * max(ours, theirs):
        raise ValueError(f"not the same task: {ours} objects in detkit, {theirs} in torchvision")


def config_step(
    name: str, settings: list[Any], batch_size: int, task: Task, dtype: torch.dtype
) -> Callable[[], None]:
    """Return a function that trains a packaged config with masks one step, from random weights.

    Args:
        name: Of the config.
        settings: Keys and values that override it.
        batch_size: Images per step.
        task: Device and image size.
        dtype: Of the mixed precision; float32 for none.
    """
    cfg = get_config(name)
    cfg.merge_from_list(["MODEL.WEIGHTS", "", "MODEL.DEVICE", str(task.device), *settings])
    cfg.merge_from_list(["SOLVER.BASE_LR", _LEARNING_RATE, "MODEL.ROI_HEADS.NUM_CLASSES", 90])
    torch.manual_seed(0)
    model = build_model(cfg)
    objects = [example_objects(i, task) for i in range(batch_size)]
    images = example_images(batch_size, task)
    batch = [_model_input(image, *o) for image, o in zip(images, objects, strict=True)]
    return _training_step(cfg, model, batch, dtype)


def _training_step(
    cfg: CfgNode, model: nn.Module, batch: list[Any], dtype: torch.dtype
) -> Callable[[], None]:
    trainer = SimpleTrainer(
        create_ddp_model(model.train()),  # the model itself, unless there are several processes
        repeat(batch),
        build_optimizer(cfg, model),
        precision=None if dtype == torch.float32 else dtype,
    )
    trainer.iter, trainer.max_iter = 0, 1 << 30
    trainer.storage = EventStorage()
    trainer.storage.__enter__()
    return trainer.run_step


def _model_input(
    image: Tensor, boxes: Tensor, classes: Tensor, polygons: list[np.ndarray] | None
) -> Any:
    size = (image.shape[1], image.shape[2])
    instances = Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes)
    if polygons is not None:
        instances.gt_masks = PolygonMasks([[polygon] for polygon in polygons])
    return {"image": _interleaved(image), "instances": instances}


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Return mixed precision of that type; for float32 a context that does nothing."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def example_images(count: int, task: Task) -> list[Tensor]:
    """Return coarse blobs as images (3, H, W) uint8, RGB, on the device."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 3, 12, 16, generator=generator)
    images = F.interpolate(coarse, task.image_size, mode="bicubic").clamp(0, 1)
    return list((images * 255).byte().to(task.device))


def example_objects(seed: int, task: Task) -> tuple[Tensor, Tensor, list[np.ndarray]]:
    """Return boxes (M, 4), classes (M,) and octagons within the boxes."""
    height, width = task.image_size
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([width, height])
    sides = (0.04 + 0.3 * torch.rand(task.num_objects, 2, generator=generator)) * size
    corners = torch.rand(task.num_objects, 2, generator=generator) * (size - sides)
    boxes = torch.cat([corners, corners + sides], dim=1)
    classes = torch.randint(_NUM_CLASSES, (task.num_objects,), generator=generator)
    angles = np.arange(8) * np.pi / 4 + np.pi / 8
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    centers, radii = (boxes[:, :2] + sides / 2).double().numpy(), (sides / 2).double().numpy()
    polygons = [(c + circle * r).reshape(-1) for c, r in zip(centers, radii, strict=True)]
    return boxes, classes, polygons


def _interleaved(image: Tensor) -> Tensor:
    """Return an image with the layout in which detkit's mapper gives it."""
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def _torchvision_model(kind: str, task: Task) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"min_size": min(task.image_size), "max_size": max(task.image_size)}
    backbone = partial(
        resnet_fpn_backbone,
        backbone_name="resnet50",
        weights=None,
        norm_layer=misc.FrozenBatchNorm2d,
        trainable_layers=3,
    )
    if kind == "retinanet":
        levels = tuple(
            (x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512)
        )
        anchors = AnchorGenerator(levels, ((0.5, 1.0, 2.0),) * len(levels))
        body = backbone(returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
        model: nn.Module = RetinaNet(body, _NUM_CLASSES + 1, anchor_generator=anchors, **sizes)
    else:
        cls = MaskRCNN if kind == "mask" else FasterRCNN
        numbers = {name: value for name, (_, value) in _TINY.items()} if task.is_tiny else {}
        model = cls(backbone(), _NUM_CLASSES + 1, **sizes, **numbers)
    model = model.to(task.device).eval()
    with torch.no_grad():
        # The last norm of every bottleneck, 1 at the start, to the size of a trained one.
        for name, tensor in model.state_dict().items():
            if name.endswith("bn3.weight"):
                tensor.fill_(0.2)
        for name, spread in _SPREADS.items():
            if name.partition(".")[0] in dict(model.named_children()):
                _set_spread(model, name, spread, task)
    return model


def _set_spread(model: nn.Module, name: str, spread: float, task: Task) -> None:
    """Scale a layer's weight so that its outputs have this standard deviation."""
    seen: list[float] = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda _, __, output: seen.append(output.std().item())
    )
    model([image.float() / 255 for image in example_images(1, task)])
    hook.remove()
    model.get_parameter(f"{name}.weight").mul_(spread / max(seen))
