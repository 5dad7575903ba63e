import json
import re
from pathlib import Path

import pytest

from detkit.model_zoo.urls import PREFIX, PUBLISHED_WEIGHTS

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
# Detectron2's quick schedules name nine of these files in full: a second source for the same addresses.
SETTINGS = json.loads((GOLDEN / "zoo_settings.json").read_text())
NAMED_IN_CONFIGS = {
    s["MODEL.WEIGHTS"] for s in SETTINGS.values() if "model_final" in s.get("MODEL.WEIGHTS", "")
} - {"detectron2://semantic_R_50_FPN_1x/111802073/model_final_c18079783c55a94968edc28b7101c5f0.pkl"}


def test_addresses_named_in_detectron2s_configs_are_the_same():
    ours = {f"detectron2://{name}/{rest}" for name, rest in PUBLISHED_WEIGHTS.items()}
    assert len(NAMED_IN_CONFIGS) == 9
    assert ours >= NAMED_IN_CONFIGS


def test_every_entry_is_a_config_of_the_zoo_and_a_run_of_its_own():
    assert {f"{name}.yaml" for name in PUBLISHED_WEIGHTS} <= set(SETTINGS)
    assert len({rest.split("/")[0] for rest in PUBLISHED_WEIGHTS.values()}) == len(
        PUBLISHED_WEIGHTS
    )
    assert PREFIX.endswith("/")


@pytest.mark.parametrize("name", PUBLISHED_WEIGHTS)
def test_entry_looks_like_those_that_were_published(name):
    assert re.fullmatch(r"\d{8,9}/model_(final|0039999)_[0-9a-f]{6}\.pkl", PUBLISHED_WEIGHTS[name])


@pytest.mark.parametrize("name", PUBLISHED_WEIGHTS)
def test_config_names_the_same_run_in_its_head(name):
    config = Path(__file__).resolve().parents[2] / "configs" / f"{name}.yaml"
    assert f"{name} (id {PUBLISHED_WEIGHTS[name].split('/')[0]})" in config.read_text()
