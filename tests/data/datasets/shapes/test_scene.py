import numpy as np
import pytest
from pycocotools import mask as coco_mask

from detkit.data.datasets.shapes.scene import (
    IMAGE_SIZES,
    SHAPES_BACKGROUNDS,
    SHAPES_CLASSES,
    Scene,
    SceneObject,
    draw_scene,
)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(np.random.default_rng([0, 0, i])) for i in range(24)]


def _objects(scenes: list[Scene]) -> list[tuple[Scene, SceneObject]]:
    return [(scene, obj) for scene in scenes for obj in scene.objects]


def _mask(obj: SceneObject, height: int, width: int) -> np.ndarray:
    polygons = [p.reshape(-1).tolist() for p in obj.polygons]
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(
        bool
    )


def test_equal_generators_give_equal_scenes() -> None:
    first, second = (draw_scene(np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(first.image, second.image)
    assert [obj.box for obj in first.objects] == [obj.box for obj in second.objects]


def test_pictures_are_rgb_of_a_listed_size(scenes: list[Scene]) -> None:
    assert {scene.image.shape[:2] for scene in scenes} <= set(IMAGE_SIZES)
    assert all(scene.image.dtype == np.uint8 and scene.image.shape[2] == 3 for scene in scenes)


def test_boxes_lie_within_the_picture(scenes: list[Scene]) -> None:
    for scene, obj in _objects(scenes):
        height, width = scene.image.shape[:2]
        x1, y1, x2, y2 = obj.box
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height


def test_box_is_that_of_the_polygons(scenes: list[Scene]) -> None:
    for _, obj in _objects(scenes):
        corners = np.concatenate(obj.polygons)
        assert (*corners.min(axis=0), *corners.max(axis=0)) == obj.box


def test_polygons_cover_the_visible_area(scenes: list[Scene]) -> None:
    # Simplification may cost a third of a pixel along the border, and pycocotools rounds to whole pixels.
    for scene, obj in _objects(scenes):
        covered = _mask(obj, *scene.image.shape[:2]).sum()
        assert covered == pytest.approx(obj.area, rel=0.05, abs=20)


def test_masks_of_one_scene_do_not_overlap_beyond_their_borders(scenes: list[Scene]) -> None:
    for scene in scenes:
        count = sum(_mask(obj, *scene.image.shape[:2]).astype(int) for obj in scene.objects)
        assert (count > 1).mean() < 0.02


def test_every_object_is_mostly_visible(scenes: list[Scene]) -> None:
    # The layout counts whole pixels, the measure quarters: hence the margin.
    assert all(0.7 <= obj.visible_share <= 1 for _, obj in _objects(scenes))


def test_there_are_occluded_truncated_small_and_medium_objects_of_every_class(
    scenes: list[Scene],
) -> None:
    objects = [obj for _, obj in _objects(scenes)]
    assert any(obj.visible_share < 0.95 for obj in objects)
    assert any(obj.is_truncated for obj in objects)
    assert any(obj.area < 32**2 for obj in objects)
    assert any(obj.area > 64**2 for obj in objects)
    assert {obj.class_index for obj in objects} == set(range(len(SHAPES_CLASSES)))


def test_object_stands_out_from_what_surrounds_it(scenes: list[Scene]) -> None:
    # Boxes and pictures come from one map; were they shifted against each other, colours within a mask would not be
    # those of one object. Noise of 4 and shading stay; the border is left out.
    scene = next(s for s in scenes if len(s.objects) >= 3)
    obj = scene.objects[-1]  # on top of all others
    inside = _mask(obj, *scene.image.shape[:2])
    x1, y1, x2, y2 = (round(v) for v in obj.box)
    around = np.zeros_like(inside)
    around[max(y1 - 3, 0) : y2 + 3, max(x1 - 3, 0) : x2 + 3] = True
    mean_inside = scene.image[inside].mean(axis=0)
    mean_around = scene.image[around & ~inside].mean(axis=0)
    assert np.abs(mean_inside - mean_around).max() > 10


# --- keypoints, backgrounds, owners ---


def test_keypoints_lie_on_the_outline_and_in_the_middle(scenes: list[Scene]) -> None:
    for _, obj in _objects(scenes):
        if obj.is_truncated or obj.visible_share < 0.999:
            continue
        x1, y1, x2, y2 = obj.box
        centre, top, bottom, left, right = obj.keypoints[:, :2]
        assert top[1] < centre[1] < bottom[1]
        assert left[0] < centre[0] < right[0]
        assert (obj.keypoints[:, 2] == 2).all()
        corners = np.concatenate(obj.polygons)
        for point in (top, bottom, left, right):
            assert _distance_to_outline(point, corners) < 1.5
        assert min(x1, y1) - 1 <= obj.keypoints[:, :2].min()
        assert (obj.keypoints[:, :2] <= (x2 + 1, y2 + 1)).all()


def _distance_to_outline(point: np.ndarray, corners: np.ndarray) -> float:
    along = np.roll(corners, -1, axis=0) - corners
    share = ((point - corners) * along).sum(axis=1) / np.maximum((along**2).sum(axis=1), 1e-9)
    nearest = corners + share.clip(0, 1)[:, None] * along
    return float(np.linalg.norm(nearest - point, axis=1).min())


def test_hidden_keypoints_lie_under_a_later_object(scenes: list[Scene]) -> None:
    visibilities = []
    for scene in scenes:
        for number, obj in enumerate(scene.objects, start=1):
            for x, y, visibility in obj.keypoints:
                visibilities.append(visibility)
                near = scene.owners[
                    max(int(y) - 2, 0) : int(y) + 3, max(int(x) - 2, 0) : int(x) + 3
                ]
                if visibility == 1:
                    assert (near > number).any()
                if visibility == 0:
                    assert (x, y) == (0, 0)
    assert set(visibilities) == {0, 1, 2}


def test_owners_cover_what_the_polygons_cover(scenes: list[Scene]) -> None:
    for scene in scenes:
        for number, obj in enumerate(scene.objects, start=1):
            assert (scene.owners == number).sum() == pytest.approx(obj.area, rel=0.1, abs=20)


def test_backgrounds_of_all_kinds_appear(scenes: list[Scene]) -> None:
    assert {scene.background for scene in scenes} == set(range(len(SHAPES_BACKGROUNDS)))


def test_rotated_boxes_lie_tight_around_whole_objects() -> None:
    angles = []
    for seed in range(30):
        scene = draw_scene(np.random.default_rng(seed), rotated=True)
        for obj in scene.objects:
            if obj.is_truncated or obj.visible_share < 0.99:
                continue
            x, y, w, h, angle = obj.rotated_box
            angles.append(angle)
            cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
            away = np.concatenate(obj.polygons) - [x, y]
            along, across = away @ [cos, -sin], away @ [sin, cos]
            # Outlines of what is visible are simplified by up to a third of a pixel.
            assert np.allclose([along.min(), along.max()], [-w / 2, w / 2], atol=0.8)
            assert np.allclose([across.min(), across.max()], [-h / 2, h / 2], atol=0.8)
    assert len(angles) > 20
    assert min(angles) < -60
    assert max(angles) > 60
