import dataclasses

import pytest

from detkit.layers import ShapeSpec


def test_what_is_not_known_is_none():
    assert ShapeSpec(channels=3) == ShapeSpec(3, None, None, None)


def test_shapes_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ShapeSpec(channels=3).channels = 4  # type: ignore[misc]
