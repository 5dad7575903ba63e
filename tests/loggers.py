"""Loggers as they were, behind what sets them up: `caplog` of later tests needs them to propagate."""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from detkit.utils import logger as logger_module


@contextmanager
def restored_loggers() -> Iterator[None]:
    """Put handlers, levels and propagation of detkit's loggers back, also where the block fails.

    And what was told once: it is told again, whichever test ran before in the same process.
    """
    loggers = [logging.getLogger(name) for name in ("detkit", "fvcore")]
    before = [(logger, list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    told = Counter(logger_module._seen)
    try:
        yield
    finally:
        logger_module._seen.clear()
        logger_module._seen.update(told)
        for logger, handlers, propagate, level in before:
            for handler in set(logger.handlers) - set(handlers):
                handler.close()
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
