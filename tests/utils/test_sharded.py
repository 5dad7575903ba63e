"""Models that are not shared out are left as they are; the others are tried in tests/engine/test_two_processes.py."""

import torch
from torch import nn

from detkit.utils.sharded import gathered, is_sharded, own_optimizer_state, own_share, whole


def test_ordinary_tensors_stay_themselves():
    model = nn.Linear(2, 3)
    assert not is_sharded(model)
    state = {"a": [model.weight, (1, "b")], "c": {"d": None}}
    found = whole(state)
    assert found["a"][0] is model.weight
    assert found == state
    assert own_share(model.bias, model.bias) is model.bias
    optimizer = torch.optim.AdamW(model.parameters())
    saved = optimizer.state_dict()
    assert own_optimizer_state(optimizer, saved) is saved


def test_nothing_is_gathered_of_what_is_whole():
    with gathered(nn.Linear(1, 1)), gathered(lambda x: x):
        pass
