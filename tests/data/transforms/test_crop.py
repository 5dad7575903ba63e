"""Crops and padding: windows inside the image, sizes as asked, boxes that follow."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from detkit.data import transforms as T
from detkit.data.transforms.crop import clip_polygons


def gradient(height=40, width=60):
    return np.arange(height * width, dtype=np.int64).reshape(height, width)


def test_crop_cuts_the_window_and_moves_boxes():
    tfm = T.CropTransform(10, 5, 20, 15)
    assert np.array_equal(tfm.apply_image(gradient()), gradient()[5:20, 10:30])
    assert tfm.apply_box([[12, 6, 40, 10]]).tolist() == [[2, 1, 30, 5]]


def test_window_may_be_a_single_pixel_but_not_less():
    assert T.CropTransform(3, 2, 1, 1).apply_image(gradient()).tolist() == [[gradient()[2, 3]]]
    for window in ((0, 0, 0, 1), (0, 0, 1, 0), (-1, 0, 1, 1), (0, -1, 1, 1)):
        with pytest.raises(ValueError, match="a corner at 0 or more and sides of 1 or more"):
            T.CropTransform(*window)


def test_crop_and_padding_are_inverse():
    crop = T.CropTransform(10, 5, 20, 15, 60, 40)
    restored = crop.inverse().apply_image(crop.apply_image(gradient()))
    assert restored.shape == (40, 60)
    assert np.array_equal(restored[5:20, 10:30], gradient()[5:20, 10:30])
    assert restored[:5].max() == 0
    assert np.array_equal(
        crop.inverse().inverse().apply_image(restored), crop.apply_image(gradient())
    )
    points = np.array([[12.0, 7.0]])
    assert np.allclose(crop.inverse().apply_coords(crop.apply_coords(points)), points)


def test_padding_has_a_value_of_its_own_for_labels():
    tfm = T.PadTransform(1, 2, 3, 4, pad_value=7, seg_pad_value=255)
    assert tfm.apply_image(np.zeros((2, 2, 3), np.uint8))[0, 0].tolist() == [7, 7, 7]
    assert tfm.apply_segmentation(np.zeros((2, 2), np.uint8))[-1, -1] == 255
    assert tfm.apply_image(np.zeros((2, 2, 3), np.uint8)).shape == (8, 6, 3)


@pytest.mark.parametrize("mirrored", [(2,), (1,), (0, 2), (0, 1, 2)])
def test_padding_of_a_mirrored_view_stays_one(mirrored):
    view = np.flip(np.arange(24, dtype=np.uint8).reshape(2, 4, 3), mirrored)
    tfm = T.PadTransform(1, 2, 3, 4, pad_value=7)
    padded = tfm.apply_image(view)
    assert np.array_equal(padded, tfm.apply_image(view.copy()))
    # A copy into another order takes four times as long as one of whole rows.
    assert [axis for axis in range(3) if padded.strides[axis] < 0] == list(mirrored)


def test_inverse_needs_the_old_size():
    for tfm in (T.CropTransform(0, 0, 2, 2), T.PadTransform(0, 0, 2, 2)):
        with pytest.raises(NotImplementedError, match="needs orig_w and orig_h"):
            tfm.inverse()


@pytest.mark.parametrize(
    ("crop_type", "crop_size", "heights", "widths"),
    [
        pytest.param("relative", (0.5, 0.25), {20}, {15}, id="relative"),
        pytest.param(
            "relative_range",
            (0.9, 0.95),
            {36, 37, 38, 39, 40},
            {57, 58, 59, 60},
            id="relative-range",
        ),
        pytest.param("absolute", (30, 100), {30}, {60}, id="absolute-limited"),
        pytest.param(
            "absolute_range", (38, 50), {38, 39, 40}, set(range(38, 51)), id="absolute-range"
        ),
    ],
)
def test_crop_sizes_and_places(crop_type, crop_size, heights, widths):
    np.random.seed(0)
    aug = T.RandomCrop(crop_type, crop_size)
    drawn = [aug.get_transform(gradient()) for _ in range(400)]
    assert {t.h for t in drawn} == heights
    assert {t.w for t in drawn} == widths
    assert all(t.apply_image(gradient()).shape == (t.h, t.w) for t in drawn)
    assert {t.y0 for t in drawn} == set(range(40 - min(heights) + 1))


def test_crop_around_an_instance_holds_its_center():
    np.random.seed(0)
    boxes = np.array([[0, 0, 4, 4], [50, 30, 60, 40], [20.5, 10.2, 21.0, 11.9]])
    aug = T.RandomCropAroundInstance("absolute", (8, 8))
    hit = np.zeros(3, dtype=int)
    for _ in range(300):
        aug_input = T.AugInput(gradient(), boxes=boxes)
        aug(aug_input)
        assert aug_input.image.shape == (8, 8)
        centers = (aug_input.boxes[:, :2] + aug_input.boxes[:, 2:]) / 2
        held = ((centers >= 0) & (centers < 8)).all(axis=1)
        assert held.any()
        hit += held
    assert hit.min() > 60


def test_crop_around_an_instance_visits_every_place_that_holds_it():
    np.random.seed(0)
    aug = T.RandomCropAroundInstance("absolute", (4, 4))
    boxes = np.array([[10.0, 10, 11, 11]])
    drawn = [aug.get_transform(gradient(), boxes) for _ in range(300)]
    assert {t.x0 for t in drawn} == {7, 8, 9, 10}


@pytest.mark.parametrize("box", [(-30, -30, -10, -10), (500, 500, 600, 600)])
def test_crop_around_an_instance_outside_stays_in_the_image(box):
    aug_input = T.AugInput(gradient(), boxes=np.array([box], dtype=float))
    T.RandomCropAroundInstance("relative", (0.5, 0.5))(aug_input)
    assert aug_input.image.shape == (20, 30)


@pytest.mark.parametrize("boxes", [None, np.zeros((0, 4))])
def test_crop_without_instances_is_anywhere(boxes):
    np.random.seed(0)
    aug = T.RandomCropAroundInstance("absolute", (10, 10))
    assert len({aug.get_transform(gradient(), boxes).x0 for _ in range(200)}) > 30


@pytest.mark.parametrize(
    ("crop_type", "crop_size", "message"),
    [
        ("relativ", (0.5, 0.5), "crop_type must be one of relative"),
        ("relative", (0.5, 1.5), r"shares in \(0, 1\]"),
        ("relative_range", (0, 0.5), r"shares in \(0, 1\]"),
        ("absolute", (0, 5), "pixels, at least 1"),
        ("absolute_range", (9, 5), "from the smaller to the larger"),
        ("absolute", (5,), "must be two numbers"),
    ],
)
def test_bad_crops_are_refused(crop_type, crop_size, message):
    with pytest.raises(ValueError, match=message):
        T.RandomCrop(crop_type, crop_size).get_transform(gradient())


def test_crop_by_shares_above_one_can_be_built_and_printed():
    assert str(T.RandomCrop("relative", (5, 5))) == (
        "RandomCrop(crop_type='relative', crop_size=(5, 5))"
    )


def test_negative_window_and_border_are_refused():
    with pytest.raises(ValueError, match="x0=-1"):
        T.CropTransform(-1, 0, 2, 2)
    with pytest.raises(ValueError, match="left -1"):
        T.PadTransform(-1, 0, 2, 2)


@pytest.mark.parametrize(
    ("augmentation", "window"),
    [
        pytest.param(T.RandomCrop("relative_range", (0.3, 0.5)), (3, 3, 51, 27), id="anywhere"),
        pytest.param(
            T.RandomCropAroundInstance("absolute_range", (10, 20)), (41, 18, 10, 15), id="instance"
        ),
    ],
)
def test_windows_of_a_seed_stay_those_of_older_versions(augmentation, window):
    # Height before width, y before x: otherwise a run would not resume bit for bit.
    np.random.seed(0)
    sample = T.AugInput(np.zeros((40, 60, 3)), boxes=np.array([[3.0, 4, 9, 30], [40, 5, 55, 38]]))
    crop = augmentation(sample)
    assert (crop.x0, crop.y0, crop.w, crop.h) == window


# --- crops by the label map ---


def two_halves():
    labels = np.zeros((20, 40), dtype=np.uint8)
    labels[:, 20:] = 1
    return labels


def test_crop_by_area_shows_more_than_one_class():
    np.random.seed(0)
    aug = T.RandomCrop_CategoryAreaConstraint("absolute", (10, 10), 0.75)
    shares = []
    for _ in range(60):
        labels = aug.get_transform(
            np.zeros((20, 40, 3), np.uint8), two_halves()
        ).apply_segmentation(two_halves())
        shares.append(max(np.mean(labels == 0), np.mean(labels == 1)))
    # A tenth of the windows will do; ten draws find one in two of three cases, where a single draw would in one of ten.
    assert np.mean(np.array(shares) < 0.75) > 0.4


def test_ignored_label_does_not_count():
    aug = T.RandomCrop_CategoryAreaConstraint("relative", (1.0, 1.0), 0.6, ignored_category=1)
    assert not aug._is_varied(two_halves())
    assert T.RandomCrop_CategoryAreaConstraint("relative", (1.0, 1.0), 0.6)._is_varied(two_halves())


def test_class_of_exactly_the_largest_share_is_too_large():
    aug = T.RandomCrop_CategoryAreaConstraint("relative", (1.0, 1.0), 0.5)
    assert not aug._is_varied(two_halves())


def test_tenth_window_is_taken_whatever_it_holds(monkeypatch):
    aug = T.RandomCrop_CategoryAreaConstraint("absolute", (10, 10), 0.75)
    monkeypatch.setattr(aug, "_is_varied", lambda labels: False)
    sizes = []
    size_of = aug.get_crop_size
    monkeypatch.setattr(aug, "get_crop_size", lambda size: sizes.append(size) or size_of(size))
    aug.get_transform(np.zeros((20, 40, 3)), two_halves())
    assert len(sizes) == 10


def test_crop_by_area_of_one_does_not_look_at_labels():
    aug = T.RandomCrop_CategoryAreaConstraint("relative", (0.5, 0.5))
    assert aug.get_transform(np.zeros((20, 40, 3), np.uint8)).w == 20


def test_crop_by_area_needs_labels():
    with pytest.raises(ValueError, match="SINGLE_CATEGORY_MAX_AREA below 1 needs a label map"):
        T.RandomCrop_CategoryAreaConstraint("relative", (0.5, 0.5), 0.75).get_transform(
            np.zeros((20, 40, 3))
        )
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\], got 0"):
        T.RandomCrop_CategoryAreaConstraint("relative", (0.5, 0.5), 0)


# --- polygons, against the pixels that they cover ---

SIZE = (40, 50)


def drawn(polygons, scale=4, margin=60):
    """Return the pixels of an image of `SIZE` that polygons cover, on a finer grid; the polygons may leave it."""
    height, width = SIZE
    canvas = Image.new("1", (scale * (width + 2 * margin), scale * (height + 2 * margin)))
    for polygon in polygons:
        corners = ((polygon + margin) * scale).ravel().tolist()
        ImageDraw.Draw(canvas).polygon(corners, fill=1)
    inside = slice(scale * margin, -scale * margin)
    return np.asarray(canvas)[inside, inside]


def star(rng, center, radius, corners=24):
    angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
    return (
        center
        + (rng.uniform(0.2, 1, corners) * radius * np.array([np.cos(angle), np.sin(angle)])).T
    )


@pytest.mark.parametrize("seed", range(8))
def test_parts_cover_the_same_pixels_and_stay_inside(seed):
    rng = np.random.default_rng(seed)
    for _ in range(8):
        polygon = star(rng, rng.uniform((-5, -5), (55, 45)), rng.uniform(5, 50))
        parts = clip_polygons([polygon], SIZE)
        # Rounding to the fine grid may differ along outlines.
        assert np.mean(drawn(parts) != drawn([polygon])) < 0.02
        for part in parts:
            assert part.min() >= 0
            assert (part <= (50, 40)).all()


def test_polygon_inside_stays_itself():
    square = np.array([[1.0, 1], [9, 1], [9, 9], [1, 9]])
    assert clip_polygons([square], SIZE)[0] is square


def test_polygon_along_the_border_stays_itself():
    whole = np.array([[0.0, 0], [50, 0], [50, 40], [0, 40]])
    assert clip_polygons([whole], SIZE)[0] is whole


@pytest.mark.parametrize("offset", [(-100, 0), (0, -100), (60, 0), (0, 60)])
def test_nothing_is_left_of_a_polygon_outside(offset):
    square = np.array([[1.0, 1], [9, 1], [9, 9], [1, 9]])
    assert clip_polygons([square + offset], SIZE) == []


def test_polygon_that_touches_the_border_from_outside_has_nothing_inside():
    assert clip_polygons([np.array([[-5.0, 5], [0, 5], [0, 10], [-5, 10]])], SIZE) == []


def test_two_ends_of_one_object_become_two_polygons():
    # A U that dips below the lower border: without a cut between the ends, its box would reach the border.
    u_shape = np.array(
        [[5.0, 10], [10, 10], [10, 45], [30, 45], [30, 20], [35, 20], [35, 50], [5, 50]]
    )
    parts = clip_polygons([u_shape], SIZE)
    boxes = sorted((*part.min(axis=0).tolist(), *part.max(axis=0).tolist()) for part in parts)
    assert boxes == [(5, 10, 10, 40), (30, 20, 35, 40)]


def test_object_around_the_image_covers_all_of_it():
    around = np.array([[-10.0, -10], [60, -10], [60, 50], [-10, 50]])
    (part,) = clip_polygons([around], SIZE)
    assert sorted(part.tolist()) == [[0, 0], [0, 40], [50, 0], [50, 40]]


def test_crop_cuts_polygons():
    square = np.array([[0.0, 0], [10, 0], [10, 10], [0, 10]])
    (part,) = T.CropTransform(4, 6, 20, 20).apply_polygons([square])
    assert sorted(part.tolist()) == [[0, 0], [0, 4], [6, 0], [6, 4]]


@pytest.mark.parametrize("size", [(20, 90), (90, 20), (60, 70), (10, 10)])
@pytest.mark.parametrize("pad", [True, False])
def test_fixed_size_crop(size, pad):
    np.random.seed(0)
    image = np.ones((*size, 3), dtype=np.uint8)
    cropped = T.FixedSizeCrop((40, 50), pad, 7).get_transform(image).apply_image(image)
    height, width = min(size[0], 40), min(size[1], 50)
    assert cropped.shape[:2] == ((40, 50) if pad else (height, width))
    assert (cropped[:height, :width] == 1).all()
    assert (cropped[height:] == 7).all()
    assert (cropped[:, width:] == 7).all()


def test_fixed_size_crop_pads_label_maps_with_their_own_value():
    labels = np.zeros((3, 3), dtype=np.uint8)
    transform = T.FixedSizeCrop((4, 3)).get_transform(labels)
    assert transform.apply_segmentation(labels)[3].tolist() == [255, 255, 255]


def test_wrong_fixed_size_is_an_error():
    with pytest.raises(ValueError, match=r"crop_size must be \(height, width\), at least 1"):
        T.FixedSizeCrop((0, 5))


def test_window_of_min_iou_keeps_objects_as_asked():
    image = np.zeros((80, 100, 3), np.uint8)
    boxes = np.array([[20.0, 20, 60, 60], [50, 30, 90, 70]])
    np.random.seed(0)
    augmentation = T.MinIoURandomCrop(min_ious=(0.3,), min_crop_size=0.3)
    kinds = set()
    for _ in range(60):
        tfm = augmentation.get_transform(image, boxes)
        kinds.add(type(tfm))
        if isinstance(tfm, T.CropTransform):
            assert 0.45 <= tfm.h / tfm.w <= 2.2
            window = np.array([tfm.x0, tfm.y0, tfm.x0 + tfm.w, tfm.y0 + tfm.h])
            centers = (boxes[:, :2] + boxes[:, 2:]) / 2
            assert ((centers > window[:2]) & (centers < window[2:])).all(axis=1).any()
    assert kinds == {T.CropTransform, T.NoOpTransform}
    assert isinstance(augmentation.get_transform(image, boxes[:0]), T.NoOpTransform)


def test_every_object_needs_the_overlap_of_min_iou():
    boxes = np.array([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    window = np.array([0, 0, 10, 10])
    assert T.MinIoURandomCrop._is_kept(window, boxes[:1], 0.5)
    assert not T.MinIoURandomCrop._is_kept(window, boxes, 0.5)
