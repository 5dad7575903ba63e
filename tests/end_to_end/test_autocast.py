"""Every family of models trains and predicts in half precision."""

import pytest
import torch

from detkit.data import DatasetCatalog, DatasetMapper
from detkit.modeling import build_model
from tests.end_to_end.families import FAMILIES, family_config


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_in_bfloat16_are_those_in_float32_but_for_rounding(family, workplace):
    cfg = family_config(family)
    records = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])[:2]
    batch = [DatasetMapper(cfg, is_train=True)(record) for record in records]
    torch.manual_seed(0)
    model = build_model(cfg)
    losses = []
    for is_on in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_on):
            losses.append(model(batch))
    torch.testing.assert_close(losses[1], losses[0], rtol=0.25, atol=0.05)  # proposals may differ
    sum(losses[1].values()).backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for p in model.parameters()
        if p.requires_grad
    )
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model.eval()([{"image": x["image"]} for x in batch])
    for output in outputs:
        if "instances" in output:
            assert output["instances"].pred_boxes.tensor.dtype == torch.float32
            assert output["instances"].scores.isfinite().all()
        if "sem_seg" in output:
            assert output["sem_seg"].isfinite().all()
