"""Slow references: what the fast code is tested against, in plain loops over Python numbers."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
        ],
    ),
]
"""Values of a parametrised `device`."""


def iou_of_two_boxes(a, b) -> float:
    """Return the intersection over union of two boxes (x1, y1, x2, y2)."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if shared > 0 else 0.0


def slow_pairwise_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Return (N, M) IoU of (N, 4) and (M, 4) XYXY boxes."""
    rows = [[iou_of_two_boxes(a, b) for b in boxes2.tolist()] for a in boxes1.tolist()]
    return torch.tensor(rows, dtype=torch.float32).reshape(len(boxes1), len(boxes2))


def iou_of_two_rotated_boxes(a, b) -> float:
    """Return the intersection over union of two boxes (x, y, w, h, angle): one is cut by each side of the other."""

    def corners(box):
        x, y, w, h, angle = box
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        signs = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
        # In the image y points down, and a positive angle turns counter-clockwise.
        return [
            (x + i * w / 2 * cos + j * h / 2 * sin, y - i * w / 2 * sin + j * h / 2 * cos)
            for i, j in signs
        ]

    polygon = corners(a)
    for p, q in itertools.pairwise([*corners(b), corners(b)[0]]):
        kept = []
        for r, s in zip(polygon, polygon[1:] + polygon[:1], strict=True):
            inside_r, inside_s = (
                (q[0] - p[0]) * (v[1] - p[1]) - (q[1] - p[1]) * (v[0] - p[0]) for v in (r, s)
            )
            if inside_r >= 0:
                kept.append(r)
            if (inside_r >= 0) != (inside_s >= 0):
                t = inside_r / (inside_r - inside_s)
                kept.append((r[0] + t * (s[0] - r[0]), r[1] + t * (s[1] - r[1])))
        polygon = kept
    shared = sum(
        (r[0] * s[1] - s[0] * r[1]) / 2
        for r, s in zip(polygon, polygon[1:] + polygon[:1], strict=True)
    )
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def slow_batched_nms(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, iou=iou_of_two_boxes
) -> Tensor:
    """Return the indices of the boxes that no better box of their own class overlaps, best first."""
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i].item()):
        rivals = [j for j in kept if idxs[j] == idxs[i]]
        if all(iou(boxes[i].tolist(), boxes[j].tolist()) <= iou_threshold for j in rivals):
            kept.append(i)
    return torch.tensor(kept, dtype=torch.int64)


def slow_soft_nms(
    boxes, scores, groups, iou_threshold: float, method: str, sigma: float, min_score: float
):
    """Return (index, score) of the boxes that stay: the best goes out and lowers those of its group, until none is left."""
    left = dict(enumerate(scores.tolist()))
    kept = []
    while left:
        best = max(left, key=lambda i: left[i])
        score = left.pop(best)
        if score > min_score:
            kept.append((best, score))
        for i in left:
            iou = (
                iou_of_two_boxes(boxes[i].tolist(), boxes[best].tolist())
                if groups[i] == groups[best]
                else 0.0
            )
            if method == "gaussian":
                left[i] *= math.exp(-(iou**2) / sigma)
            elif iou >= iou_threshold:
                left[i] *= 1 - iou
    return kept


def slow_bilinear_sample(image: np.ndarray, y: float, x: float) -> np.ndarray:
    """Return the (C,) value of a (C, H, W) image at a point, pixel (r, c) being the value at exactly y = r, x = c.

    A point more than one pixel outside counts as 0; nearer, as the nearest pixel of the border.
    """
    _, height, width = image.shape
    if y < -1 or y > height or x < -1 or x > width:
        return np.zeros(len(image))
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    upper = (1 - dx) * image[:, top, left] + dx * image[:, top, right]
    lower = (1 - dx) * image[:, bottom, left] + dx * image[:, bottom, right]
    return (1 - dy) * upper + dy * lower


def slow_roi_align(
    features: Tensor,
    rois: Tensor,
    output_size: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Return (R, C, P, P): the mean of samples in each cell of a P x P grid over each (image, x1, y1, x2, y2)."""
    maps = features.double().numpy()
    out = np.zeros((len(rois), maps.shape[1], output_size, output_size))
    for r, (image, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (value * spatial_scale - (0.5 if aligned else 0.0) for value in box)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        rows = sampling_ratio or math.ceil(height / output_size)
        columns = sampling_ratio or math.ceil(width / output_size)
        for i in range(output_size):
            for j in range(output_size):
                samples = [
                    slow_bilinear_sample(
                        maps[int(image)],
                        y1 + (i + (a + 0.5) / rows) * height / output_size,
                        x1 + (j + (b + 0.5) / columns) * width / output_size,
                    )
                    for a in range(rows)
                    for b in range(columns)
                ]
                if samples:
                    out[r, :, i, j] = np.mean(samples, axis=0)
    return torch.from_numpy(out).to(features.dtype)


def slow_roi_align_rotated(
    features: Tensor,
    rois: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
) -> Tensor:
    """Return (R, C, P, P): the mean of samples in each cell of a grid over each (image, x, y, w, h, angle)."""
    maps = features.double().numpy()
    rows, columns = output_size
    out = np.zeros((len(rois), maps.shape[1], rows, columns))
    for r, (image, x, y, w, h, angle) in enumerate(rois.tolist()):
        x, y = x * spatial_scale - 0.5, y * spatial_scale - 0.5
        cell_w, cell_h = w * spatial_scale / columns, h * spatial_scale / rows
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        along_y = sampling_ratio or math.ceil(cell_h)
        along_x = sampling_ratio or math.ceil(cell_w)
        for i, j in itertools.product(range(rows), range(columns)):
            samples = []
            for a, b in itertools.product(range(along_y), range(along_x)):
                v = (i - rows / 2 + (a + 0.5) / along_y) * cell_h
                u = (j - columns / 2 + (b + 0.5) / along_x) * cell_w
                point = (v * cos - u * sin + y, v * sin + u * cos + x)
                samples.append(slow_bilinear_sample(maps[int(image)], *point))
            if samples:
                out[r, :, i, j] = np.mean(samples, axis=0)
    return torch.from_numpy(out).to(features.dtype)


def slow_deform_conv(x, offset, mask, weight, stride: int, padding: int, dilation: int) -> Tensor:
    """Return (N, C_out, H_out, W_out) of a modulated deformable 3 x 3 convolution, one sample after the other.

    Args:
        x: (N, C_in, H, W); what lies outside is 0, so that samples fade out over the pixel around it.
        offset: (N, 2 * G * 9, H_out, W_out): for each group of channels, for each place of the kernel, (dy, dx).
        mask: (N, G * 9, H_out, W_out)
        weight: (C_out, C_in / groups, 3, 3)
    """
    groups = x.shape[1] // weight.shape[1]
    per_offset_group = x.shape[1] // (mask.shape[1] // 9)
    out = torch.zeros(len(x), len(weight), *offset.shape[-2:])
    for n, o, row, column in itertools.product(*map(range, out.shape)):
        first = o // (len(weight) // groups) * weight.shape[1]
        for c, place in itertools.product(range(weight.shape[1]), range(9)):
            index = (first + c) // per_offset_group * 9 + place
            dy, dx = offset[n, 2 * index : 2 * index + 2, row, column].tolist()
            y = row * stride - padding + place // 3 * dilation + dy
            x_ = column * stride - padding + place % 3 * dilation + dx
            value = _bilinear_with_zeros(x[n, first + c], y, x_)
            out[n, o, row, column] += (
                weight[o, c, place // 3, place % 3].item() * value * mask[n, index, row, column]
            )
    return out


def _bilinear_with_zeros(image: Tensor, y: float, x: float) -> float:
    """Return the value of an (H, W) image at a point, pixels outside being 0."""
    value = 0.0
    for row, column in itertools.product(
        (math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)
    ):
        if 0 <= row < image.shape[0] and 0 <= column < image.shape[1]:
            value += (1 - abs(y - row)) * (1 - abs(x - column)) * image[row, column].item()
    return value


def random_boxes(count: int, size: float = 100.0, seed: int = 0) -> Tensor:
    """Return (count, 4) XYXY boxes within a square of that size, many of which overlap."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, 2, generator=generator) * size
    return torch.cat([corners.min(dim=1).values, corners.max(dim=1).values], dim=1)


def random_rotated_boxes(count: int, size: float = 100.0, seed: int = 0) -> Tensor:
    """Return (count, 5) XYWHA boxes around a square of that size, many of which overlap."""
    random = torch.rand(count, 5, generator=torch.Generator().manual_seed(seed))
    scale = torch.tensor([size, size, 0.6 * size, 0.4 * size, 720.0])
    return random * scale + torch.tensor([0.0, 0.0, 1.0, 1.0, -360.0])


def slow_anchors(
    sizes, aspect_ratios, stride: int, offset: float, grid_size: tuple[int, int]
) -> Tensor:
    """Return the (H * W * A, 4) anchors of one level, ordered by row, column, size, ratio (height / width)."""
    anchors = []
    for row in range(grid_size[0]):
        for column in range(grid_size[1]):
            x, y = (column + offset) * stride, (row + offset) * stride
            for size in sizes:
                for ratio in aspect_ratios:
                    width, height = size / math.sqrt(ratio), size * math.sqrt(ratio)
                    anchors.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    return torch.tensor(anchors, dtype=torch.float32).reshape(-1, 4)


def slow_match(
    quality: Tensor, thresholds, labels, allow_low_quality: bool
) -> tuple[Tensor, list[int]]:
    """Return each of R columns of a (M, R) matrix its largest value, and the label of the interval it falls in.

    With low-quality matches, a column that holds the largest value of a row, if that is not 0, has label 1.
    """
    rows = quality.tolist()
    best = [max(row[r] for row in rows) for r in range(quality.shape[1])]
    result = [
        labels[sum(value >= threshold for threshold in quality.new_tensor(thresholds).tolist())]
        for value in best
    ]
    if allow_low_quality:
        for row in rows:
            for r, value in enumerate(row):
                if value == max(row) > 0:
                    result[r] = 1
    return torch.tensor(best), result


def slow_focal_loss(logit: float, is_true: bool, alpha: float, gamma: float) -> float:
    """Return the focal loss of one logit; a negative alpha weighs nothing."""
    p = 1 / (1 + math.exp(-logit))
    p_true = p if is_true else 1 - p
    weight = 1.0 if alpha < 0 else alpha if is_true else 1 - alpha
    return -weight * (1 - p_true) ** gamma * math.log(p_true)


def slow_voc_average_precision(objects, detections, threshold: float, use_07_metric: bool) -> float:
    """Return Pascal VOC's average precision of one class, in [0, 1].

    Args:
        objects: One (image, box, is_difficult) per object; at least one is not difficult.
        detections: One (image, box, score) per detection.
        threshold: Overlap that is enough.
        use_07_metric: 11 points of recall instead of the area under the curve.
    """
    num_objects = sum(1 for _, _, is_difficult in objects if not is_difficult)
    taken, right, wrong = set(), 0, 0
    curve = []  # (recall, precision) after each detection
    for image, box, _ in sorted(detections, key=lambda d: -d[2]):
        best, best_overlap = None, 0.0
        for index, (object_image, object_box, _) in enumerate(objects):
            overlap = iou_of_two_boxes(box, object_box) if object_image == image else 0.0
            if overlap > best_overlap:
                best, best_overlap = index, overlap
        if best is None or best_overlap < threshold:
            wrong += 1
        elif not objects[best][2]:
            right, wrong = (right, wrong + 1) if best in taken else (right + 1, wrong)
            taken.add(best)
        if right + wrong:
            curve.append((right / num_objects, right / (right + wrong)))

    def best_precision(recall: float) -> float:
        return max((p for r, p in curve if r >= recall), default=0.0)

    if use_07_metric:
        return sum(best_precision(point * 0.1) for point in range(11)) / 11
    recalls = sorted({0.0} | {r for r, _ in curve})
    return sum((b - a) * best_precision(b) for a, b in itertools.pairwise(recalls))


def slow_covered_overlaps(overlaps: list[list[float]]) -> list[float]:
    """Pair rows with columns, always the free pair with the largest value next; one value per column, 0 without a row."""
    free_rows, free_columns = (
        set(range(len(overlaps))),
        set(range(len(overlaps[0]) if overlaps else 0)),
    )
    values = [0.0] * len(free_columns)
    for index in range(min(len(free_rows), len(free_columns))):
        value, row, column = max((overlaps[r][c], r, c) for r in free_rows for c in free_columns)
        values[index] = value
        free_rows.remove(row)
        free_columns.remove(column)
    return values


def slow_paste_mask(mask: Tensor, box, height: int, width: int) -> np.ndarray:
    """Return (height, width) values of an (h, w) mask stretched over a box, bilinear between cell centers, 0 outside."""
    rows, columns = mask.shape
    x1, y1, x2, y2 = box
    padded = np.pad(mask.double().numpy(), 1)
    out = np.zeros((height, width))
    for r in range(height):
        for c in range(width):
            y = (r + 0.5 - y1) / (y2 - y1) * rows - 0.5
            x = (c + 0.5 - x1) / (x2 - x1) * columns - 0.5
            if -1 < y < rows and -1 < x < columns:
                out[r, c] = slow_bilinear_sample(padded[None], y + 1, x + 1)[0]
    return out


def slow_keypoint_cell(point, box, size: int) -> tuple[int, bool]:
    """Return the cell of a (x, y, visibility) point on a size x size grid over a box, and whether it counts."""
    x, y, visibility = point
    x1, y1, x2, y2 = box
    column = size - 1 if x == x2 else math.floor((x - x1) * size / (x2 - x1))
    row = size - 1 if y == y2 else math.floor((y - y1) * size / (y2 - y1))
    counts = 0 <= column < size and 0 <= row < size and visibility > 0
    return (row * size + column if counts else 0), counts


def cubic_weight(distance: float, a: float = -0.75) -> float:
    """Return the weight of a sample at this distance in bicubic interpolation, of the kind that OpenCV and torch use."""
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def slow_bicubic_resize(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return an (h, w) array at another size; beyond its border it goes on as at the border."""

    def weights(size: int, new_size: int) -> np.ndarray:
        matrix = np.zeros((new_size, size))
        for i in range(new_size):
            center = (i + 0.5) * size / new_size - 0.5
            for j in range(math.floor(center) - 1, math.floor(center) + 3):
                matrix[i, min(max(j, 0), size - 1)] += cubic_weight(center - j)
        return matrix

    return weights(values.shape[0], height) @ values @ weights(values.shape[1], width).T


def slow_panoptic_merge(
    masks, scores, classes, semantic, overlap_threshold, stuff_area_thresh, score_thresh
):
    """Return the segment id of each pixel, and a dict per segment, of nested lists of masks and a map of classes."""
    pixels = list(itertools.product(range(len(semantic)), range(len(semantic[0]))))
    segments = [[0] * len(row) for row in semantic]
    infos = []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        own = [(r, c) for r, c in pixels if masks[i][r][c]]
        free = [(r, c) for r, c in own if segments[r][c] == 0]
        if (
            scores[i] < score_thresh
            or not own
            or (len(own) - len(free)) / len(own) > overlap_threshold
        ):
            continue
        infos.append(
            {"id": len(infos) + 1, "isthing": True, "score": scores[i], "category_id": classes[i]}
        )
        infos[-1]["instance_id"] = i
        for r, c in free:
            segments[r][c] = len(infos)
    for label in sorted({label for row in semantic for label in row} - {0}):
        free = [(r, c) for r, c in pixels if segments[r][c] == 0 and semantic[r][c] == label]
        if not free or len(free) < stuff_area_thresh:
            continue
        infos.append(
            {"id": len(infos) + 1, "isthing": False, "category_id": label, "area": len(free)}
        )
        for r, c in free:
            segments[r][c] = len(infos)
    return segments, infos
