"""The images of the error report: small JPEGs, and what is drawn over them in the page."""

import base64
import io
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from detkit.evaluation.report.analysis import Errors, object_scores, size_bins
from detkit.evaluation.report.matching import Items, Matching
from detkit.structures.mask_formats import bitmask_outlines, decode_runs
from detkit.utils.errors import UserError
from detkit.utils.image import convert_image_to_rgb, read_image

logger = logging.getLogger(__name__)

LOWEST_SCORE = 0.05
"""Detections below are not in the page, unless they count: they are many."""
_MASK_SIDE = 256  # pixels: outlines are drawn over a picture of twice as many
_QUALITY = 75


def picture(file_name: str, image_format: str, side: int, max_pixels: int) -> dict[str, Any]:
    """Return an image for the page: `picture`, the address of its JPEG data, `width` and `height`.

    Empty if it cannot be read. The sides are those of the file, in pixels.

    Args:
        file_name: Path or address of the image.
        image_format: INPUT.FORMAT.
        side: Longest side of the picture, in pixels.
        max_pixels: INPUT.MAX_IMAGE_PIXELS.
    """
    try:
        pixels = read_image(file_name, image_format, max_pixels=max_pixels)
    except (UserError, OSError) as error:
        logger.warning("the report shows no picture of %s: %s", file_name, error)
        return {}
    rgb = Image.fromarray(np.ascontiguousarray(convert_image_to_rgb(pixels, image_format)))
    width, height = rgb.size
    rgb.thumbnail((side, side))
    buffer = io.BytesIO()
    rgb.save(buffer, "JPEG", quality=_QUALITY)
    address = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"picture": address, "width": width, "height": height}


def drawn_items(
    matching: Matching, errors: Errors, images: Sequence[int], lowest_score: float
) -> list[dict[str, Any]]:
    """Return what to draw over each image: `objects` and `detections`, as lists of equal length.

    Objects have the score at which they are `found`, or -1; detections the index of their `error`
    in `ERROR_TYPES`, -1 if they are right, -2 if they are ignored.
    """
    objects, detections, number = matching.objects, matching.detections, matching.index
    found = object_scores(matching)
    bins = size_bins(matching)
    object_sizes = _sizes([inside for *_, inside, _ in bins], len(objects))
    sizes = _sizes([inside for *_, inside in bins], len(detections))
    kinds = np.where(matching.outcome.is_counted[number], errors.types, -2)
    entries = []
    for image in images:
        there, seen = matching.object_rows[image], matching.detection_rows[image]
        scores = detections.scores[seen]
        # They are in falling order of score.
        end = seen.start + int(np.searchsorted(-scores, -lowest_score, side="right"))
        shown = slice(seen.start, end)
        entries.append(
            {
                "objects": {
                    **_shapes(objects, there),
                    "size": object_sizes[there].tolist(),
                    "found": found[there].tolist(),
                    "ignored": objects.is_ignored[there].tolist(),
                },
                "detections": {
                    **_shapes(detections, shown),
                    "size": sizes[shown].tolist(),
                    # Not rounded: the page counts what reaches a score, as report.json does.
                    "score": detections.scores[shown].tolist(),
                    "error": kinds[shown].tolist(),
                },
            }
        )
    return entries


def _sizes(bins: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Return the index of the first range that something is in, or -1."""
    sizes = np.full(count, -1)
    for index, inside in reversed(list(enumerate(bins))):
        sizes[inside] = index
    return sizes


def _shapes(items: Items, rows: slice) -> dict[str, Any]:
    shapes: dict[str, Any] = {
        "class": items.classes[rows].tolist(),
        "box": np.round(items.boxes[rows], 1).tolist(),
    }
    if items.masks is not None:
        shapes["outlines"] = [_outlines(mask) for mask in items.masks[rows]]
    if items.keypoints is not None:
        shapes["keypoints"] = np.round(items.keypoints[rows], 1).tolist()
    return shapes


def _outlines(mask: Any) -> list[list[int]]:
    """Return the outlines of a run-length mask and of its holes, in pixels of the image.

    On a coarser grid, and not as polygons: those have a cut from top to bottom at each hole.
    """
    step = max(1, -(-max(mask["size"]) // _MASK_SIDE))
    coarse = decode_runs([[mask]])[step // 2 :: step, step // 2 :: step, 0]
    return [(outline * step).reshape(-1).tolist() for outline in bitmask_outlines(coarse)]
