"""What is said about each kind of broken step, which evidence counts first, and what the file holds."""

import json
import logging
import math

import pytest
import torch
from torch import nn

from detkit.engine import AMPTrainer, SimpleTrainer
from detkit.engine.nonfinite import report
from detkit.engine.nonfinite.replay import BrokenGradient, BrokenOutput, Replay
from detkit.engine.nonfinite.report import Evidence, ImageEvidence, PassEvidence, find_cause
from detkit.structures import Boxes, Instances


class Detector(nn.Module):
    """Learns the logarithm of the width of boxes."""

    def __init__(self, std=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 1)
        self.frozen = nn.Linear(1, 1).requires_grad_(False)
        self.register_buffer("std", torch.tensor(std))

    def forward(self, batch):
        images = torch.stack([item["image"] for item in batch]) / self.std
        width = self.head(self.backbone(images).mean((2, 3)))
        boxes = torch.cat([item["instances"].gt_boxes.tensor[:1] for item in batch])
        factors = torch.tensor([item["factor"] for item in batch])
        loss = self.loss((width - (boxes[:, 2] - boxes[:, 0]).log()) * factors)
        return {"loss_box": loss, "loss_other": width.abs().mean()}

    def loss(self, difference):
        return difference.pow(2).mean()


def item(box=(1.0, 1.0, 5.0, 6.0), image=None, name="a.jpg", factor=1.0):
    boxes = Boxes(torch.tensor([box, (0.0, 1.0, 2.5, 4.0)]))
    image = torch.rand(3, 6, 8) if image is None else image
    return {
        "image": image,
        "instances": Instances((6, 8), gt_boxes=boxes, gt_classes=torch.tensor([2, 0])),
        "file_name": name,
        "image_id": 7,
        "factor": factor,
    }


def message_of_stop(model, batches, lr=0.01, trainer_class=SimpleTrainer, **kwargs):
    trainer = trainer_class(model, batches, torch.optim.SGD(model.parameters(), lr=lr), **kwargs)
    with pytest.raises(FloatingPointError) as stopped:
        trainer.train(0, len(batches))
    return str(stopped.value)


