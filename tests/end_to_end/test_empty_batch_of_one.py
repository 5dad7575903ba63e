"""An empty batch in one of two processes: every head has a gradient, or the other would wait for it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from detkit.data import build_detection_train_loader
from detkit.engine import create_ddp_model
from detkit.modeling import build_model
from detkit.utils import comm
from detkit.utils.env import seed_all_rng
from tests.end_to_end.families import FAMILIES, family_config
from tests.processes import together

# Other backbones have the heads of "box": images without objects make no difference to them.
WITH_HEADS_OF_THEIR_OWN = [
    family for family in FAMILIES if family not in ("RegNet", "ViT", "Swin", "MViT")
]


def gradients_with_an_empty_batch(folder: Path) -> dict[str, Tensor | str]:
    """Return the norm of all gradients of each family, where this process has no object in its images if it is the last."""
    results: dict[str, Tensor | str] = {}
    for family in WITH_HEADS_OF_THEIR_OWN:
        cfg = family_config(family)
        cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = ""
        cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 2, 0
        seed_all_rng(1)
        model = create_ddp_model(build_model(cfg).train())
        batch = next(iter(build_detection_train_loader(cfg)))
        if comm.get_rank() == 1:
            for item in batch:
                item["instances"] = item["instances"][:0] if "instances" in item else None
                if "sem_seg" in item:
                    item["sem_seg"] = torch.full_like(
                        item["sem_seg"], cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
                    )
        torch.stack(list(model(batch).values())).sum().backward()
        missing = [
            name for name, p in model.named_parameters() if p.requires_grad and p.grad is None
        ]
        norms = [p.grad.double().norm() for p in model.parameters() if p.grad is not None]
        results[family] = f"no gradient of {missing}" if missing else torch.stack(norms)
    return results


@pytest.fixture(scope="module")
def gradients(datasets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETKIT_DATASETS", str(datasets))
        return together(gradients_with_an_empty_batch, folder, folder=folder)


@pytest.mark.parametrize("family", WITH_HEADS_OF_THEIR_OWN)
def test_empty_batch_of_one_process_hangs_none(gradients, family):
    first, second = (of_rank[family] for of_rank in gradients)
    assert torch.equal(first, second)
    assert first.isfinite().all()
    assert first.max() > 0
