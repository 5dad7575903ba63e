"""Names, shapes and trainable parameters against those recorded from Detectron2 0.6.

tests/golden/state_dicts.json.gz: for each file of Detectron2's zoo, the model's `keys` (names and shapes) and
`trainable` names; tests/golden/zoo_settings.json: what each file sets.
"""

import gzip
import json
from pathlib import Path

import pytest
import torch

from detkit.config import get_cfg
from detkit.modeling.backbone import build_backbone

GOLDEN = Path(__file__).parents[2] / "golden"
MODELS = json.loads(gzip.decompress((GOLDEN / "state_dicts.json.gz").read_bytes()))
SETTINGS = json.loads((GOLDEN / "zoo_settings.json").read_text())

PARTS = ("MODEL.BACKBONE.", "MODEL.RESNETS.", "MODEL.FPN.")


def _backbone_settings(name: str) -> list:
    return [
        word
        for key, value in SETTINGS[name].items()
        if key.startswith(PARTS)
        for word in (key, value)
    ]


# One file of each backbone: most differ in other parts only.
DISTINCT = {
    json.dumps(_backbone_settings(name)): name for name in sorted(MODELS, reverse=True)
}.values()


@pytest.mark.parametrize("name", sorted(DISTINCT))
def test_backbone_has_the_names_shapes_and_trainable_parameters_of_detectron2(name):
    cfg = get_cfg()
    cfg.merge_from_list(_backbone_settings(name))
    with torch.device("meta"):
        backbone = build_backbone(cfg)
    model = MODELS[name]
    wanted = {
        key: tuple(shape) for key, shape in model["keys"].items() if key.startswith("backbone.")
    }
    assert {
        f"backbone.{key}": tuple(value.shape) for key, value in backbone.state_dict().items()
    } == wanted
    trained = {
        f"backbone.{key}"
        for key, parameter in backbone.named_parameters()
        if parameter.requires_grad
    }
    assert trained == {key for key in model["trainable"] if key.startswith("backbone.")}
