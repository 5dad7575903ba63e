import gzip
import json
from pathlib import Path

import pytest

from detkit.cli.check_zoo import main

RECORD = Path(__file__).resolve().parents[1] / "golden" / "state_dicts.json.gz"
RPN = "COCO-Detection/rpn_R_50_FPN_1x.yaml"
FASTER = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"


@pytest.fixture
def record(tmp_path):
    """Writes a record and gives its path."""

    def write(models):
        path = tmp_path / "state_dicts.json.gz"
        path.write_bytes(gzip.compress(json.dumps(models).encode()))
        return str(path)

    return write


@pytest.fixture(scope="module")
def recorded():
    return json.loads(gzip.decompress(RECORD.read_bytes()))


def test_models_as_recorded_are_counted(capsys):
    assert main([RPN]) == 0
    assert capsys.readouterr().out.startswith("1 of 1 models as recorded")


def test_model_that_differs_is_named_and_fails_the_check(record, recorded, capsys):
    path = record({RPN: recorded[RPN], FASTER: recorded[RPN]})
    assert main(["--recorded", path]) == 1
    out = capsys.readouterr().out
    assert f"{FASTER}\n  not recorded: roi_heads." in out
    assert "1 of 2 models as recorded" in out


def test_config_that_cannot_be_built_does_not_hide_the_others(record, recorded, capsys):
    path = record({"no_such.yaml": recorded[RPN], RPN: recorded[RPN]})
    assert main(["--recorded", path]) == 1
    out = capsys.readouterr().out
    assert "no_such.yaml\n  FileNotFoundError: no packaged config" in out
    assert "1 of 2 models as recorded" in out


def test_name_that_is_not_recorded_is_an_error(capsys):
    assert main(["quick_start/faster_rcnn_R_18_FPN_shapes.yaml"]) == 2
    assert "faster_rcnn_R_18_FPN_shapes.yaml: not among the" in capsys.readouterr().err


def test_absent_record_is_an_error(tmp_path, capsys):
    assert main(["--recorded", str(tmp_path / "x.gz")]) == 2
    assert "--recorded" in capsys.readouterr().err


@pytest.mark.slow
def test_whole_zoo_is_as_recorded(capsys):
    assert main([]) == 0
    assert "92 of 92 models as recorded" in capsys.readouterr().out
