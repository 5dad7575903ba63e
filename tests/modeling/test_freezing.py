import copy
import pickle

import pytest
import torch
from torch import nn

from detkit.layers import Conv2d, FrozenBatchNorm2d, get_norm
from detkit.modeling.freezing import freeze_matching


class NormWithActivation(nn.BatchNorm2d):
    """What timm has: more than a batch norm."""

    def forward(self, x):
        return super().forward(x).relu()


def _block(norm: str = "BN") -> nn.Sequential:
    return nn.Sequential(
        Conv2d(4, 32, 3, norm=get_norm(norm, 32)), Conv2d(32, 4, 1, norm=get_norm("BN", 4))
    )


class Net(nn.Module):
    def __init__(self, norm: str = "BN"):
        super().__init__()
        torch.manual_seed(0)
        self.body = _block(norm)
        self.neck = nn.Sequential(nn.Conv2d(4, 4, 1), NormWithActivation(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.neck(self.body(x)).mean(dim=(2, 3)))


def _changed_by_training(net: nn.Module, steps: int = 5) -> set[str]:
    """Names of the tensors that SGD changes, with every switch of modes that a run has."""
    before = {name: value.clone() for name, value in net.state_dict().items()}
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(steps):
        net.eval()
        net.train()
        optimizer.zero_grad()
        net(torch.randn(4, 4, 8, 8)).square().sum().backward()
        optimizer.step()
    after = net.state_dict()
    assert after.keys() == before.keys()
    return {name for name in after if not torch.equal(after[name], before[name])}


ALL = set(Net().state_dict())


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        pytest.param(["^body"], {n for n in ALL if n.startswith("body")}, id="a part"),
        pytest.param(
            ["^body\\.1", "head"],
            {n for n in ALL if n.startswith(("body.1", "head"))},
            id="two parts",
        ),
        pytest.param(
            ["neck"], {n for n in ALL if n.startswith("neck")}, id="a norm of another class"
        ),
        pytest.param(
            [r"body.*norm\.weight$"],
            {"body.0.norm.weight", "body.1.norm.weight"},
            id="weights of norms",
        ),
        pytest.param(
            ["running_mean"],
            {n for n in ALL if "running" in n or "num_batches" in n},
            id="statistics, which stay together",
        ),
        pytest.param([r"head\.bias"], {"head.bias"}, id="one parameter"),
        pytest.param(
            ["^(?!head)"], {n for n in ALL if not n.startswith("head")}, id="all but one part"
        ),
    ],
)
def test_matching_tensors_stay_bit_identical_and_the_others_train(patterns, frozen):
    net = Net().train()
    freeze_matching(net, patterns)
    assert _changed_by_training(net) == ALL - frozen


def test_names_of_what_matched_are_given():
    assert freeze_matching(Net(), ["head"]) == ["head.weight", "head.bias"]


@pytest.mark.parametrize("norm", ["GN", "LN", "FrozenBN", ""])
def test_other_norms_freeze_too(norm):
    net = Net(norm)
    freeze_matching(net, ["^body"])
    assert not any(name.startswith("body") for name in _changed_by_training(net))


def test_whole_batch_norm_becomes_a_frozen_one_and_keeps_its_names():
    net = Net()
    names = list(net.state_dict())
    freeze_matching(net, ["^body", "^neck"])
    assert isinstance(net.body[0].norm, FrozenBatchNorm2d)
    assert type(net.neck[1]) is NormWithActivation
    assert set(net.state_dict()) == set(names)


def test_norm_that_two_modules_share_is_frozen_in_both():
    shared = nn.BatchNorm2d(4)
    net = nn.Sequential(Conv2d(4, 4, 1, norm=shared), Conv2d(4, 4, 1, norm=shared))
    freeze_matching(net, [r"1\.norm"])
    assert net[0].norm is net[1].norm
    assert _changed_by_training(net) == {"0.weight", "0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"]
)
def test_copies_are_frozen_too(copied):
    net = Net()
    freeze_matching(net, ["running_", "neck"])
    assert not any(
        "running" in name or "neck" in name for name in _changed_by_training(copied(net))
    )


def test_batch_norm_without_weights_keeps_its_names():
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False))
    names = set(net.state_dict())
    freeze_matching(net, [r"^1\."])
    assert _changed_by_training(net) == {"0.weight", "0.bias"}
    assert set(net.state_dict()) == names


def test_norm_that_is_the_model_itself_is_frozen():
    norm = nn.BatchNorm2d(4)
    freeze_matching(norm, ["running_mean"])
    norm.train()(torch.randn(2, 4, 3, 3))
    assert norm.num_batches_tracked == 0


def test_pattern_that_matches_nothing_is_an_error_with_near_misses():
    with pytest.raises(
        ValueError,
        match=r"'\^bdoy\\\\.0' matches the name of no tensor .*Did you mean 'body.0'",
    ):
        freeze_matching(Net(), ["head", r"^bdoy\.0"])


def test_pattern_that_is_none_is_an_error():
    with pytest.raises(ValueError, match=r"'head\(' is not a regular expression: "):
        freeze_matching(Net(), ["head("])
