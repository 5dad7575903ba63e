import logging

import pytest
import torch
from torch import nn

from detkit.checkpoint import (
    CheckpointError,
    DetectionCheckpointer,
    HasInitialWeights,
    save_checkpoint_file,
)


class Part(nn.Module):
    """Has ones to start from, under a name; an empty name stands for random weights."""

    def __init__(self, source="the ones"):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.source = source
        self.times = 0

    def load_initial_weights(self):
        self.times += 1
        if self.source:
            self.weight.data.fill_(1)
        return self.source


def _model(source="the ones"):
    return nn.ModuleDict({"backbone": Part(source), "head": nn.Linear(2, 2)})


def _save(model, path, keep=""):
    state = {name: value for name, value in model.state_dict().items() if name.startswith(keep)}
    save_checkpoint_file({"model": state}, str(path))
    return str(path)


def test_part_is_recognised():
    assert isinstance(Part(), HasInitialWeights)
    assert not isinstance(nn.Linear(1, 1), HasInitialWeights)


@pytest.mark.parametrize(
    ("source", "said"), [("the ones", "except backbone"), ("", "the model starts from random")]
)
def test_run_without_checkpoint_starts_from_them(source, said, caplog):
    model = _model(source)
    with caplog.at_level(logging.INFO, logger="detkit"):
        DetectionCheckpointer(model).resume_or_load("")
    assert model["backbone"].weight.tolist() == ([1, 1] if source else [0, 0])
    assert said in caplog.text
    assert ("backbone starts from the ones" in caplog.text) is bool(source)


def test_checkpoint_that_fills_the_part_fetches_nothing(tmp_path):
    path = _save(_model(), tmp_path / "all.pth")
    model = _model()
    DetectionCheckpointer(model).load(path, strict=True)
    assert (model["backbone"].times, model["backbone"].weight.tolist()) == (0, [0, 0])


def test_checkpoint_of_a_part_alone_is_not_overwritten(tmp_path):
    path, part = _save(Part(), tmp_path / "part.pth"), Part()
    DetectionCheckpointer(part).load(path, strict=True)
    assert (part.times, part.weight.tolist()) == (0, [0, 0])


def test_resumed_run_fetches_nothing(tmp_path):
    DetectionCheckpointer(_model(), str(tmp_path)).save("last")
    model = _model()
    DetectionCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)
    assert model["backbone"].times == 0


def test_checkpoint_of_other_parts_leaves_the_part_to_them(tmp_path):
    path = _save(_model(), tmp_path / "head.pth", keep="head")
    model = _model()
    DetectionCheckpointer(model).load(path)
    assert model["backbone"].weight.tolist() == [1, 1]


def test_strict_load_of_a_partial_checkpoint_fetches_nothing(tmp_path):
    path = _save(_model(), tmp_path / "head.pth", keep="head")
    model = _model()
    with pytest.raises(CheckpointError, match="does not fill the model"):
        DetectionCheckpointer(model).load(path, strict=True)
    assert model["backbone"].times == 0
