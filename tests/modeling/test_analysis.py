import pytest
import torch
from torch import nn

from detkit.layers import Conv2d
from detkit.modeling.analysis import (
    FlopCountAnalysis,
    activation_count_operators,
    find_unused_parameters,
    flop_count_operators,
    parameter_count,
    parameter_count_table,
)
from detkit.structures import Boxes, Instances


class Tiny(nn.Module):
    """A model that is called with dicts, and returns instances or losses."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(Conv2d(3, 8, 3, padding=1))
        self.head = nn.Linear(8, 4)
        self.idle = nn.Linear(2, 2)

    def forward(self, batch):
        x = torch.stack([item["image"] for item in batch])
        boxes = self.head(self.backbone(x).mean(dim=(2, 3)))
        if self.training:
            return {"loss": boxes.sum()}
        return [{"instances": Instances(x.shape[2:], pred_boxes=Boxes(boxes))}]


INPUTS = [{"image": torch.rand(3, 32, 64), "not_used": "a"}]
CONVOLUTION, LINEAR = 3 * 8 * 9 * 32 * 64, 8 * 4


def test_operations_are_counted_by_kind_and_module():
    model = Tiny()
    analysis = FlopCountAnalysis(model, INPUTS)
    assert analysis.total() == CONVOLUTION + LINEAR
    assert analysis.total("head") == LINEAR
    assert dict(analysis.by_operator()) == {"conv": CONVOLUTION, "linear": LINEAR}
    assert analysis.by_module()["backbone"] == CONVOLUTION
    assert analysis.by_module_and_operator()["head"] == {"linear": LINEAR}
    assert model.training
    assert flop_count_operators(model, INPUTS)["conv"] == pytest.approx(CONVOLUTION / 1e9)
    activations = activation_count_operators(model, INPUTS)
    assert activations["conv"] == pytest.approx(8 * 32 * 64 / 1e6)


def test_what_fvcore_prints_and_sets_can_be_asked_for():
    analysis = FlopCountAnalysis(Tiny(), INPUTS)
    assert analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False) is analysis
    analysis.total()
    assert "mean" in " ".join(analysis.unsupported_ops())
    with pytest.raises(AttributeError, match="no_such_method"):
        analysis.no_such_method()
    # Imported here: importing it compiles, which today's torch warns about.
    from fvcore.nn import flop_count_table

    assert "backbone" in flop_count_table(analysis)


def test_parameters_are_counted_by_module():
    counts = parameter_count(Tiny())
    assert counts[""] == 3 * 8 * 9 + 8 + 8 * 4 + 4 + 6
    assert counts["head"] == 36
    assert counts["head.bias"] == 4
    assert "idle" in parameter_count_table(Tiny())


def test_parameters_without_a_part_in_the_losses_are_found():
    model = Tiny()
    assert find_unused_parameters(model, INPUTS) == ["idle.weight", "idle.bias"]
    assert model.head.weight.grad is None
    with pytest.raises(ValueError, match="training mode"):
        find_unused_parameters(model.eval(), INPUTS)
