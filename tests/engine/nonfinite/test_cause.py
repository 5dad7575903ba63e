"""Each cause from a step that has it, and which one counts where there are several."""

import math

import pytest
import torch
from torch import nn

from detkit.engine import AMPTrainer, SimpleTrainer
from detkit.engine.nonfinite.cause import likeliest_cause
from detkit.engine.nonfinite.evidence import Evidence, ImageEvidence, PassEvidence
from detkit.engine.nonfinite.replay import BrokenGradient, BrokenOutput, Replay
from detkit.structures import Boxes, Instances


class Detector(nn.Module):
    """Learns the logarithm of the width of boxes."""

    def __init__(self, std=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 1)
        self.register_buffer("std", torch.tensor(std))

    def forward(self, batch):
        images = torch.stack([item["image"] for item in batch]) / self.std
        width = self.head(self.backbone(images).mean((2, 3)))
        boxes = torch.cat([item["instances"].gt_boxes.tensor for item in batch])
        return {"loss_box": self.loss(width - (boxes[:, 2] - boxes[:, 0]).log())}

    def loss(self, difference):
        return difference.pow(2).mean()


def item(box=(1.0, 1.0, 5.0, 6.0), image=None):
    instances = Instances((8, 8), gt_boxes=Boxes(torch.tensor([box])), gt_classes=torch.tensor([2]))
    image = torch.rand(3, 8, 8) if image is None else image
    return {"image": image, "instances": instances, "file_name": "a.jpg", "image_id": 7}


def message_of_stop(model, batches, lr=0.01, trainer_class=SimpleTrainer, **kwargs):
    trainer = trainer_class(model, batches, torch.optim.SGD(model.parameters(), lr=lr), **kwargs)
    with pytest.raises(FloatingPointError) as stopped:
        trainer.train(0, len(batches))
    return str(stopped.value)


def test_weights_that_were_loaded_broken():
    model = Detector()
    nn.init.constant_(model.head.bias, math.nan)
    message = message_of_stop(model, [[item()]])
    assert (
        "weights were infinite or nan before the first step (head.bias), as they were loaded. Settings to look at: MODEL.W"
        in message
    )


def test_fixed_statistics_that_were_loaded_broken():
    model = Detector()
    model.std.fill_(math.nan)
    assert "before the first step (std)" in message_of_stop(model, [[item()]])


def test_step_that_overflows_the_weights():
    class Steep(Detector):
        def loss(self, difference):
            return 100 * super().loss(difference)

    message = message_of_stop(Steep(), [[item()]] * 3, lr=1e38)
    assert "the step before made weights infinite or nan (backbone.weight" in message
    assert (
        "Settings to look at: SOLVER.BASE_LR lower, SOLVER.WARMUP_ITERS longer, SOLVER.CLIP_GRADIENTS"
        in message
    )


def test_image_that_is_not_finite():
    broken = item(image=torch.full((3, 8, 8), math.inf))
    assert "the image of a.jpg is not finite as the data loader gives it" in message_of_stop(
        Detector(), [[broken]]
    )


def test_normalisation_that_overflows():
    message = message_of_stop(Detector(std=0.0), [[item()]])
    assert (
        "are not once they are normalised. Settings to look at: MODEL.PIXEL_MEAN, MODEL.PIXEL_STD"
        in message
    )


@pytest.mark.parametrize(
    ("box", "fault"),
    [
        pytest.param((3.0, 1.0, 3.0, 6.0), r"[3.0, 1.0, 3.0, 6.0], has no area", id="no-width"),
        pytest.param((5.0, 1.0, 3.0, 6.0), "has no area", id="wrong-order"),
        pytest.param((0.0, 0.0, math.nan, 6.0), "is not finite", id="nan"),
    ],
)
def test_box_that_cannot_be_learned(box, fault):
    message = message_of_stop(Detector(), [[item(), item(box)]])
    assert "box 0 of a.jpg, [" in message
    assert f"{fault}. detkit's loader leaves such boxes out" in message


def test_box_of_wrong_units():
    class Exponential(Detector):
        def loss(self, difference):
            return (-difference * 100).exp().sum()

    message = message_of_stop(Exponential(), [[item((0.0, 0.0, 1000.0, 5.0))]])
    assert "is over 10 times as large as its image of 8x8" in message


def test_learning_rate_at_which_the_loss_rises():
    message = message_of_stop(Detector(), [[item()]] * 400, lr=2.0)
    assert "the loss rose from " in message
    assert "the learning rate is too high. Settings to look at: SOLVER.BASE_LR lower" in message


