"""`SkippedImages`: says at the end of a run which images it was trained without."""

import logging
from collections import Counter
from typing import Any

from detkit.engine.train_loop import HookBase
from detkit.utils import comm

logger = logging.getLogger(__name__)

_MAX_LISTED = 100


class SkippedImages(HookBase):
    """Logs, once all iterations are done, what DATALOADER.ON_BAD_IMAGE has skipped, over all processes and resumes.

    To be registered in every process.
    """

    def __init__(self, data_loader: Any) -> None:
        """Remember the training data, whose `skipped` counts images by the reason why they cannot
        be read.
        """
        self._data_loader = data_loader

    def after_train(self) -> None:
        if self.trainer.iter < self.trainer.max_iter:
            return
        # A loader of the user's own may count nothing.
        shares = comm.gather(dict(getattr(self._data_loader, "skipped", {})))
        if not comm.is_main_process():
            return
        skipped = sum(map(Counter, shares), Counter[str]())
        if not skipped:
            logger.info("no image was skipped (DATALOADER.ON_BAD_IMAGE)")
            return
        lines = [
            f"{count} times: {reason}" for reason, count in sorted(skipped.items())[:_MAX_LISTED]
        ]
        if len(skipped) > _MAX_LISTED:
            lines.append(
                f"... and {len(skipped) - _MAX_LISTED} others, which were named when they first"
                " came"
            )
        logger.warning(
            "%d images were skipped in training, %d times in all (DATALOADER.ON_BAD_IMAGE):\n%s",
            len(skipped),
            skipped.total(),
            "\n".join(lines),
        )
