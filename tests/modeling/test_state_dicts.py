"""Whole models held against those that Detectron2 0.6 builds: names, shapes and trained parameters.

tests/golden/state_dicts.json.gz has them for all 92 configs of its zoo. Configs that differ in their schedule only, say,
have one model, which is built once; `benchmarks/check_zoo.py` builds them all.
"""

import gzip
import json
from pathlib import Path

import pytest
from check_zoo import compare_with_recorded

from detkit.model_zoo import get_config

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
RECORDED = json.loads(gzip.decompress((GOLDEN / "state_dicts.json.gz").read_bytes()))
# The last config of each model: a base's own name says less.
DISTINCT = {
    json.dumps([model["keys"], model["trainable"]], sort_keys=True): name
    for name, model in RECORDED.items()
}


def test_record_covers_the_whole_zoo():
    assert RECORDED.keys() == json.loads((GOLDEN / "zoo_settings.json").read_text()).keys()
    assert len(DISTINCT) == 43


@pytest.mark.parametrize("name", sorted(DISTINCT.values()))
def test_model_is_that_of_detectron2(name):
    assert compare_with_recorded(get_config(name), RECORDED[name]) == []