def test_learning_rate_that_makes_weights_large():
    class Normalised(Detector):
        """The weights' size does not show in the loss, until they are squared."""

        def loss(self, difference):
            penalty = self.head.weight.pow(2).sum()
            return (
                difference.pow(2).mean().sqrt() / penalty.sqrt()
                if penalty.isfinite()
                else penalty * math.nan
            )

    message = message_of_stop(Normalised(), [[item()]] * 3, lr=1e22)
    assert "weights have grown to " in message
    assert "the learning rate is too high" in message


def test_large_weights_that_were_loaded():
    model = Detector()
    nn.init.constant_(model.backbone.weight, 1e30)
    message = message_of_stop(model, [[item()]])
    assert (
        "weights were as large as 1e+30 before the first step (backbone.weight), as they were loaded."
        in message
    )
    assert "Settings to look at: MODEL.WEIGHTS." in message


class Half(nn.Linear):
    def forward(self, x):
        return super().forward(x).half() * 60000


def test_overflow_of_float16():
    model = Detector()
    model.head = Half(4, 1)
    nn.init.constant_(model.head.bias, 3.0)
    message = message_of_stop(model, [[item()]])
    assert (
        "an overflow in head (Half): float16 ends at 65504. Settings to look at: SOLVER.AMP.DTYPE bf16"
        in message
    )


def test_overflow_of_bfloat16_is_not_put_down_to_it():
    model = Detector()
    nn.init.constant_(model.head.bias, math.nan)
    assert "float16 ends" not in message_of_stop(model, [[item()]], trainer_class=AMPTrainer)


def test_overflow_of_a_gradient_in_float16():
    evidence = make_evidence(first_gradient=BrokenGradient("output", "head.fc1", "float16"))
    cause = likeliest_cause([evidence])
    assert (cause.text, cause.settings) == (
        "an overflow in the gradient of head.fc1: float16 ends at 65504",
        ("SOLVER.AMP.DTYPE bf16",),
    )


def test_module_that_makes_nan_of_finite_numbers():
    class Log(nn.Module):
        def forward(self, x):
            return (x * 0 - 1).log()

    model = Detector()
    model.head = nn.Sequential(model.head, Log())
    assert "head.1 (Log) makes numbers that are not finite of finite ones." in message_of_stop(
        model, [[item()]]
    )


def test_code_between_modules():
    class Between(Detector):
        def forward(self, batch):
            return {"loss": self.head(self.backbone(batch[0]["image"]).mean((1, 2)) / 0).mean()}

    message = message_of_stop(Between(), [[item()]])
    assert (
        "what head (Linear) is given is not finite, and no module gave it: the data, or code between"
        in message
    )


def test_loss_function():
    class Log(Detector):
        def loss(self, difference):
            return (difference * 0).log().mean()

    message = message_of_stop(Log(), [[item()]])
    assert (
        "all modules within are finite, a loss that the model (Log) makes of them is not: loss_box."
        in message
    )


def test_derivative_that_does_not_exist():
    class Root(Detector):
        def loss(self, difference):
            return (difference * 0).abs().sqrt().mean()

    message = message_of_stop(Root(), [[item()]])
    assert (
        "the gradient is not finite at iteration 0, though the losses are: loss_box=0." in message
    )
    assert "their gradient is not from that at the output of head on backwards" in message


def test_step_that_does_not_repeat_itself():
    class Once(Detector):
        def loss(self, difference):
            self.is_later = hasattr(self, "is_later")
            return difference.mean() * (1.0 if self.is_later else math.nan)

    message = message_of_stop(Once(), [[item()]])
    assert "the replay of the step gave finite numbers: it does not repeat itself" in message
    assert "Settings to look at: DETERMINISTIC True." in message


def test_model_that_stops_by_itself():
    class Stops(Detector):
        def loss(self, difference):
            raise FloatingPointError("boxes contain nan. Or so.")

    message = message_of_stop(Stops(), [[item()]])
    assert (
        "boxes contain nan. Likeliest cause: the outputs of all modules are finite up to where the model"
        in message
    )


def test_step_that_cannot_be_replayed():
    class Once(Detector):
        def loss(self, difference):
            if hasattr(self, "is_later"):
                raise RuntimeError("out of memory")
            self.is_later = True
            return difference.mean() * math.nan

    assert "could not be replayed (RuntimeError: out of memory)." in message_of_stop(
        Once(), [[item()]]
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
    assert text in likeliest_cause([make_evidence(**evidence)]).text


def test_process_with_the_plainest_evidence_counts():
    finite, telling = make_evidence(0), make_evidence(1, image=BROKEN_BOX)
    module = make_evidence(2, first_output=output("fpn"))
    assert likeliest_cause([finite, module, telling]) == likeliest_cause([telling])
