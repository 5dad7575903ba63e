"""How often a step waits for its device, counted on a CPU; on a GPU each wait leaves it idle."""

import pytest
import torch
from counts import Waits

from detkit.data import DatasetCatalog, DatasetMapper
from detkit.engine import SimpleTrainer
from detkit.layers import cpu_kernels
from detkit.modeling import build_model
from detkit.solver import build_optimizer
from detkit.utils.events import EventStorage
from tests.end_to_end.families import family_config


def batch_of(cfg, num_images):
    records = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    mapper = DatasetMapper(cfg, is_train=True)
    return [mapper(records[i % len(records)]) for i in range(num_images)]


@pytest.mark.parametrize("num_images", [2, 5])
@pytest.mark.parametrize(("family", "most"), [("box", 6), ("mask", 9), ("RetinaNet", 2)])
def test_training_step_waits_a_few_times_however_many_images_there_are(
    family, most, num_images, workplace
):
    cfg = family_config(family)
    torch.manual_seed(0)
    model = build_model(cfg)
    loader = [batch_of(cfg, num_images)]
    trainer = SimpleTrainer(model, loader, build_optimizer(cfg, model))
    trainer.iter, trainer.max_iter = 0, 10
    with EventStorage() as trainer.storage, cpu_kernels(False), Waits() as waits:
        trainer.run_step()
    # A GPU suppresses the boxes of several images at once, this CPU level by level.
    of_nms = sum(count for place, count in waits.places.items() if "layers/nms.py" in place)
    assert len(waits) - of_nms + min(of_nms, 1) <= most, waits.places


@pytest.mark.parametrize(("family", "most"), [("box", 4), ("mask", 5)])
def test_inference_waits_a_few_times_and_thrice_per_image(family, most, workplace):
    cfg = family_config(family)
    model = build_model(cfg).eval()
    batch = [{"image": x["image"]} for x in batch_of(cfg, 3)]
    with torch.no_grad(), cpu_kernels(False), Waits() as waits:
        model(batch)
    # Masks are painted on the host, where they lie already: their lists are no waits.
    painted = sum(count for place, count in waits.places.items() if "mask_ops.py" in place)
    assert len(waits) - painted <= most + 3 * len(batch), waits.places
