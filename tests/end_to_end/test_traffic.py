"""What a step and an image copy and allocate, by operators: a guard that needs no quiet machine."""

import pytest
import torch
from counts import Parcel, Traffic

from detkit.engine import SimpleTrainer
from detkit.modeling import build_model
from detkit.solver import build_optimizer
from detkit.utils.events import EventStorage
from tests.end_to_end.families import family_config
from tests.end_to_end.test_waits import batch_of

NUM_IMAGES = 2
KEEP_ALL = ["MODEL.RETINANET.SCORE_THRESH_TEST", 0.0, "MODEL.RETINANET.TOPK_CANDIDATES_TEST", 100]


def trained(family):
    """The traffic of a training step, from the batch to the changed weights."""
    cfg = family_config(family)
    torch.manual_seed(0)
    model = build_model(cfg)
    loader = [batch_of(cfg, NUM_IMAGES)] * 2
    trainer = SimpleTrainer(model, loader, build_optimizer(cfg, model))
    trainer.iter, trainer.max_iter = 0, 10
    with EventStorage() as trainer.storage:
        trainer.run_step()  # makes what is kept from then on: momentum, folded norms
        with Traffic() as traffic:
            trainer.run_step()
    return traffic


def inferred(family):
    """The traffic of inference, from the images to the detections."""
    cfg = family_config(family)
    cfg.merge_from_list(KEEP_ALL)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    batch = [{"image": x["image"]} for x in batch_of(cfg, NUM_IMAGES)]
    with torch.no_grad(), Traffic() as traffic:
        model(batch)
    return traffic


# Per image: operators, pieces of memory, KiB of these, KiB copied; each about a tenth above the
# number of November 2026. What is copied, for images of 64 x 77 and 85 x 64 (61 KiB as floats):
# - each normalised image into the padded batch (`ImageList.from_tensors`), once;
# - regions: the index of the pixels of each cell of ROIAlign (six times 8 bytes a pixel), which
#   replaces the copies of the pixels themselves, and each level's cells to their place in the result
#   (`ROIPooler`). In training the gradient takes the same way back, and is laid out anew once;
# - RPN: logits and deltas of all levels joined, those of the best picked, boxes stacked of corners;
# - RetinaNet: the anchors joined and, in training, the box matched with each; of the maps nothing.
@pytest.mark.parametrize(
    ("work", "family", "operators", "allocations", "allocated", "copied"),
    [
        (trained, "box", 1340, 710, 14400, 1870),
        (trained, "mask", 1850, 880, 18800, 2440),
        (trained, "RetinaNet", 710, 470, 8650, 170),
        (inferred, "box", 825, 393, 7460, 1830),
        # Masks are pasted one by one: these are 100 detections.
        (inferred, "mask", 4450, 2180, 61500, 11900),
        (inferred, "RetinaNet", 595, 428, 2940, 184),
    ],
)
def test_step_and_image_copy_and_allocate_no_more_than_they_did(
    work, family, operators, allocations, allocated, copied, workplace
):
    traffic = work(family)
    assert traffic.operators <= operators * NUM_IMAGES
    assert traffic.allocations <= allocations * NUM_IMAGES
    assert traffic.allocated <= allocated * NUM_IMAGES * 1024
    most = traffic.copied.most_common(20)
    assert traffic.copied.total() <= copied * NUM_IMAGES * 1024, most


@pytest.mark.parametrize(
    ("family", "memories", "per_pixel", "per_image", "piped"),
    [
        ("box", 3, 3, 80, 400),  # image, boxes, classes
        ("mask", 3, 3, 80, 1700),  # polygons are arrays, which go through the pipe
        ("keypoint", 4, 3, 220, 480),
        ("panoptic", 4, 3 + 8, 80, 1750),  # the label map is int64
    ],
)
def test_worker_sends_the_bytes_of_the_image_and_little_else(
    family, memories, per_pixel, per_image, piped, workplace
):
    batch = batch_of(family_config(family), 4)
    parcel = Parcel(batch)
    pixels = sum(x["image"][0].numel() for x in batch)
    assert parcel.memories <= memories * len(batch)
    assert parcel.shared <= per_pixel * pixels + per_image * len(batch)
    assert parcel.piped <= piped * len(batch)
