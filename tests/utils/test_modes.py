import pytest
import torch
from torch import nn

from detkit.evaluation import inference_context
from detkit.modeling.backbone import TorchvisionBackbone
from detkit.modeling.backbone.dry_run import dry_forward
from detkit.utils.modes import preserved_modes


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
