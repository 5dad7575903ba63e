"""Flags of records: one meaning, however a tool wrote them."""

import numpy as np
import pytest

from detkit.structures import as_flag
from detkit.utils.errors import DataError


@pytest.mark.parametrize(
    "value", [1, True, 1.0, 7, -1, 0.5, "1", "1.0", "TRUE", "yes", np.int64(1)]
)
def test_flag_is_set(value):
    assert as_flag(value) == 1


@pytest.mark.parametrize(
    "value",
    [0, False, 0.0, None, "", " ", "0", "0.0", "False", "no", "nan", float("nan"), np.bool_(0)],
)
def test_flag_is_not_set(value):
    assert as_flag(value) == 0


@pytest.mark.parametrize("value", ["Unspecified", float("inf"), [0], {}, "1 0"])
def test_anything_else_is_no_flag(value):
    with pytest.raises(DataError, match="a flag is 0 or 1, got"):
        as_flag(value)
