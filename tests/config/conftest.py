import pytest

from detkit.config import get_cfg


@pytest.fixture
def cfg():
    """All settings at their defaults."""
    return get_cfg()
