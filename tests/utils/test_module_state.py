import copy

import pytest
import torch
from torch import nn

from detkit.evaluation import inference_context
from detkit.modeling.backbone import TorchvisionBackbone
from detkit.modeling.backbone.dry_run import dry_forward
from detkit.utils.module_state import BufferSnapshot, preserved_modes


class TwoGraphs(nn.Module):
    """Exchanges what it runs in `train`, as torchvision's `DualGraphModule` does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Dropout(), nn.ReLU())
        self.graph = "train"

    def train(self, mode=True):
        self.graph = "train" if mode else "eval"
        return super().train(mode)


def modes(model):
    return [module.training for module in model.modules()]


def test_every_module_returns_to_its_own_mode():
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout(), nn.ReLU()).eval())
    model[1][1].train()
    before = modes(model)
    with preserved_modes(model):
        model.eval()
    assert modes(model) == before
    with preserved_modes(model.eval()):
        model.train()
    assert not any(modes(model))


def test_modes_return_after_an_error():
    model = nn.Linear(1, 1)
    with pytest.raises(TypeError), preserved_modes(model.train()):
        model.eval()(None)
    assert model.training


@pytest.mark.parametrize("is_training", [True, False])
def test_modes_return_through_a_module_of_its_own_train(is_training):
    model = nn.Sequential(TwoGraphs(), nn.ReLU()).train(is_training)
    model[0].layer[0].eval()
    before = modes(model)
    with preserved_modes(model):
        model.train(not is_training)
        assert model[0].graph == ("eval" if is_training else "train")
    assert model[0].graph == ("train" if is_training else "eval")
    assert modes(model) == before


def evaluated(model):
    with inference_context(model), torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))


def evaluated_with_modes_assigned(model):
    """The way that is not enough: `training` is right afterwards, and the graph is not."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, was_training in before:
        module.training = was_training


@pytest.mark.parametrize(
    ("evaluate", "is_restored"),
    [
        pytest.param(evaluated, True, id="inference_context"),
        pytest.param(evaluated_with_modes_assigned, False, id="assigned"),
    ],
)
def test_torchvision_backbone_is_in_its_training_graph_after_an_evaluation(evaluate, is_restored):
    backbone = TorchvisionBackbone(name="efficientnet_b0", out_features=["s32"]).train()
    evaluate(backbone)
    assert all(modes(backbone))
    assert (backbone.body.graph is backbone.body.train_graph) == is_restored


def test_torchvision_backbone_is_in_its_training_graph_after_a_dry_run():
    backbone = TorchvisionBackbone(name="mobilenet_v3_small", out_features=["s32"]).train()
    dry_forward(backbone, (64, 64))
    assert backbone.body.graph is backbone.body.train_graph


@pytest.fixture
def model():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False))


def test_statistics_and_counters_come_back(model):
    model(torch.randn(2, 3, 4, 4))
    before = copy.deepcopy(model.state_dict())
    snapshot = BufferSnapshot(model)
    snapshot.take()
    for _ in range(2):
        model(torch.full((2, 3, 4, 4), torch.nan))
        assert model[1].running_mean.isnan().all()
        snapshot.restore()
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_second_snapshot_replaces_the_first(model):
    snapshot = BufferSnapshot(model)
    snapshot.take()
    model(torch.randn(2, 3, 4, 4))
    after = copy.deepcopy(model.state_dict())
    snapshot.take()
    model(torch.randn(2, 3, 4, 4))
    snapshot.restore()
    torch.testing.assert_close(model.state_dict(), after, rtol=0, atol=0)


def test_parameters_are_not_its_business(model):
    snapshot = BufferSnapshot(model)
    snapshot.take()
    nn.init.zeros_(model[0].weight)
    snapshot.restore()
    assert not model[0].weight.any()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(None, torch.ones(1), id="filled"),
        pytest.param(torch.ones(1), None, id="emptied"),
        pytest.param(torch.ones(1), torch.zeros(1), id="changed"),
        pytest.param(torch.ones(3), torch.ones(3).double(), id="other-type-in-between"),
        pytest.param(torch.ones(3), torch.zeros(1), id="other-shape-in-between"),
    ],
)
def test_buffer_is_as_it_was(before, after):
    model = nn.Module()
    model.register_buffer("average", after)
    snapshot = BufferSnapshot(model)
    snapshot.take()
    model.average = before
    snapshot.take()
    model.average = after
    snapshot.restore()
    if before is None:
        assert model.average is None
    else:
        torch.testing.assert_close(model.average, before)


def test_buffer_that_was_not_there_goes():
    model = nn.Module()
    snapshot = BufferSnapshot(model)
    snapshot.take()
    model.register_buffer("average", torch.ones(1))
    snapshot.restore()
    assert list(model.buffers()) == []


def test_buffer_that_has_gone_in_between_is_forgotten():
    model = nn.Module()
    model.register_buffer("average", torch.ones(1))
    snapshot = BufferSnapshot(model)
    snapshot.take()
    del model.average
    snapshot.take()
    snapshot.restore()
    assert list(model.buffers()) == []
