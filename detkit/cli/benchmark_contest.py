"""What two programs are to be timed at, and the image they get."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

IMAGE_SIZE = (480, 640)


@dataclass(frozen=True)
class Contest:
    """The same task done by detkit and by another program.

    Attributes:
        name: Of the contest.
        task: What is done in one round.
        opponent: The other program.
        ours: Does it once with detkit, and returns when it is done, on a GPU as well.
        theirs: Does it once with the other program.
        target: How many times faster detkit is meant to be on two CPU cores; None where nothing is
            promised.
        rounds: How often to measure.
        check: Called with what `ours` and `theirs` gave, once, and raises where they did not do the
            same task.
    """

    name: str
    task: str
    opponent: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    target: float | None
    rounds: int
    check: Callable[[Any, Any], None] | None = None


def example_image() -> np.ndarray:
    """Return a colour field with grain, (480, 640, 3) uint8; as JPEG about as large as a photograph
    of that size.
    """
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: IMAGE_SIZE[0], : IMAGE_SIZE[1]]
    waves = [
        127 + 90 * np.sin(x / rng.uniform(20, 90)) * np.cos(y / rng.uniform(20, 90))
        for _ in range(3)
    ]
    return np.clip(np.stack(waves, axis=2) + rng.normal(0, 6, (*IMAGE_SIZE, 3)), 0, 255).astype(
        np.uint8
    )


def example_objects(num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ten boxes on that image, (10, 4) XYXY in pixels, and their classes, (10,) int64."""
    rng = np.random.default_rng(1)
    sides = rng.uniform(30, 200, (10, 2))
    corners = rng.uniform(0, 1, (10, 2)) * (np.array(IMAGE_SIZE[::-1]) - sides)
    return np.concatenate([corners, corners + sides], axis=1), rng.integers(0, num_classes, 10)
