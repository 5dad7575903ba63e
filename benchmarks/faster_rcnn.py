"""Run and train Faster R-CNN with R50-FPN, against torchvision's `fasterrcnn_resnet50_fpn`.

What makes it fair: each side in a process of its own, in turn; one 480x640 image, resized by each
side to 800x1067 as a part of the round (torchvision rounds down to 1066; both pad to 800x1088); 80
classes; the same numbers of proposals before and after non-maximum suppression, and of sampled
anchors and proposals; random weights, damped (`_damp_residuals`) so that the features have the size
of trained ones: else random residual blocks make them explode, anchors collapse, and one side has
little left to do. With random weights no class of 81 reaches the score threshold of 0.05, so
neither side has detections to suppress in the end, and both send 1000 proposals through the box
head; `_count_proposals` sees to it. In training both freeze stem and res2 and keep batch norm
frozen, which is detkit's default and what torchvision does with pretrained weights.

In inference torchvision's model without weights normalises with `BatchNorm2d` in eval mode, which
is a little faster than the `FrozenBatchNorm2d` that it has with pretrained weights: the contest is
the harder one for detkit. A part of detkit's lead on CPUs is the allocator's setting
(`reuse_freed_memory`) that it makes in its processes.
"""

from collections.abc import Callable

import numpy as np
import torch
from contest import IMAGE_SIZE, Contest, OwnProcess, Setting, example_image, example_objects
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.misc import FrozenBatchNorm2d

from detkit.config import CfgNode
from detkit.data import transforms as T
from detkit.engine import DefaultPredictor
from detkit.model_zoo import get_config
from detkit.modeling import build_model
from detkit.solver import build_optimizer
from detkit.structures import Boxes, Instances
from detkit.utils.env import reuse_freed_memory

_CONFIG = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
_NUM_CLASSES = 80
_SMALL_SIDE, _LARGE_SIDE = 800, 1333
_LEARNING_RATE = 1e-4


def infer_contest(setting: Setting) -> Contest:
    """From an image in memory, uint8, to boxes on the CPU; one image."""
    return Contest(
        name="infer",
        task="one 480x640 image to boxes, R50-FPN, resized to 800x1067",
        opponent="torchvision fasterrcnn_resnet50_fpn",
        ours=OwnProcess(_detkit_inference, setting.device),
        theirs=OwnProcess(_torchvision_inference, setting.device),
        target=2.2,
        rounds=3 if setting.quick else 15,
        check=_require_same_proposals,
    )


def _detkit_inference(device: torch.device) -> Callable[[], int]:
    """Return a function that runs inference and returns the number of regions of the box head."""
    image = example_image()
    predictor = DefaultPredictor(_config(device), allow_partial=True)
    _damp_residuals(predictor.model)
    counts = _count_proposals(predictor.model)

    def infer() -> int:
        predictor(image).get("instances", Instances(IMAGE_SIZE)).to("cpu")
        return counts[-1]

    return infer


def _torchvision_inference(device: torch.device) -> Callable[[], int]:
    """Return the same for torchvision."""
    image = example_image()
    model = fasterrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=_NUM_CLASSES + 1,
        min_size=_SMALL_SIDE,
        max_size=_LARGE_SIDE,
    )
    model = model.to(device).eval()
    _damp_residuals(model)
    counts = _count_proposals(model)

    def infer() -> int:
        with torch.no_grad():
            model([_as_torchvision(image, device)])[0]["boxes"].cpu()
        return counts[-1]

    return infer


def _require_same_proposals(ours: int, theirs: int) -> None:
    if ours != theirs:
        raise RuntimeError(
            f"not the same task: {ours} proposals in detkit, {theirs} in torchvision"
        )


def _damp_residuals(model: nn.Module) -> None:
    """Set the last norm of every bottleneck, 1 in both models, to the size of a trained one."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("conv3.norm.weight", "bn3.weight")):
                tensor.fill_(0.2)


def _count_proposals(model: nn.Module) -> list[int]:
    """Return a list to which every call of the box head appends its number of regions."""
    counts: list[int] = []
    model.get_submodule("roi_heads.box_head").register_forward_pre_hook(
        lambda _, inputs: counts.append(len(inputs[0]))
    )
    return counts


def train_contest(setting: Setting) -> Contest:
    """One step of SGD on one image with ten objects: resize, forward, backward, update."""
    return Contest(
        name="train",
        task="one step of SGD on one 480x640 image with 10 objects, R50-FPN, resized to 800x1067",
        opponent="torchvision fasterrcnn_resnet50_fpn",
        ours=OwnProcess(_detkit_step, setting.device),
        theirs=OwnProcess(_torchvision_step, setting.device),
        target=None,
        rounds=1 if setting.quick else 7,
    )


def _config(device: torch.device) -> CfgNode:
    cfg = get_config(_CONFIG)
    cfg.merge_from_list(
        ["MODEL.WEIGHTS", "", "MODEL.DEVICE", str(device), "SOLVER.BASE_LR", _LEARNING_RATE]
    )
    cfg.freeze()
    return cfg


def _detkit_step(device: torch.device) -> Callable[[], float]:
    image, (boxes, classes) = example_image(), example_objects(_NUM_CLASSES)
    cfg = _config(device)
    if device.type == "cpu":
        reuse_freed_memory()
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    resize = T.ResizeShortestEdge([_SMALL_SIDE], _LARGE_SIDE)

    def step() -> float:
        aug_input = T.AugInput(image, boxes=boxes)
        resize(aug_input)
        instances = Instances(aug_input.image.shape[:2])
        instances.gt_boxes = Boxes(torch.as_tensor(aug_input.boxes))
        instances.gt_classes = torch.as_tensor(classes)
        tensor = torch.as_tensor(np.ascontiguousarray(aug_input.image.transpose(2, 0, 1)))
        losses = model([{"image": tensor, "instances": instances}])
        return _update(sum(losses.values()), optimizer)

    return step


def _torchvision_step(device: torch.device) -> Callable[[], float]:
    image, (boxes, classes) = example_image(), example_objects(_NUM_CLASSES)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
    )
    model = FasterRCNN(
        backbone,
        num_classes=_NUM_CLASSES + 1,
        min_size=_SMALL_SIDE,
        max_size=_LARGE_SIDE,
        # As in Detectron2's FPN configs; torchvision's own default is 2000.
        rpn_post_nms_top_n_train=1000,
    )
    model = model.to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=_LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
    target = {
        "boxes": torch.as_tensor(boxes, dtype=torch.float32, device=device),
        "labels": torch.as_tensor(classes, device=device) + 1,  # 0 is the background there
    }

    def step() -> float:
        losses = model([_as_torchvision(image, device)], [target])
        return _update(sum(losses.values()), optimizer)

    return step


def _update(loss: Tensor | int, optimizer: torch.optim.Optimizer) -> float:
    assert isinstance(loss, Tensor)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()  # on a GPU this waits for the step to end


def _as_torchvision(image: np.ndarray, device: torch.device) -> Tensor:
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1))).to(device).float() / 255