class Loss(Detector):
    """A detector with the loss function that it is given."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss


class Log(nn.Module):
    def forward(self, x):
        return (x * 0 - 1).log()


class Half(nn.Linear):
    def forward(self, x):
        return super().forward(x).half() * 60000


class Between(Detector):
    def forward(self, batch):
        return {"loss": self.head(self.backbone(batch[0]["image"]).mean((1, 2)) / 0).mean()}


class Once:
    """A loss that is not finite in the first pass only."""

    def __init__(self, error=None):
        self.calls, self.error = 0, error

    def __call__(self, difference):
        self.calls += 1
        if self.calls > 1 and self.error:
            raise self.error
        return difference.mean() * (math.nan if self.calls == 1 else 1.0)


def stops_by_itself(difference):
    raise FloatingPointError("boxes contain nan. Or so.")


def with_nan(name):
    model = Detector()
    model.get_parameter(name).data.fill_(math.nan)
    return model


def with_head(*layers):
    model = Detector()
    model.head = nn.Sequential(*layers)
    nn.init.constant_(model.head[0].bias, 3.0)
    return model


LR = "the learning rate is too high. Settings to look at: SOLVER.BASE_LR lower, SOLVER.WARMUP_I"


def case(name, model, found, *items, lr=0.01, steps=1):
    """A model, its batches of the items, and a part of the message."""
    return pytest.param(model, [list(items) or [item()]] * steps, lr, found, id=name)


@pytest.mark.parametrize(
    ("model", "batches", "lr", "found"),
    [
        case(
            "loaded-weights",
            lambda: with_nan("head.bias"),
            "weights were infinite or nan before the first step (head.bias), as they were loaded."
            " Settings to look at: MODEL.WEIGHTS.",
        ),
        case("loaded-statistics", lambda: Detector(math.nan), "before the first step (std)"),
        case(
            "step-that-overflows",
            lambda: Loss(lambda x: 100 * x.pow(2).mean()),
            "the step before made weights infinite or nan (backbone.weight, backbone.bias,"
            f" head.weight and 1 more): {LR}",
            lr=1e38,
            steps=3,
        ),
        case(
            "image",
            Detector,
            "the image of a.jpg is not finite as the data loader gives it",
            item(image=torch.full((3, 6, 8), math.inf)),
        ),
        case(
            "normalisation",
            lambda: Detector(std=0.0),
            "not once they are normalised. Settings to look at: MODEL.PIXEL_MEAN, MODEL.PIXEL_STD",
        ),
        case(
            "box-without-width",
            Detector,
            "box 0 of a.jpg, [3.0, 1.0, 3.0, 6.0], has no area. detkit's loader leaves such boxes",
            item(),
            item((3.0, 1.0, 3.0, 6.0)),
        ),
        case("box-in-wrong-order", Detector, "has no area", item((5.0, 1.0, 3.0, 6.0))),
        case("box-of-nan", Detector, "is not finite. detkit's", item((0.0, 0.0, math.nan, 6.0))),
        case("rising-loss", Detector, LR, lr=2.0, steps=400),
        case(
            "float16",
            lambda: with_head(Half(4, 1)),
            "an overflow in head.0 (Half): float16 ends at 65504. Settings to look at: SOLVER.AMP.D",
        ),
        case(
            "module",
            lambda: with_head(nn.Linear(4, 1), Log()),
            "head.1 (Log) makes numbers that are not finite of finite ones.",
        ),
        case(
            "code-between-modules",
            Between,
            "what head (Linear) is given is not finite, and no module gave it: the data, or code b",
        ),
        case(
            "loss-function",
            lambda: Loss(lambda x: (x * 0).log().mean()),
            "all modules within are finite, a loss that the model (Loss) makes of them is not: loss",
        ),
        case(
            "derivative",
            lambda: Loss(lambda x: (x * 0).abs().sqrt().mean()),
            "their gradient is not from that at the output of head on backwards",
        ),
        case("does-not-repeat", lambda: Loss(Once()), "it does not repeat itself"),
        case(
            "no-replay",
            lambda: Loss(Once(RuntimeError("out of memory"))),
            "could not be replayed (RuntimeError: out of memory).",
        ),
        case(
            "model-that-stops",
            lambda: Loss(stops_by_itself),
            "boxes contain nan. Likeliest cause: the outputs of all modules are finite up to where",
        ),
    ],
)
def test_cause_is_found(model, batches, lr, found):
    assert found in message_of_stop(model(), batches, lr=lr)


def test_overflow_is_not_put_down_to_bfloat16():
    message = message_of_stop(with_nan("head.bias"), [[item()]], trainer_class=AMPTrainer)
    assert "float16 ends" not in message


def test_overflow_of_a_gradient_in_float16():
    evidence = make_evidence(first_gradient=BrokenGradient("output", "head.fc1", "float16"))
    cause = find_cause([evidence])
    assert (cause.text, cause.settings) == (
        "an overflow in the gradient of head.fc1: float16 ends at 65504",
        ("SOLVER.AMP.DTYPE bf16",),
    )


def make_evidence(
    process=0,
    *,
    losses=(1.0,),
    num_steps=3,
    first_output=None,
    first_gradient=None,
    image=None,
    **kwargs,
):
    images = [] if image is None else [image]
    fields = {
        "recent_losses": list(losses),
        "broken_weights": [],
        "largest_weight": ("w", 1.0),
        "broken_gradients": [],
    }
    return Evidence(
        process=process,
        passes=[PassEvidence({"loss": math.nan}, "", images)],
        num_steps=num_steps,
        replay=Replay(first_output, first_gradient, ""),
        **{**fields, **kwargs},
    )


BROKEN_BOX = ImageEvidence("b.jpg", 1, [8, 8], True, [[3.0, 1.0, 3.0, 6.0]], [0])


def output(module, **kwargs):
    return BrokenOutput(
        module, "Conv2d", "float32", **{"has_finite_inputs": True, "ran_first": False, **kwargs}
    )


@pytest.mark.parametrize(
    ("evidence", "text"),
    [
        pytest.param(
            {"broken_weights": ["a", "b", "c", "d"], "losses": [1, 99]},
            r"a, b, c and 1 more",
            id="weights",
        ),
        pytest.param(
            {"image": BROKEN_BOX, "losses": [1.0, 99.0]}, "b.jpg", id="box-before-learning-rate"
        ),
        pytest.param(
            {"image": BROKEN_BOX, "first_output": output("backbone.stem")},
            "backbone.stem",
            id="no-box-in-the-backbone",
        ),
        pytest.param(
            {"losses": [1.0, 99.0], "first_output": output("roi_heads")},
            "rose from 1 to 99",
            id="rise-before-module",
        ),
        pytest.param(
            {"losses": [1.0, 5.0], "first_output": output("roi_heads")}, "roi_heads", id="no-rise"
        ),
        pytest.param(
            {"losses": [99.0, 1.0, 1.0, 1.0, 1.0], "first_output": output("fpn")}, "fpn", id="fall"
        ),
        pytest.param({"losses": [], "first_output": output("fpn")}, "fpn", id="no-losses"),
    ],
)
def test_plainer_evidence_comes_first(evidence, text):
    assert text in find_cause([make_evidence(**evidence)]).text


def test_process_with_the_plainest_evidence_counts():
    finite, telling = make_evidence(0), make_evidence(1, image=BROKEN_BOX)
    module = make_evidence(2, first_output=output("fpn"))
    assert find_cause([finite, module, telling]) == find_cause([telling])


def stop(data, dump_dir, model=None, **kwargs):
    """The message of a run with two parameter groups, which writes a file."""
    model = model or Detector()
    groups = [
        {"params": [*model.backbone.parameters(), model.head.weight], "lr": 0.5e-3},
        {"params": [model.head.bias], "lr": 0.25e-3},
    ]
    trainer = SimpleTrainer(model, data, torch.optim.SGD(groups), dump_dir=dump_dir, **kwargs)
    with pytest.raises(FloatingPointError) as stopped:
        trainer.train(0, len(data))
    return str(stopped.value)


def dump(folder):
    (path,) = folder.glob("nonfinite_iter_*.json")
    return json.loads(
        path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )


NAN = {"factor": math.nan}


def test_file_holds_all_that_is_known_and_the_message_names_it(tmp_path):
    data = [[item()], [item(name="b.jpg", **NAN), item(name="c.jpg")]]
    message = stop(data, str(tmp_path / "out"))
    path = tmp_path / "out" / "nonfinite_iter_0000001.json"
    assert message.endswith(
        f"The weights are as they were before this step. All that is known: {path}."
    )
    assert "loss is not finite at iteration 1: loss_box=nan, loss_other=" in message
    assert "Images of the batch: b.jpg, c.jpg." in message
    assert "[ 0.0, 1.0, 2.5, 4.0 ]" in path.read_text()  # a box takes one line

    content = dump(tmp_path / "out")
    assert content["iteration"] == 1
    assert content["not_finite"] == "loss"
    assert content["steps_skipped_before"] == 0
    assert content["likeliest_cause"] in message
    assert content["parameter_groups"] == [
        {"lr": 0.5e-3, "num_parameters": 3},
        {"lr": 0.25e-3, "num_parameters": 1},
    ]
    (process,) = content["processes"]
    (of_pass,) = process["passes"]
    assert of_pass["losses"]["loss_box"] == "nan"
    assert math.isfinite(of_pass["losses"]["loss_other"])
    assert of_pass["images"][0] == {
        "file_name": "b.jpg",
        "image_id": 7,
        "size": [6, 8],
        "is_finite": True,
        "boxes": [[1, 1, 5, 6], [0, 1, 2.5, 4]],
        "classes": [2, 0],
    }
    assert [image["file_name"] for image in of_pass["images"]] == ["b.jpg", "c.jpg"]
    assert len(process["recent_losses"]) == process["num_steps"] == 1
    assert process["broken_weights"] == []
    assert "head.weight" in process["broken_gradients"]
    assert process["replay"]["first_output"]["kind"] == "Detector"


def test_gradient_is_told_from_loss(tmp_path):
    model = Detector()
    model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    message = stop([[item()]], str(tmp_path), model)
    assert "the gradient is not finite at iteration 0, though the losses are: loss_box=" in message
    content = dump(tmp_path)
    assert content["not_finite"] == "gradient"
    assert content["processes"][0]["broken_gradients"] == ["head.weight"]
    assert content["processes"][0]["replay"]["first_gradient"]["name"] == "head.weight"


def test_broken_and_largest_weights_are_listed(tmp_path):
    model = Detector()
    nn.init.constant_(model.frozen.weight, math.inf)
    nn.init.constant_(model.head.bias, 12.0)
    stop([[item(**NAN)]], str(tmp_path), model)
    (process,) = dump(tmp_path)["processes"]
    assert process["broken_weights"] == ["frozen.weight"]
    assert process["largest_weight"] == ["head.bias", 12.0]


def test_every_pass_of_an_iteration_is_in_the_file(tmp_path):
    data = [[item()], [item(name="b.jpg", **NAN)]]
    message = stop(data, str(tmp_path), accum_steps=2)
    assert "Images of the batch: b.jpg." in message
    passes = dump(tmp_path)["processes"][0]["passes"]
    assert [of_pass["losses"]["loss_box"] == "nan" for of_pass in passes] == [False, True]


def test_batch_of_another_kind_is_no_obstacle(tmp_path):
    class Plain(Detector):
        def forward(self, batch):
            return self.head(batch).mean() * math.nan

    message = stop([torch.ones(3, 4)], str(tmp_path), Plain())
    assert "Images" not in message
    assert dump(tmp_path)["processes"][0]["passes"][0]["images"] == []


def test_model_that_found_out_by_itself_is_quoted_whole_in_the_file(tmp_path):
    message = stop([[item()]], str(tmp_path), Loss(stops_by_itself))
    assert "loss is not finite at iteration 0: boxes contain nan. Likeliest cause" in message
    assert "Or so" in dump(tmp_path)["processes"][0]["passes"][0]["error"]


def test_no_folder_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert stop([[item(**NAN)]], None).endswith("as they were before this step.")
    assert list(tmp_path.iterdir()) == []


def test_file_that_cannot_be_written_does_not_hide_the_cause(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.ERROR, logger="detkit"):
        message = stop([[item(**NAN)]], str(tmp_path / "file"))
    assert "Likeliest cause" in message
    assert "All that is known" not in message
    assert "nonfinite_iter_0000000.json could not be written" in caplog.text


def test_process_with_the_loss_is_named(monkeypatch):
    monkeypatch.setattr(report.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(report.comm, "all_gather", lambda value: [value])
    for name in ("all_reduce_max_int", "all_reduce_max", "gather"):
        monkeypatch.setattr(report.comm, name, lambda value: value)
    monkeypatch.setattr(report.comm, "get_rank", lambda: 1)
    assert "loss of process 1 is not finite at iteration 0" in stop([[item(**NAN)]], None)


def test_skipped_step_is_summarized(caplog):
    model = Detector()
    data = [
        [item(name="a.jpg"), item(name="b.jpg")],
        [item(name="c.jpg", **NAN), item(name="d.jpg")],
    ]
    trainer = SimpleTrainer(
        model, data, torch.optim.SGD(model.parameters(), lr=0.1), 1, 2, max_skipped_steps=1
    )
    with caplog.at_level(logging.WARNING, logger="detkit"):
        trainer.train(0, 1)
    (record,) = caplog.records
    assert record.message == (
        "iteration 0 is skipped (1 of SOLVER.SKIP_NONFINITE_STEPS=1): not finite are loss_box=nan"
        " (images c.jpg, d.jpg)"
    )
