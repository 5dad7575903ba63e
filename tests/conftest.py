"""What holds for all tests."""

from collections.abc import Iterator

import pytest

from tests.loggers import restored_loggers


@pytest.fixture(autouse=True, scope="module")
def _loggers_of_a_module() -> Iterator[None]:
    with restored_loggers():
        yield


@pytest.fixture(autouse=True)
def _loggers_of_a_test(_loggers_of_a_module: None) -> Iterator[None]:
    # Commands set up loggers, with the output of the test that runs them.
    with restored_loggers():
        yield
