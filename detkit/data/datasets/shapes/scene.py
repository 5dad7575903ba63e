"""Scenes of overlapping shapes on textured backgrounds, from a random generator.

A scene is painted back to front into a map of the object that is visible at each point of a grid
four times finer than the image. Image, masks, boxes and areas all come from that one map, so they
cannot disagree.

Legend: (H, W) image, (4H, 4W) fine grid, (P, 2) corners of an outline, x before y, in pixels.
"""

import colorsys
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from detkit.data.datasets.shapes.outline import region_polygons, signed_area

FloatArray = npt.NDArray[np.float64]
# Colors and light in single precision, which is exact enough and twice as fast.
Layer = npt.NDArray[np.floating]

SHAPES_CLASSES = ("circle", "square", "triangle", "star", "ring")
# Textures of the background: the stuff of semantic and panoptic models.
SHAPES_BACKGROUNDS = ("plain", "striped", "chequered", "grained")
# The same points on every shape, so that one head learns them for all. They are visible features:
# on a circle, which shows no tilt, its topmost point and so on; on the others, corners and middles
# of sides, tilted with the shape.
SHAPES_KEYPOINTS = ("centre", "top", "bottom", "left", "right")

# Landscape, portrait and square, so that aspect-ratio grouping has something to group.
IMAGE_SIZES = ((128, 160), (144, 192), (160, 192), (160, 160), (192, 144))

# Cells of the fine grid per pixel side: 16 levels of coverage at an edge, and boxes exact to a
# quarter of a pixel.
_FINE = 4
# No object may be covered by more than the rest: neither labeling a sliver nor leaving it unlabeled
# would be fair.
_MIN_VISIBLE_SHARE = 0.8
# Shares of (small, medium, large) objects, and their diameters in pixels; large ones have a share
# of the shorter image side. COCO calls an object small below an area of 32^2, large above 96^2.
_SIZE_SHARES = (0.2, 0.5, 0.3)
_SMALL_DIAMETER = (18.0, 30.0)
_MEDIUM_DIAMETER = (34.0, 84.0)
_LARGE_SHARE = (0.8, 1.05)
# Shapes stand nearly upright, as things in photographs do. With any angle, a small network takes
# several times as long to tell squares, triangles and stars apart.
_MAX_TILT = math.radians(15)
# In rotated scenes shapes are flattened to this share of their height, so that they have a
# direction, and turned by any angle.
_FLATTENED = (0.35, 0.6)
# Each class has a typical color, as cells, fruits and road signs have; hues lie within this
# distance of it, on a circle of 1.
_HUE_RANGE = 0.06

_ROUND = ("circle", "ring")
# Radius of a star's inner corners; x and y of its right arm, and y of the notch at its foot.
_STAR_NOTCH = 0.45
_STAR_ARM = (math.cos(math.pi / 10), -math.sin(math.pi / 10), _STAR_NOTCH)
# The visibility of a point on an outline is read this many pixels further in, away from the edge.
_PROBE_DEPTH = 1.5


