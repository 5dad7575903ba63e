"""Loggers as they were, behind what sets them up: `caplog` of later tests needs them to propagate."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def restored_loggers() -> Iterator[None]:
    """Put handlers, levels and propagation of detkit's loggers back, also where the block fails."""
    loggers = [logging.getLogger(name) for name in ("detkit", "fvcore")]
    before = [(logger, list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    try:
        yield
    finally:
        for logger, handlers, propagate, level in before:
            for handler in set(logger.handlers) - set(handlers):
                handler.close()
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
