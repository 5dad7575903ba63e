import pytest
import torch
from torchvision.ops import nms
from waits import Waits

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
    assert place.startswith(f"{kind} at tests/benchmarks/test_waits.py:")


def test_what_needs_no_answer_of_the_device_is_not_counted():
    with Waits() as waits:
        picked = VALUES[torch.tensor([1, 2])]
        torch.where(MASK, VALUES, 0.0).topk(2)
        VALUES.repeat_interleave(2)
        assert len(picked) == 2  # a shape is known
    assert len(waits) == 0
