import pytest
import torch
from counts import Parcel, Traffic, Waits
from torchvision.ops import nms

VALUES = torch.arange(6.0)
MASK = VALUES > 2
BOXES = torch.tensor([[0.0, 0, 2, 2], [4, 4, 6, 6]])


@pytest.mark.parametrize(
    ("waits_once", "kind"),
    [
        pytest.param(lambda: VALUES.sum().item(), "item", id="item"),
        pytest.param(lambda: float(VALUES.sum()), "item", id="float"),
        pytest.param(lambda: bool(MASK.any()), "item", id="test"),
        pytest.param(lambda: VALUES.tolist(), "tolist", id="list"),
        pytest.param(lambda: VALUES.cpu(), "cpu", id="to the host"),
        pytest.param(lambda: MASK.nonzero(), "nonzero", id="nonzero"),
        pytest.param(lambda: VALUES[MASK], "index by a mask", id="mask"),
        pytest.param(lambda: VALUES.masked_select(MASK), "masked_select", id="masked_select"),
        pytest.param(lambda: VALUES.unique(), "unique", id="unique"),
        pytest.param(lambda: VALUES.long().bincount(), "bincount", id="bincount"),
        pytest.param(lambda: nms(BOXES, VALUES[:2], 0.5), "nms", id="nms"),
    ],
)
def test_wait_is_counted_with_its_place(waits_once, kind):
    with Waits() as waits:
        waits_once()
    assert dict(waits.kinds) == {kind: 1}
    (place,) = waits.places
    assert place.startswith(f"{kind} at tests/benchmarks/test_counts.py:")


def test_what_needs_no_answer_of_the_device_is_not_counted():
    with Waits() as waits:
        picked = VALUES[torch.tensor([1, 2])]
        torch.where(MASK, VALUES, 0.0).topk(2)
        VALUES.repeat_interleave(2)
        assert len(picked) == 2  # a shape is known
    assert len(waits) == 0


ROWS = torch.arange(12.0).view(3, 4)  # 48 bytes
TWO = torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("copy_once", "kind", "size"),
    [
        pytest.param(lambda: ROWS.clone(), "clone", 48, id="clone"),
        pytest.param(lambda: ROWS.T.contiguous(), "clone", 48, id="contiguous"),
        pytest.param(lambda: ROWS.T.reshape(12), "clone", 48, id="reshape"),
        pytest.param(lambda: ROWS.double(), "_to_copy", 96, id="another type"),
        pytest.param(lambda: torch.cat([ROWS, ROWS]), "cat", 96, id="cat"),
        pytest.param(lambda: torch.stack([ROWS, ROWS]), "stack", 96, id="stack"),
        pytest.param(lambda: ROWS[TWO], "index", 32, id="index"),
        pytest.param(lambda: ROWS.index_select(1, TWO), "index_select", 24, id="index_select"),
        pytest.param(lambda: ROWS.repeat(2, 1), "repeat", 96, id="repeat"),
        pytest.param(lambda: ROWS.flip(0), "flip", 48, id="flip"),
    ],
)
def test_copy_is_counted_with_its_bytes_and_place(copy_once, kind, size):
    with Traffic() as traffic:
        copy_once()
    ((place, copied),) = traffic.copied.items()
    assert copied == size
    assert place.startswith(f"{kind} at tests/benchmarks/test_counts.py:")
    assert (traffic.allocations, traffic.allocated) == (1, size)


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda table: table[:2].copy_(ROWS[1:]), id="copy_"),
        pytest.param(lambda table: table.index_put_((TWO,), ROWS[1:]), id="index_put_"),
        pytest.param(lambda table: table.index_copy_(0, TWO, ROWS[1:]), id="index_copy_"),
    ],
)
def test_copy_into_a_tensor_takes_no_memory(write):
    table = ROWS.clone()
    with Traffic() as traffic:
        write(table)
    assert (traffic.copied.total(), traffic.allocations) == (32, 0)


def test_views_and_numbers_are_not_copied():
    with Traffic() as traffic:
        ROWS[1:].T.flatten(0, 0).unsqueeze(0).expand(5, -1, -1)
        ROWS.contiguous(), ROWS.float()
    assert (traffic.allocations, traffic.copied.total()) == (0, 0)
    with Traffic() as traffic:
        (ROWS + 1).relu_()
    assert (traffic.operators, traffic.allocations, traffic.allocated) == (2, 1, 48)
    assert traffic.copied.total() == 0


def test_copies_of_the_backward_pass_are_counted():
    x = ROWS.clone().requires_grad_()
    with Traffic() as traffic:
        x[1:].sum().backward()
    assert [place.partition(" ")[0] for place in traffic.copied] == ["slice_backward"]


def test_parcel_takes_along_what_a_tensor_is_a_view_of():
    whole, part = Parcel({"x": ROWS, "again": ROWS}), Parcel({"x": ROWS[:1]})
    assert (whole.memories, whole.shared) == (part.memories, part.shared) == (1, 48)
    halves = Parcel([ROWS[:1], ROWS[1:]])
    assert (halves.memories, halves.shared) == (1, 48)
    text = "a name that is as long as twenty"
    assert Parcel({"x": ROWS, "text": text}).piped >= Parcel({"x": ROWS}).piped + len(text)
    assert Parcel([ROWS, TWO]).memories == 2
