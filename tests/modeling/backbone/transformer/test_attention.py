"""Attention against its formula written out, windows, positions and dropped branches."""

import pytest
import torch
import torch.nn.functional as F

from detkit.modeling.backbone.transformer.attention import (
    DropPath,
    absolute_positions,
    attention,
    drop_rates,
    from_windows,
    padded_to_windows,
    relative_positions,
    to_windows,
)


def slow_attention(query, key, value, positions):
    """As the papers write it: a logit for each pair of tokens, one after the other."""
    rows = relative_positions(positions[0], query.shape[2], key.shape[2])
    columns = relative_positions(positions[1], query.shape[3], key.shape[3])
    out = torch.zeros(query.shape)
    for y in range(query.shape[2]):
        for x in range(query.shape[3]):
            q = query[:, :, y, x]
            logits = torch.einsum("nhd,nhrcd->nhrc", q * q.shape[-1] ** -0.5, key)
            logits += torch.einsum("nhd,rd->nhr", q, rows[y])[..., None]
            logits += torch.einsum("nhd,cd->nhc", q, columns[x])[:, :, None]
            weights = logits.flatten(2).softmax(-1).view(logits.shape)
            out[:, :, y, x] = torch.einsum("nhrc,nhrcd->nhd", weights, value)
    return out


@pytest.mark.parametrize(
    ("query_size", "key_size"),
    [((3, 5), (3, 5)), ((4, 6), (2, 3)), ((2, 3), (4, 6))],
    ids=["same", "coarser keys", "finer keys"],
)
def test_attention_with_positions_is_the_formula(query_size, key_size):
    torch.manual_seed(0)
    query = torch.randn(2, 3, *query_size, 8)
    key, value = (torch.randn(2, 3, *key_size, 8) for _ in range(2))
    positions = (torch.randn(7, 8), torch.randn(11, 8))
    found = attention(query, key, value, positions)
    assert torch.allclose(found, slow_attention(query, key, value, positions), atol=1e-5)


def test_distances_are_rows_of_the_table():
    table = torch.arange(5.0)[:, None]
    assert relative_positions(table, 3, 3)[..., 0].tolist() == [[2, 1, 0], [3, 2, 1], [4, 3, 2]]


def test_coarser_keys_count_in_steps_of_the_queries():
    table = torch.arange(7.0)[:, None]
    assert relative_positions(table, 4, 2)[..., 0].tolist() == [[2, 0], [3, 1], [4, 2], [5, 3]]


def test_table_for_another_size_is_interpolated_linearly():
    table = torch.tensor([[0.0], [1.0], [2.0]])
    found = relative_positions(table, 3, 3)[..., 0]
    wanted = F.interpolate(table.T[None], size=5, mode="linear")[0, 0]
    assert torch.equal(found[:, 0], wanted[2:])


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 1)])
def test_windows_and_back(size):
    x = torch.randn(2, *size, 3)
    padded = padded_to_windows(x, 2)
    windows = to_windows(padded, 2)
    assert windows.shape[1:] == (2, 2, 3)
    assert torch.equal(windows[0], padded[0, :2, :2])
    assert torch.equal(from_windows(windows, (padded.shape[1], padded.shape[2]), size), x)


def test_padding_has_the_value_asked_for():
    padded = padded_to_windows(torch.zeros(1, 3, 4, 2), 4, torch.tensor([5.0, 6.0]))
    assert padded.shape == (1, 4, 4, 2)
    assert padded[0, 3].tolist() == [[5, 6]] * 4
    assert padded[0, :3].abs().max() == 0


def test_positions_of_the_size_they_were_learnt_on_stay_themselves():
    table = torch.randn(1, 10, 4)
    assert torch.equal(absolute_positions(table, True, (3, 3)).flatten(1, 2), table[:, 1:])
    assert absolute_positions(table, True, (5, 2)).shape == (1, 5, 2, 4)


def test_dropped_branches_keep_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    dropped = drop(torch.ones(4000, 2))
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(dropped[:, 0], dropped[:, 1])
    assert torch.equal(drop.eval()(torch.ones(4)), torch.ones(4))


def test_rates_grow_linearly():
    assert drop_rates(0.4, 5) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert drop_rates(0.4, 1) == [0.0]
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\), got 1"):
        drop_rates(1, 3)