@dataclass(frozen=True)
class SceneObject:
    """The visible part of one object of a scene.

    Attributes:
        class_index: Index into `SHAPES_CLASSES`.
        polygons: (P, 2) corners per visible part, largest first, in pixels, with holes cut in.
        box: Box around the visible parts, XYXY in pixels, `0 <= x1 < x2 <= W`; multiples of 1/4.
        area: Visible area in square pixels.
        visible_share: Visible share of the whole outline, in (0, 1].
        is_truncated: Whether the image border cuts it.
        keypoints: (5, 3) x, y in pixels and visibility of `SHAPES_KEYPOINTS`: 2 for a visible
            point, 1 if another object hides it; all 0 outside of the image.
        rotated_box: XYWHA around the whole outline, hidden parts included; the angle is in (-90,
            90]. It may reach beyond the image.
    """

    class_index: int
    polygons: list[FloatArray]
    box: tuple[float, float, float, float]
    area: float
    visible_share: float
    is_truncated: bool
    keypoints: FloatArray
    rotated_box: tuple[float, float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """An image and its objects.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        objects: From back to front.
        background: Index into `SHAPES_BACKGROUNDS`.
        owners: (H, W) uint8, number of the object at the middle of each pixel, from 1 in the order
            of `objects`; 0 for the background.
    """

    image: npt.NDArray[np.uint8]
    objects: list[SceneObject]
    background: int
    owners: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Placed:
    """An object as placed in the scene, visible or not.

    Attributes:
        class_index: Index into `SHAPES_CLASSES`.
        outline: (P, 2) corners in pixels; they may lie outside of the image.
        area: Area of the outline in square pixels.
        points: (5, 2) positions of `SHAPES_KEYPOINTS`; they may lie outside as well.
        rotated_box: See `SceneObject`.
    """

    class_index: int
    outline: FloatArray
    area: float
    points: FloatArray
    rotated_box: tuple[float, float, float, float, float]

    def window(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the pixels (x1, y1, x2, y2) of the image that contain the whole object."""
        x1, y1 = np.floor(self.outline.min(axis=0))
        x2, y2 = np.ceil(self.outline.max(axis=0)) + 1
        return max(int(x1), 0), max(int(y1), 0), min(int(x2), width), min(int(y2), height)


def draw_scene(rng: np.random.Generator, *, rotated: bool = False) -> Scene:
    """Return a scene; equal generators give equal scenes.

    Args:
        rng: Source of all draws.
        rotated: Whether shapes are flat and turned by any angle; else they stand nearly upright.
    """
    height, width = IMAGE_SIZES[rng.integers(len(IMAGE_SIZES))]
    placed, seen = _lay_out(rng, height, width, rotated)
    objects = [_visible_object(obj, seen, index) for index, obj in enumerate(placed, start=1)]
    image, background = _paint(rng, placed, seen)
    return Scene(image, objects, background, seen[_FINE // 2 :: _FINE, _FINE // 2 :: _FINE].copy())


# ------------------------------------------------------------------------------------------------
# layout


def _lay_out(
    rng: np.random.Generator, height: int, width: int, rotated: bool
) -> tuple[list[_Placed], npt.NDArray[np.uint8]]:
    """Place objects, the largest at the back.

    Returns:
        The objects, and (4H, 4W) uint8, the number of the visible object, from 1, or 0 for none.
    """
    diameters = sorted(
        (_draw_diameter(rng, min(height, width)) for _ in range(rng.integers(2, 6))), reverse=True
    )
    placed: list[_Placed] = []
    seen = Image.new("L", (_FINE * width, _FINE * height))
    for diameter in diameters:
        candidate = _place(rng, diameter, height, width, rotated)
        drawn = seen.copy()
        ImageDraw.Draw(drawn).polygon(
            [(x, y) for x, y in (candidate.outline * _FINE).tolist()], fill=len(placed) + 1
        )
        # One sample per pixel is enough to judge how much is hidden, and sixteen times faster.
        counts = drawn.resize((width, height), Image.Resampling.NEAREST).histogram()
        pixels = counts[1 : len(placed) + 2]
        shares = [p / obj.area for p, obj in zip(pixels, [*placed, candidate], strict=True)]
        if min(shares) >= _MIN_VISIBLE_SHARE:
            placed.append(candidate)
            seen = drawn
    return placed, np.asarray(seen)


def _draw_diameter(rng: np.random.Generator, shorter_side: int) -> float:
    large = (_LARGE_SHARE[0] * shorter_side, _LARGE_SHARE[1] * shorter_side)
    low, high = (_SMALL_DIAMETER, _MEDIUM_DIAMETER, large)[rng.choice(3, p=_SIZE_SHARES)]
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _place(
    rng: np.random.Generator, diameter: float, height: int, width: int, rotated: bool
) -> _Placed:
    class_index = int(rng.integers(len(SHAPES_CLASSES)))
    name = SHAPES_CLASSES[class_index]
    max_angle = math.pi / 2 if rotated else _MAX_TILT
    angle = rng.uniform(-max_angle, max_angle)
    scale = np.array([1.0, rng.uniform(*_FLATTENED) if rotated else 1.0]) * diameter / 2
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]])
    upright = _unit_outline(name) * scale
    corners = upright @ turn
    shows_tilt = rotated or name not in _ROUND
    points = _unit_keypoints(name) * scale @ (turn if shows_tilt else np.eye(2))
    # One object in six may be cut by the border; the others lie inside wherever they fit.
    margin = diameter / 2 * (0.5 if rng.random() < 1 / 6 else 1.0)
    centre = [
        rng.uniform(min(margin, side / 2), max(side - margin, side / 2)) for side in (width, height)
    ]
    low, high = upright.min(axis=0), upright.max(axis=0)
    x, y = ((low + high) / 2 @ turn + centre).tolist()
    w, h = (high - low).tolist()
    # A positive angle of a box turns counter-clockwise where y points down; here it is clockwise.
    rotated_box = (x, y, w, h, -math.degrees(angle))
    area = abs(signed_area(corners))
    return _Placed(class_index, corners + centre, area, points + centre, rotated_box)


def _unit_outline(name: str) -> FloatArray:
    """Return the corners of a shape, upright in the circle of radius 1 around the origin."""
    if name == "circle":
        return _on_circle(64)
    if name == "square":
        return _on_circle(4, first=math.pi / 4)
    if name == "triangle":
        return _on_circle(3)
    if name == "star":
        radius = np.where(np.arange(10) % 2 == 0, 1.0, _STAR_NOTCH)
        return _on_circle(10) * radius[:, None]
    if name == "ring":
        # Cut open, to be a polygon.
        closed = np.concatenate([_on_circle(64), _on_circle(64)[:1]])
        return np.concatenate([closed, 0.55 * closed[::-1]])
    raise ValueError(f"no shape is called {name!r}; known: {', '.join(SHAPES_CLASSES)}")


def _unit_keypoints(name: str) -> FloatArray:
    """Return the positions of `SHAPES_KEYPOINTS`, (5, 2), on a shape of `_unit_outline`."""
    if name in _ROUND:
        top, bottom, left, right = (0.0, -1.0), (0.0, 1.0), (-1.0, 0.0), (1.0, 0.0)
    elif name == "square":
        side = math.sqrt(0.5)
        top, bottom, left, right = (0.0, -side), (0.0, side), (-side, 0.0), (side, 0.0)
    else:
        # On a triangle, the corners and the middle of the lower side; on a star, three tips and the
        # notch at the foot.
        across, down, foot = (math.cos(math.pi / 6), 0.5, 0.5) if name == "triangle" else _STAR_ARM
        top, bottom, left, right = (0.0, -1.0), (0.0, foot), (-across, down), (across, down)
    return np.array([(0.0, 0.0), top, bottom, left, right])


def _on_circle(count: int, first: float = -math.pi / 2) -> FloatArray:
    """Return the corners of a regular polygon, (count, 2), from the angle `first`, the top."""
    angle = first + 2 * np.pi * np.arange(count) / count
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _visible_object(obj: _Placed, seen: npt.NDArray[np.uint8], index: int) -> SceneObject:
    """Measure the visible part of an object, whose number in the map `seen` is `index`."""
    height, width = (side // _FINE for side in seen.shape)
    x1, y1, x2, y2 = obj.window(height, width)
    region = seen[_FINE * y1 : _FINE * y2, _FINE * x1 : _FINE * x2] == index
    # Parts under two pixels and detail under a third of a pixel cannot be seen in the image.
    outlines = region_polygons(region, tolerance=1.4, min_area=2 * _FINE**2)
    polygons = [outline / _FINE + (x1, y1) for outline in outlines]
    corners = np.concatenate(polygons)
    box = (*corners.min(axis=0).tolist(), *corners.max(axis=0).tolist())
    area = int(region.sum()) / _FINE**2
    is_truncated = bool((obj.outline < 0).any() or (obj.outline > (width, height)).any())
    keypoints = _seen_keypoints(obj.points, seen, index)
    return SceneObject(
        obj.class_index,
        polygons,
        box,
        area,
        min(area / obj.area, 1.0),
        is_truncated,
        keypoints,
        obj.rotated_box,
    )


def _seen_keypoints(points: FloatArray, seen: npt.NDArray[np.uint8], index: int) -> FloatArray:
    """Return (5, 3) points with their visibility."""
    height, width = (side // _FINE for side in seen.shape)
    inwards = points[0] - points
    distance = np.linalg.norm(inwards, axis=1, keepdims=True)
    probes = points + inwards / np.maximum(distance, 1e-9) * np.minimum(_PROBE_DEPTH, distance)
    is_inside = np.all((points >= 0) & (points < (width, height)), axis=1)
    column, row = (probes * _FINE).astype(int).T
    # An object in front has a larger number in the map.
    is_hidden = seen[row.clip(0, seen.shape[0] - 1), column.clip(0, seen.shape[1] - 1)] > index
    visibility = np.where(is_hidden, 1.0, 2.0) * is_inside
    return np.column_stack([points * is_inside[:, None], visibility])


# ------------------------------------------------------------------------------------------------
# painting


def _paint(
    rng: np.random.Generator, placed: list[_Placed], seen: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.uint8], int]:
    """Paint background and objects, each with a texture, blended at edges by their coverage.

    Returns:
        (H, W, 3) uint8, and the index of the background.
    """
    height, width = (side // _FINE for side in seen.shape)
    backdrop, kind = _background(rng, height, width)
    picture = backdrop * _coverage(seen == 0)
    for index, obj in enumerate(placed, start=1):
        x1, y1, x2, y2 = obj.window(height, width)
        coverage = _coverage(seen[_FINE * y1 : _FINE * y2, _FINE * x1 : _FINE * x2] == index)
        hue = (obj.class_index / len(SHAPES_CLASSES) + rng.uniform(-_HUE_RANGE, _HUE_RANGE)) % 1.0
        picture[y1:y2, x1:x2] += coverage * _fill(rng, hue, y2 - y1, x2 - x1)
    picture += 4 * rng.standard_normal(picture.shape, dtype=np.float32)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), kind


def _coverage(region: npt.NDArray[np.bool_]) -> Layer:
    """Return the share of every pixel, (H, W, 1), that a region of the fine grid covers."""
    reduced = Image.fromarray(region.astype(np.uint8) * 255).reduce(_FINE)
    return np.asarray(reduced, dtype=np.float32)[..., None] / 255


def _background(rng: np.random.Generator, height: int, width: int) -> tuple[Layer, int]:
    """Paint a muted color with slow clouds, and one of the patterns of `SHAPES_BACKGROUNDS`.

    Returns:
        (H, W, 3), 0 to 255, and the index of the pattern.
    """
    hue, saturation, value = rng.random(), rng.uniform(0.05, 0.25), rng.uniform(0.3, 0.85)
    color = 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32)
    light = 16 * _clouds(rng, height, width, cells=4)
    kind = int(rng.integers(len(SHAPES_BACKGROUNDS)))
    if kind == 1:
        light += rng.uniform(6, 18) * np.sign(_wave(rng, height, width, period=rng.uniform(8, 24)))
    elif kind == 2:
        period = rng.uniform(12, 32)
        angle = rng.uniform(0, math.pi)
        squares = _wave(rng, height, width, period, angle) * _wave(
            rng, height, width, period, angle + math.pi / 2
        )
        light += rng.uniform(6, 16) * np.sign(squares)
    elif kind == 3:
        light += rng.uniform(6, 14) * _clouds(rng, height, width, cells=28)
    tint = 1 + 0.1 * np.stack([_clouds(rng, height, width, cells=2) for _ in range(3)], axis=2)
    return np.clip((color + light[..., None]) * tint, 0, 255), kind


def _fill(rng: np.random.Generator, hue: float, height: int, width: int) -> Layer:
    """Paint (H, W, 3) for an object: a strong color, shaded in one direction, perhaps striped."""
    saturation, value = rng.uniform(0.55, 1.0), rng.uniform(0.55, 1.0)
    color = 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32)
    shade = 1 + 0.16 * _wave(rng, height, width, period=2.5 * max(height, width))
    if rng.random() < 0.3:
        shade = shade * (1 + 0.12 * np.sign(_wave(rng, height, width, period=rng.uniform(5, 12))))
    return np.clip(color * shade[..., None], 0, 255)


def _clouds(rng: np.random.Generator, height: int, width: int, cells: int) -> Layer:
    """Return smooth noise with `cells` hills per side, (H, W), about -2 to 2."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), np.float32))
    return np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))


def _wave(
    rng: np.random.Generator, height: int, width: int, period: float, angle: float | None = None
) -> Layer:
    """Return a sine wave of `period` pixels, (H, W) in [-1, 1], in a given or random direction."""
    angle = rng.uniform(0, 2 * math.pi) if angle is None else angle
    frequency = 2 * math.pi / period
    x = np.arange(width, dtype=np.float32) * (frequency * math.cos(angle))
    y = np.arange(height, dtype=np.float32) * (frequency * math.sin(angle)) + rng.uniform(
        0, 2 * math.pi
    )
    return np.sin(x + y[:, None])
