"""What holds for all tests."""

from collections.abc import Iterator

import pytest

from detkit.data import DatasetCatalog, MetadataCatalog
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


@pytest.fixture
def catalogs_as_before() -> Iterator[None]:
    """Forget what a test registers."""
    loaders, metadata = dict(DatasetCatalog.data), dict(MetadataCatalog.data)
    yield
    DatasetCatalog.data.clear()
    DatasetCatalog.data.update(loaders)
    MetadataCatalog.data.clear()
    MetadataCatalog.data.update(metadata)
