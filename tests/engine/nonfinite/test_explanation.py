import json
import logging
import math

import pytest
import torch
from torch import nn

from detkit.engine import SimpleTrainer
from detkit.engine.nonfinite import explanation
from detkit.structures import Boxes, Instances


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(2, 1)
        self.frozen = nn.Linear(1, 1).requires_grad_(False)

    def forward(self, batch):
        y = self.frozen(self.fc(batch[0]["image"].mean((1, 2))))
        return {"loss_a": y.pow(2).mean(), "loss_b": y.abs().mean() * batch[0]["factor"]}


def item(name, factor=1.0):
    instances = Instances(
        (4, 6), gt_boxes=Boxes([[0, 1, 2.5, 4], [1, 1, 3, 3]]), gt_classes=torch.tensor([2, 0])
    )
    return {
        "image": torch.ones(2, 4, 6),
        "instances": instances,
        "factor": factor,
        "file_name": name,
        "image_id": name.removesuffix(".jpg"),
    }


def stop(data, dump_dir, model=None, **kwargs):
    model = model or Toy()
    groups = [{"params": [model.fc.weight], "lr": 0.5}, {"params": [model.fc.bias], "lr": 0.25}]
    trainer = SimpleTrainer(model, data, torch.optim.SGD(groups), dump_dir=dump_dir, **kwargs)
    with pytest.raises(FloatingPointError) as stopped:
        trainer.train(0, len(data))
    return str(stopped.value)


def dump(folder):
    (path,) = folder.glob("nonfinite_iter_*.json")
    return json.loads(
        path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )


def test_file_holds_all_that_is_known_and_the_message_names_it(tmp_path):
    message = stop(
        [[item("a.jpg")], [item("b.jpg", math.nan), item("c.jpg")]], str(tmp_path / "out")
    )
    path = tmp_path / "out" / "nonfinite_iter_0000001.json"
    assert message.endswith(
        f"The weights are as they were before this step. All that is known: {path}."
    )
    assert "loss is not finite at iteration 1: loss_a=" in message
    assert ", loss_b=nan. Likeliest cause: " in message
    assert "Images of the batch: b.jpg, c.jpg." in message

    content = json.loads(path.read_text())
    assert (content["iteration"], content["not_finite"], content["steps_skipped_before"]) == (
        1,
        "loss",
        0,
    )
    assert content["likeliest_cause"] in message
    assert content["parameter_groups"] == [
        {"lr": 0.5, "num_parameters": 1},
        {"lr": 0.25, "num_parameters": 1},
    ]
    (process,) = content["processes"]
    assert process["process"] == 0
    (of_pass,) = process["passes"]
    assert of_pass["losses"]["loss_b"] == "nan"
    assert math.isfinite(of_pass["losses"]["loss_a"])
    assert of_pass["images"][0] == {
        "file_name": "b.jpg",
        "image_id": "b",
        "size": [4, 6],
        "is_finite": True,
        "boxes": [[0, 1, 2.5, 4], [1, 1, 3, 3]],
        "classes": [2, 0],
    }
    assert [image["file_name"] for image in of_pass["images"]] == ["b.jpg", "c.jpg"]
    assert len(process["recent_losses"]) == process["num_steps"] == 1
    assert process["broken_weights"] == []
    assert process["broken_gradients"] == ["fc.weight", "fc.bias"]
    assert process["replay"]["first_output"]["kind"] == "Toy"


def test_box_takes_one_line(tmp_path):
    stop([[item("a.jpg", math.inf)]], str(tmp_path))
    assert "[ 0.0, 1.0, 2.5, 4.0 ]" in next(tmp_path.glob("*.json")).read_text()


def test_gradient_is_told_from_loss(tmp_path):
    model = Toy()
    model.fc.weight.register_hook(lambda gradient: gradient * math.inf)
    message = stop([[item("a.jpg")]], str(tmp_path), model)
    assert "the gradient is not finite at iteration 0, though the losses are: loss_a=" in message
    content = dump(tmp_path)
    assert content["not_finite"] == "gradient"
    assert content["processes"][0]["broken_gradients"] == ["fc.weight"]
    assert content["processes"][0]["replay"]["first_gradient"]["name"] == "fc.weight"


def test_weights_that_are_broken_are_listed(tmp_path):
    model = Toy()
    nn.init.constant_(model.frozen.weight, math.inf)
    nn.init.constant_(model.fc.bias, 12.0)
    stop([[item("a.jpg")]], str(tmp_path), model)
    (process,) = dump(tmp_path)["processes"]
    assert process["broken_weights"] == ["frozen.weight"]
    assert process["largest_weight"] == ["fc.bias", 12.0]


def test_every_pass_of_an_iteration_is_in_the_file(tmp_path):
    data = [[item("a.jpg")], [item("b.jpg", math.nan)]]
    message = stop(data, str(tmp_path), accum_steps=2)
    assert "Images of the batch: b.jpg." in message
    passes = dump(tmp_path)["processes"][0]["passes"]
    assert [of_pass["losses"]["loss_b"] == "nan" for of_pass in passes] == [False, True]


def test_batch_of_another_kind_is_no_obstacle(tmp_path):
    class Plain(Toy):
        def forward(self, batch):
            return self.fc(batch).mean() * math.nan

    message = stop([torch.ones(3, 2)], str(tmp_path), Plain())
    assert "Images" not in message
    assert dump(tmp_path)["processes"][0]["passes"][0]["images"] == []


def test_model_that_found_out_by_itself_is_quoted(tmp_path):
    class Raises(Toy):
        def forward(self, batch):
            raise FloatingPointError("Predicted boxes contain nan. Likely it is the learning rate.")

    message = stop([[item("a.jpg")]], str(tmp_path), Raises())
    assert (
        "loss is not finite at iteration 0: Predicted boxes contain nan. Likeliest cause" in message
    )
    assert "Likely it is" in dump(tmp_path)["processes"][0]["passes"][0]["error"]


def test_no_folder_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert stop([[item("a.jpg", math.nan)]], None).endswith("as they were before this step.")
    assert list(tmp_path.iterdir()) == []


def test_file_that_cannot_be_written_does_not_hide_the_cause(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.ERROR, logger="detkit"):
        message = stop([[item("a.jpg", math.nan)]], str(tmp_path / "file"))
    assert "Likeliest cause" in message
    assert "All that is known" not in message
    assert "nonfinite_iter_0000000.json could not be written" in caplog.text


def test_process_with_the_loss_is_named(monkeypatch):
    monkeypatch.setattr(explanation.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(explanation.comm, "all_gather", lambda value: [value])
    for name in ("largest", "largest_of_each", "gather"):
        monkeypatch.setattr(explanation.comm, name, lambda value: value)
    monkeypatch.setattr(explanation.comm, "get_rank", lambda: 1)
    data = [[item("a.jpg", math.nan)]]
    assert "loss of process 1 is not finite at iteration 0" in stop(data, None)


def test_skipped_step_is_told_in_short(caplog):
    model = Toy()
    data = [[item("a.jpg"), item("b.jpg")], [item("c.jpg", math.nan), item("d.jpg")]]
    trainer = SimpleTrainer(
        model, data, torch.optim.SGD(model.parameters(), lr=0.1), 1, 2, max_skipped_steps=1
    )
    with caplog.at_level(logging.WARNING, logger="detkit"):
        trainer.train(0, 1)
    (record,) = caplog.records
    assert record.message == (
        "iteration 0 is skipped (1 of SOLVER.SKIP_NONFINITE_STEPS=1): not finite are loss_b=nan (images c.jpg, d.jpg)"
    )
