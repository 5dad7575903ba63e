import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from detkit.structures import Boxes, BoxMode, Instances, RotatedBoxes
from detkit.utils.colormap import id2rgb
from detkit.utils.image_file import BadImageError
from detkit.visualization import ColorMode, Visualizer

METADATA = SimpleNamespace(
    thing_classes=["cat", "dog"], thing_colors=[(250, 10, 20), (10, 240, 30)]
)


def _grey(height: int = 120, width: int = 160) -> np.ndarray:
    return np.full((height, width, 3), 90, np.uint8)


def _predictions(count: int = 2) -> Instances:
    result = Instances((120, 160))
    result.pred_boxes = Boxes(torch.tensor([[20.0, 30, 80, 100], [90, 40, 150, 110]])[:count])
    result.scores = torch.tensor([0.984, 0.5])[:count]
    result.pred_classes = torch.tensor([0, 1])[:count]
    return result


def _written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the texts that are drawn from now on."""
    texts: list[str] = []
    monkeypatch.setattr(
        "detkit.visualization.canvas.Canvas.draw_text",
        lambda self, text, position, **kwargs: texts.append(text),
    )
    return texts


def test_labels_show_class_name_and_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = _written(monkeypatch)
    Visualizer(_grey(), METADATA).draw_instance_predictions(_predictions())
    assert sorted(texts) == ["cat 98%", "dog 50%"]


def test_without_names_the_number_of_the_class_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = _written(monkeypatch)
    Visualizer(_grey()).draw_instance_predictions(_predictions())
    assert sorted(texts) == ["0 98%", "1 50%"]


def test_boxes_are_drawn_in_the_colours_of_their_classes() -> None:
    picture = Visualizer(
        _grey(), METADATA, instance_mode=ColorMode.SEGMENTATION
    ).draw_instance_predictions(_predictions())
    image = picture.get_image()
    assert image[70, 20].tolist() == [250, 10, 20]
    assert image[70, 149].tolist() == [10, 240, 30]


def test_instances_of_one_class_have_their_own_colours_by_default() -> None:
    predictions = _predictions()
    predictions.pred_classes = torch.tensor([1, 1])
    image = Visualizer(_grey(), METADATA).draw_instance_predictions(predictions).get_image()
    assert image[70, 20].tolist() != image[70, 149].tolist()


@pytest.mark.parametrize(
    "predictions",
    [pytest.param(_predictions(0), id="none"), pytest.param(Instances((120, 160)), id="no fields")],
)
def test_nothing_found_leaves_the_picture_as_it_is(predictions: Instances) -> None:
    picture = Visualizer(_grey(), METADATA).draw_instance_predictions(predictions)
    assert np.array_equal(picture.get_image(), _grey())


def test_boxes_follow_the_scale() -> None:
    image = (
        Visualizer(_grey(), METADATA, scale=2)
        .overlay_instances(boxes=[[20, 30, 80, 100]])
        .get_image()
    )
    assert image.shape == (240, 320, 3)
    changed = (image != 90).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == (40, 60, 160, 200)


def test_polygons_follow_the_scale() -> None:
    picture = Visualizer(_grey(), scale=2).overlay_instances(
        masks=[SQUARE], assigned_colors=[(255, 0, 0)]
    )
    rows, columns = np.nonzero((picture.get_image() != 90).any(axis=2))
    extent = np.array([columns.min(), rows.min(), columns.max(), rows.max()])
    assert np.abs(extent - [40, 60, 160, 200]).max() <= 2  # its border is drawn around it


def _record() -> dict:
    return {
        "file_name": "x.jpg",
        "image_id": 1,
        "annotations": [
            {"bbox": [20, 30, 60, 70], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0},
            {
                "bbox": [90, 40, 150, 110],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 1,
                "iscrowd": 1,
            },
        ],
    }


def test_record_is_drawn_with_names_and_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = _written(monkeypatch)
    image = Visualizer(_grey(), METADATA).draw_dataset_dict(_record()).get_image()
    assert sorted(texts) == ["cat", "dog (crowd)"]
    assert image[70, 20].tolist() != [90, 90, 90]
    assert image[70, 79].tolist() != [90, 90, 90]


@pytest.mark.parametrize(
    "annotations",
    [pytest.param({}, id="not annotated"), pytest.param({"annotations": []}, id="empty")],
)
def test_record_without_objects_leaves_the_picture_as_it_is(annotations: dict) -> None:
    picture = Visualizer(_grey(), METADATA).draw_dataset_dict(
        {"file_name": "x.jpg", "image_id": 1, **annotations}
    )
    assert np.array_equal(picture.get_image(), _grey())


def _square_mask() -> np.ndarray:
    mask = np.zeros((120, 160), bool)
    mask[30:100, 20:80] = True
    return mask


SQUARE = [[20.0, 30.0, 80.0, 30.0, 80.0, 100.0, 20.0, 100.0]]
RLE = coco_mask.encode(np.asfortranarray(_square_mask().astype(np.uint8)))
MASKS = [
    pytest.param([SQUARE], id="polygons"),
    pytest.param([RLE], id="compressed run-length encoding"),
    pytest.param(
        [{"size": [120, 160], "counts": [2430, *[70, 50] * 59, 70, 9620]}],
        id="plain run-length encoding",
    ),
    pytest.param([_square_mask()], id="array"),
    pytest.param(torch.as_tensor(_square_mask())[None], id="tensor"),
    pytest.param(SimpleNamespace(polygons=[[np.array(SQUARE[0])]]), id="PolygonMasks"),
    pytest.param(SimpleNamespace(tensor=torch.as_tensor(_square_mask())[None]), id="BitMasks"),
]


@pytest.mark.parametrize("masks", MASKS)
def test_every_form_of_a_mask_tints_the_same_pixels(masks) -> None:
    image = (
        Visualizer(_grey())
        .overlay_instances(masks=masks, assigned_colors=[(255, 0, 0)])
        .get_image()
    )
    tinted = (image != 90).any(axis=2)
    assert (tinted != _square_mask()).mean() < 0.02


@pytest.mark.parametrize("masks", MASKS)
def test_grey_mode_keeps_colour_within_masks_only(masks) -> None:
    red = np.full((120, 160, 3), (200, 0, 0), np.uint8)
    picture = Visualizer(red, instance_mode=ColorMode.IMAGE_BW).overlay_instances(
        masks=masks, alpha=0
    )
    image = picture.get_image()
    assert image[65, 50].tolist() == [200, 0, 0]
    assert len(set(image[5, 5].tolist())) == 1


@pytest.mark.parametrize("count", [0, 1])
def test_grey_mode_is_all_grey_for_predictions_without_masks(count) -> None:
    red = np.full((120, 160, 3), (200, 0, 0), np.uint8)
    picture = Visualizer(red, instance_mode=ColorMode.IMAGE_BW)
    image = picture.draw_instance_predictions(_predictions(count)).get_image()
    assert len(set(image[115, 155].tolist())) == 1
    if count == 0:
        assert (image == image[..., :1]).all()


def test_different_numbers_of_boxes_and_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 boxes, 2 labels"):
        Visualizer(_grey()).overlay_instances(boxes=[[0, 0, 5, 5]], labels=["cat", "dog"])


def test_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size of its picture, 120 x 160: got shape \(119, 160\)"):
        Visualizer(_grey()).overlay_instances(masks=[np.zeros((119, 160), bool)])


KEYPOINTS = SimpleNamespace(
    keypoint_names=["nose", "left_eye", "tail"],
    keypoint_connection_rules=[("nose", "left_eye", (250, 10, 20)), ("nose", "ear", (10, 250, 20))],
)


@pytest.mark.parametrize(
    "keypoints",
    [
        pytest.param(
            torch.tensor([[[30.0, 60, 0.9], [90, 60, 0.9], [130, 20, 0.01]]]), id="tensor"
        ),
        pytest.param(
            SimpleNamespace(tensor=torch.tensor([[[30.0, 60, 2], [90, 60, 1], [130, 20, 0]]])),
            id="Keypoints",
        ),
        pytest.param([[30, 60, 2, 90, 60, 2, 0, 0, 0]], id="flat list"),
    ],
)
def test_keypoints_that_are_seen_are_drawn_and_connected(keypoints) -> None:
    image = Visualizer(_grey(), KEYPOINTS).overlay_instances(keypoints=keypoints).get_image()
    assert image[60, 60].tolist() == [250, 10, 20]
    changed = (image != 90).any(axis=2)
    assert changed[60, 30:90].all()
    assert not changed[:50].any()


def test_keypoints_follow_the_scale() -> None:
    keypoints = [[30, 60, 2, 90, 60, 2, 0, 0, 0]]
    image = (
        Visualizer(_grey(), KEYPOINTS, scale=2).overlay_instances(keypoints=keypoints).get_image()
    )
    assert image[120, 120].tolist() == [250, 10, 20]


def test_predicted_keypoints_are_drawn() -> None:
    predictions = _predictions(1)
    plain = Visualizer(_grey(), KEYPOINTS).draw_instance_predictions(predictions).get_image()
    predictions.pred_keypoints = torch.tensor([[[30.0, 60, 0.9], [60, 60, 0.9], [50, 20, 0.01]]])
    image = Visualizer(_grey(), KEYPOINTS).draw_instance_predictions(predictions).get_image()
    assert image[60, 45].tolist() == [250, 10, 20] != plain[60, 45].tolist()


def test_number_of_keypoints_must_be_that_of_their_names() -> None:
    with pytest.raises(ValueError, match="3 keypoint_names, an object has 2 keypoints"):
        Visualizer(_grey(), KEYPOINTS).overlay_instances(keypoints=[[1, 1, 2, 5, 5, 2]])


def test_record_with_keypoints_on_some_objects_is_drawn() -> None:
    record = _record()
    record["annotations"][1]["keypoints"] = [100.0, 60, 2, 130, 60, 2, 0, 0, 0]
    image = Visualizer(_grey(), KEYPOINTS).draw_dataset_dict(record).get_image()
    assert image[60, 115].tolist() == [250, 10, 20]


# --- classes and segments of pixels ---

STUFF = SimpleNamespace(
    thing_classes=["cat"],
    thing_colors=[(250, 10, 20)],
    stuff_classes=["things", "sky"],
    stuff_colors=[(0, 0, 0), (10, 240, 30)],
)


def _half(left: int, right: int) -> np.ndarray:
    labels = np.full((120, 160), left)
    labels[:, 80:] = right
    return labels


def _tinted(image: np.ndarray, row: int, column: int, color: tuple[int, int, int]) -> bool:
    return bool(np.abs(image[row, column] - (0.45 * 90 + 0.55 * np.array(color))).max() < 2)


def test_classes_of_pixels_are_tinted_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = _written(monkeypatch)
    image = Visualizer(_grey(), STUFF).draw_sem_seg(torch.tensor(_half(0, 1))).get_image()
    assert sorted(texts) == ["sky", "things"]
    assert _tinted(image, 10, 10, (0, 0, 0))
    assert _tinted(image, 10, 150, (10, 240, 30))


@pytest.mark.parametrize("label", [255, 2, -1])
@pytest.mark.parametrize("metadata", [STUFF, None], ids=["names", "no names"])
def test_pixels_without_a_known_class_stay_as_they_are(label: int, metadata) -> None:
    image = Visualizer(_grey(), metadata).draw_sem_seg(_half(label, 1)).get_image()
    stays = metadata is not None or label != 2  # without names, 2 may well be one
    assert (image[10, 10].tolist() == [90, 90, 90]) == stays


@pytest.mark.parametrize(("threshold", "names"), [(None, ["things"]), (1, ["sky", "things"])])
def test_specks_get_no_name(threshold, names, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = _written(monkeypatch)
    labels = np.zeros((120, 160), int)
    labels[5:8, 5:8] = 1
    Visualizer(_grey(), STUFF).draw_sem_seg(labels, area_threshold=threshold)
    assert sorted(texts) == names


SEGMENTS = [
    {"id": 1, "isthing": True, "category_id": 0, "score": 0.9},
    {"id": 300, "isthing": False, "category_id": 1},
]


def test_segments_have_the_names_and_colours_of_things_or_stuff(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = _written(monkeypatch)
    visualizer = Visualizer(_grey(), STUFF, instance_mode=ColorMode.SEGMENTATION)
    image = visualizer.draw_panoptic_seg(torch.tensor(_half(1, 300)), SEGMENTS).get_image()
    assert sorted(texts) == ["cat 90%", "sky"]
    assert _tinted(image, 10, 10, (250, 10, 20))
    assert _tinted(image, 10, 150, (10, 240, 30))


def test_segments_follow_the_scale() -> None:
    visualizer = Visualizer(_grey(), STUFF, 2.0, ColorMode.SEGMENTATION)
    image = visualizer.draw_panoptic_seg(_half(1, 300), SEGMENTS).get_image()
    assert image.shape == (240, 320, 3)
    assert _tinted(image, 20, 150, (250, 10, 20))
    assert _tinted(image, 20, 170, (10, 240, 30))


def test_no_segments_leave_the_picture_as_it_is() -> None:
    image = Visualizer(_grey(), STUFF).draw_panoptic_seg(_half(0, 5), []).get_image()
    assert np.array_equal(image, _grey())


@pytest.mark.parametrize("draw", ["draw_sem_seg", "draw_panoptic_seg"])
def test_map_of_another_size_is_refused(draw: str) -> None:
    arguments = (
        (np.zeros((5, 6), int),) if draw == "draw_sem_seg" else (np.zeros((5, 6), int), SEGMENTS)
    )
    with pytest.raises(ValueError, match=r"size of its picture, \(120, 160\): got \(5, 6\)"):
        getattr(Visualizer(_grey()), draw)(*arguments)


def test_record_with_a_label_map_shows_stuff_below_its_objects(tmp_path) -> None:
    Image.fromarray(_half(0, 1).astype(np.uint8)).save(tmp_path / "labels.png")
    record = _record() | {"sem_seg_file_name": str(tmp_path / "labels.png")}
    image = Visualizer(_grey(), STUFF).draw_dataset_dict(record).get_image()
    assert image[5, 5].tolist() == [90, 90, 90]  # "things": the objects say which
    assert _tinted(image, 5, 155, (10, 240, 30))
    assert image[70, 20].tolist() != [90, 90, 90]


def test_record_with_a_panoptic_png_shows_its_segments(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = _written(monkeypatch)
    Image.fromarray(id2rgb(_half(1, 300))).save(tmp_path / "panoptic.png")
    segments = [SEGMENTS[0], {**SEGMENTS[1], "iscrowd": 1}]
    record = _record() | {
        "pan_seg_file_name": str(tmp_path / "panoptic.png"),
        "segments_info": segments,
    }
    Visualizer(_grey(), STUFF).draw_dataset_dict(record)
    assert sorted(texts) == ["cat 90%", "sky (crowd)"]


@pytest.mark.parametrize("key", ["sem_seg_file_name", "pan_seg_file_name"])
def test_maps_with_too_many_pixels_are_refused(tmp_path, key: str) -> None:
    ids = _half(0, 1)
    Image.fromarray(ids.astype(np.uint8) if key == "sem_seg_file_name" else id2rgb(ids)).save(
        tmp_path / "map.png"
    )
    record = _record() | {key: str(tmp_path / "map.png"), "segments_info": SEGMENTS}
    with pytest.raises(BadImageError, match=r"map\.png .*INPUT.MAX_IMAGE_PIXELS"):
        Visualizer(_grey()).draw_dataset_dict(record, max_image_pixels=ids.size - 1)


# --- a model's output ---


def test_output_of_instances_leaves_out_low_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = _written(monkeypatch)
    Visualizer(_grey(), METADATA).draw_output({"instances": _predictions()}, score_threshold=0.6)
    assert texts == ["cat 98%"]


def test_output_with_a_panoptic_result_shows_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = _written(monkeypatch)
    output = {"instances": _predictions(), "sem_seg": torch.zeros(2, 120, 160)}
    Visualizer(_grey(), STUFF).draw_output(
        {**output, "panoptic_seg": (torch.tensor(_half(1, 300)), SEGMENTS)}
    )
    assert sorted(texts) == ["cat 90%", "sky"]


def test_output_of_classes_and_instances_shows_both(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = _written(monkeypatch)
    scores = torch.zeros(2, 120, 160)
    scores[1] = 1
    Visualizer(_grey(), STUFF).draw_output({"instances": _predictions(1), "sem_seg": scores})
    assert sorted(texts) == ["cat 98%", "sky"]


def test_small_instances_are_drawn_over_large_ones() -> None:
    small, large = [20, 20, 60, 60], [10, 20, 150, 110]  # their upper borders share pixels
    colors = [(250, 0, 0), (0, 0, 250)]
    for boxes, assigned in (([small, large], colors), ([large, small], colors[::-1])):
        image = Visualizer(_grey()).overlay_instances(boxes=boxes, assigned_colors=assigned)
        assert image.get_image()[20, 40].tolist() == [250, 0, 0]


def test_output_keeps_an_instance_at_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = _written(monkeypatch)
    predictions = _predictions(1)
    score = predictions.scores[0].item()
    Visualizer(_grey()).draw_output({"instances": predictions}, score_threshold=score)
    assert len(texts) == 1


def test_labels_can_be_hidden() -> None:
    image = np.full((120, 160, 3), 90, np.uint8)
    boxes = [[20, 30, 90, 100]]
    hidden = Visualizer(image, show_labels=False).overlay_instances(boxes=boxes, labels=["cat"])
    bare = Visualizer(image).overlay_instances(boxes=boxes)
    assert np.array_equal(hidden.get_image(), bare.get_image())
    labels = np.ones((120, 160), np.int64)
    hidden = Visualizer(image, show_labels=False).draw_sem_seg(labels)
    bare = Visualizer(image).draw_sem_seg(labels, area_threshold=10**6)
    assert np.array_equal(hidden.get_image(), bare.get_image())


def test_colours_are_shares_levels_or_names():
    mask = np.zeros((1, 120, 160), bool)
    mask[:, 20:60, 20:60] = True
    for color in ((1.0, 0.0, 0.0), (255, 0, 0), "red"):
        picture = Visualizer(_grey()).overlay_instances(
            masks=mask, assigned_colors=[color], alpha=1.0
        )
        assert picture.get_image()[40, 40].tolist() == [255, 0, 0]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_instances_without_boxes_have_their_names_at_their_masks(scale, monkeypatch):
    placed = []
    monkeypatch.setattr(
        "detkit.visualization.visualizer.draw_labels", lambda canvas, labels: placed.extend(labels)
    )
    masks = np.zeros((2, 120, 160), bool)
    masks[0, 20:60, 30:70] = True  # the second one is empty
    Visualizer(_grey(), scale=scale).overlay_instances(
        masks=[*masks, None], labels=["cat", "dog", "cow"], assigned_colors=["r", "g", "b"]
    )
    ((text, box, color),) = placed
    assert (text, color) == ("cat", (255, 0, 0))
    assert box == [side * scale for side in (30, 20, 70, 60)]


def test_picture_of_fractions_is_cut_to_levels():
    picture = np.full((40, 50, 3), 300.5)
    picture[0] = -3.0
    drawn = Visualizer(picture, scale=2.0).output.get_image()
    assert drawn.shape == (80, 100, 3)
    assert drawn[-1, -1].tolist() == [255, 255, 255]
    assert drawn[0, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("part", "arguments"),
    [
        ("draw_box", ([20, 20, 60, 60], 1.0, "r")),
        ("draw_rotated_box_with_label", ([40, 40, 30, 10, 30], 1.0, "r", "-", "a")),
        ("draw_circle", ([40, 40], "r")),
        ("draw_line", ([20, 60], [40, 40], "r")),
        ("draw_polygon", ([[20, 20], [60, 20], [40, 60]], "r")),
        ("draw_text", ("a", (40, 40))),
        ("draw_and_connect_keypoints", (torch.tensor([[40.0, 40, 1]]),)),
        ("draw_binary_mask", (np.eye(120, 160, dtype=np.uint8) * 7, "r")),
        ("draw_soft_mask", (np.linspace(0, 1, 120 * 160).reshape(120, 160), "r")),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_each_part_draws_by_itself(part, arguments, scale):
    visualizer = Visualizer(np.zeros((120, 160, 3), np.uint8), scale=scale)
    drawn = getattr(visualizer, part)(*arguments).get_image()
    assert drawn.any()
    assert drawn.shape == (120 * scale, 160 * scale, 3)


def test_soft_mask_tints_by_share():
    shares = np.zeros((40, 40))
    shares[:, 20:] = [[0.5] * 20]
    drawn = Visualizer(np.zeros((40, 40, 3), np.uint8)).draw_soft_mask(shares, "w", alpha=1.0)
    assert drawn.get_image()[5, [5, 30], 0].tolist() == [0, 128]


def test_overridden_parts_are_the_ones_that_are_called():
    called = []

    class Own(Visualizer):
        def draw_box(self, box_coord, alpha=0.5, edge_color="g", line_style="-"):
            called.append("box")

        def draw_text(self, text, position, **kwargs):
            called.append(text)

        def draw_polygon(self, segment, color, edge_color=None, alpha=0.5):
            called.append("polygon")

        def draw_binary_mask(self, binary_mask, color=None, **kwargs):
            called.append("mask")

        def draw_and_connect_keypoints(self, keypoints):
            called.append("keypoints")

    Own(_grey()).overlay_instances(
        boxes=[[20, 30, 90, 100], [0, 0, 5, 5]],
        labels=["first", "second"],
        masks=[[[20, 30, 90, 30, 90, 100]], np.ones((120, 160), bool)],
        keypoints=[[30, 40, 2], None],
    )
    assert called == [
        *("polygon", "mask", "box", "box", "keypoints", "keypoints", "first", "second"),
    ]


@pytest.mark.parametrize(
    ("method", "mode", "count"),
    [
        pytest.param("draw_polygon", ColorMode.IMAGE, 2, id="polygons of bitmaps"),
        pytest.param("draw_circle", ColorMode.IMAGE, 4, id="dots of keypoints"),
        pytest.param("draw_line", ColorMode.IMAGE, 1, id="lines of keypoints"),
        pytest.param("_jitter", ColorMode.SEGMENTATION, 2, id="colours of classes"),
        pytest.param("_create_grayscale_image", ColorMode.IMAGE_BW, 1, id="grey picture"),
        pytest.param("_convert_boxes", ColorMode.IMAGE, 1, id="boxes"),
        pytest.param("_convert_masks", ColorMode.IMAGE, 1, id="masks"),
        pytest.param("_convert_keypoints", ColorMode.IMAGE, 1, id="keypoints"),
    ],
)
def test_overridden_parts_of_detectron2s_are_called_for_predictions(method, mode, count):
    called, drawn = [], getattr(Visualizer, method)

    def record(self, *args, **kwargs):
        called.append((args, kwargs))
        return drawn(self, *args, **kwargs)

    masks = torch.zeros(2, 120, 160, dtype=torch.bool)
    masks[0, 20:60, 20:60] = masks[1, 70:90, 70:90] = True
    found = Instances((120, 160), pred_classes=torch.tensor([0, 1]), pred_masks=masks)
    found.pred_boxes = Boxes([[20, 20, 60, 60], [70, 70, 90, 90]])
    found.pred_keypoints = torch.tensor([[[30.0, 30, 1], [40, 50, 1]], [[75, 75, 0], [80, 80, 0]]])
    metadata = SimpleNamespace(
        thing_classes=["cat", "dog"],
        keypoint_names=["head", "tail"],
        keypoint_connection_rules=[("head", "tail", (255, 0, 0))],
    )
    usual, own = [
        kind(_grey(), metadata, 2.0, mode).draw_instance_predictions(found).get_image()
        for kind in (Visualizer, type("Own", (Visualizer,), {method: record}))
    ]
    assert len(called) == count
    if method not in ("draw_polygon", "_jitter"):
        assert np.abs(usual.astype(int) - own).mean() < 1
    # In pixels of the input.
    if method == "draw_circle":
        assert called[1][0][0] == pytest.approx([30, 30])
    if method == "draw_line":
        assert called[0][0] == (pytest.approx([30, 40]), pytest.approx([30, 50]))


def test_size_of_letters_can_be_set():
    heights = []
    for scale in (1.0, 3.0):
        visualizer = Visualizer(np.zeros((400, 400, 3), np.uint8), font_size_scale=scale)
        drawn = visualizer.draw_text("Mm", (200, 100), color="w").get_image()
        heights.append(np.ptp(np.flatnonzero(drawn.max(axis=(1, 2)) > 200)))
    assert heights[1] > 2 * heights[0]
    visualizer._default_font_size = 10
    assert visualizer._default_font_size == pytest.approx(10)


def test_segments_without_a_list_are_those_of_the_divisor():
    metadata = SimpleNamespace(
        label_divisor=1000, thing_dataset_id_to_contiguous_id={5: 0}, thing_classes=["cat"]
    )
    segments = np.zeros((120, 160), np.int64)
    segments[:60] = 1
    segments[100:] = -1
    picture = Visualizer(_grey(), metadata).draw_panoptic_seg(segments, None, alpha=1.0)
    colors = [tuple(picture.get_image()[y, 2].tolist()) for y in (2, 90, 110)]
    assert len(set(colors)) == 3
    assert colors[2] == (90, 90, 90)


@pytest.mark.parametrize("method", ["draw_binary_mask", "_draw_text_in_mask", "draw_text"])
def test_overridden_parts_are_called_for_segments(method, monkeypatch):
    called, drawn = [], getattr(Visualizer, method)

    class Own(Visualizer):
        pass

    def record(self, *args, **kwargs):
        called.append(kwargs.get("text") or next(a for a in args if isinstance(a, str)))
        return drawn(self, *args, **kwargs)

    monkeypatch.setattr(Own, method, record, raising=False)
    segments = np.zeros((120, 160), np.int64)
    segments[:70] = 7  # the larger one is drawn first
    names = [{"id": 0, "category_id": 0}, {"id": 7, "category_id": 1}]
    picture = Own(_grey(), METADATA).draw_panoptic_seg(segments, names).get_image()
    assert called == ["dog", "cat"]
    assert (picture != 90).any(axis=2).all()
    called.clear()
    Own(_grey(), METADATA, show_labels=False).draw_panoptic_seg(segments, names)
    assert (called == []) == (method != "draw_binary_mask")


def test_overridden_rotated_box_gets_its_label_and_nobody_else_writes_it(monkeypatch):
    texts, labels = _written(monkeypatch), []

    class Own(Visualizer):
        def draw_rotated_box_with_label(
            self, rotated_box, alpha=0.5, edge_color="g", line_style="-", label=None
        ):
            labels.append(label)

    boxes = RotatedBoxes([[80, 60, 80, 20, 45], [30, 30, 10, 10, 0]])
    Own(_grey()).overlay_instances(boxes=boxes, labels=["long", "square"])
    assert (labels, texts) == (["long", "square"], [])
    Own(_grey(), show_labels=False).overlay_instances(boxes=boxes, labels=["long", "square"])
    assert labels[2:] == [None, None]


def test_overridden_parts_of_rotated_boxes_are_called():
    class Own(Visualizer):
        def overlay_rotated_instances(self, boxes=None, labels=None, assigned_colors=None):
            calls.append((np.asarray(boxes).tolist(), labels, len(assigned_colors)))
            return super().overlay_rotated_instances(boxes, labels, assigned_colors)

        def draw_line(self, x_data, y_data, color, linestyle="-", linewidth=None):
            calls.append((len(x_data), max(x_data), max(y_data)))
            return super().draw_line(x_data, y_data, color, linestyle, linewidth)

    calls, box = [], [80.0, 60.0, 40.0, 20.0, 90.0]
    found = Own(_grey(), scale=2).overlay_instances(boxes=RotatedBoxes([box]), labels=["long"])
    assert calls[0] == ([box], ["long"], 1)
    assert calls[1] == (5, pytest.approx(90), pytest.approx(80))
    assert len(calls) == 2
    plain = Visualizer(_grey(), scale=2).overlay_instances(
        boxes=RotatedBoxes([box]), labels=["long"]
    )
    assert np.array_equal(found.get_image(), plain.get_image())


def test_overridden_brightness_is_that_of_labels():
    class Own(Visualizer):
        def _change_color_brightness(self, color, brightness_factor):
            given.append((color, brightness_factor))
            return (1.0, 0.0, 0.0)

        def draw_text(self, text, position, *, font_size=None, color="g", **kwargs):
            given.append((text, position, color))

    given = []
    Own(_grey()).overlay_instances(boxes=[[5, 8, 90, 90]], labels=["a"], assigned_colors=["b"])
    assert given == [((0.0, 0.0, 1.0), 0.7), ("a", [5, 8], (1.0, 0.0, 0.0))]


def test_rotated_boxes_are_drawn_along_their_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = _written(monkeypatch)
    predictions = _predictions()
    predictions.pred_boxes = RotatedBoxes([[80, 60, 80, 20, 45], [30, 30, 10, 10, 0]])
    picture = Visualizer(_grey(), METADATA).draw_instance_predictions(predictions).get_image()
    changed = (picture != 90).any(axis=2)
    # The middle of the upper long side lies up and left of the center; the corner of the box around it stays grey.
    assert changed[50:56, 70:76].any()
    assert not changed[22:28, 42:48].any()
    assert sorted(texts) == ["cat 98%", "dog 50%"]


def test_no_rotated_boxes_are_nothing_to_draw() -> None:
    picture = Visualizer(_grey()).overlay_rotated_instances(RotatedBoxes([]), [])
    assert (picture.get_image() == 90).all()


def test_record_with_a_rotated_box_is_drawn_rotated(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(
        Visualizer, "overlay_instances", lambda self, *, boxes, **_: drawn.append(boxes.tolist())
    )
    rotated = {"bbox": [80, 60, 80, 20, 45], "bbox_mode": BoxMode.XYWHA_ABS, "category_id": 0}
    upright = {"bbox": [10, 20, 30, 40], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1}
    record = {"file_name": "a.jpg", "image_id": 1, "annotations": [rotated, upright]}
    Visualizer(_grey(), METADATA).draw_dataset_dict(record)
    assert drawn == [[[80, 60, 80, 20, 45], [20, 30, 20, 20, 0]]]


def test_rotated_boxes_in_a_list_are_drawn():
    drawn = Visualizer(_grey(), scale=2).overlay_rotated_instances(
        boxes=[[80.0, 60, 40, 20, 45]], labels=["a"]
    )
    assert drawn.get_image().shape == (240, 320, 3)
    assert (drawn.get_image() != 90).any()


def test_unknown_alignment_of_text_is_an_error():
    with pytest.raises(ValueError, match="must be left, center or right, got 'middle'"):
        Visualizer(_grey()).draw_text("a", (40, 40), horizontal_alignment="middle")


@pytest.mark.slow
def test_fifty_masks_on_a_large_picture_take_a_tenth_of_a_second() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (1080, 1920, 3), dtype=np.uint8)
    masks = np.zeros((50, 1080, 1920), bool)
    boxes = []
    for mask, (x, y) in zip(masks, rng.integers((0, 0), (1700, 800), (50, 2)), strict=True):
        mask[y : y + 280, x : x + 180] = True
        boxes.append([x, y, x + 180, y + 280])
    seconds = []
    for _ in range(3):
        start = time.process_time()
        Visualizer(picture).overlay_instances(boxes=boxes, masks=masks, labels=["cat 98%"] * 50)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.15  # 0.08 to 0.11 on two busy cores


class OwnVisualizer(Visualizer):
    """Draws instances by the parts that Detectron2's own method calls."""

    def draw_instance_predictions(self, predictions):
        masks = self._convert_masks(predictions.pred_masks)
        grey = self._create_grayscale_image(predictions.pred_masks.any(dim=0).numpy())
        self.output.reset_image(grey)
        boxes = self._convert_boxes(predictions.pred_boxes)
        colors = [self._jitter("blue") for _ in masks]
        self.overlay_instances(masks=masks, boxes=boxes, assigned_colors=colors, alpha=0.0)
        darker = self._change_color_brightness("red", -0.7)
        self._draw_text_in_mask(masks[0].mask, "a", darker)
        self._draw_text_in_mask(0 * masks[0].mask, "of nothing", darker)
        return self.draw_text("b", (1, 1), font_size=self._default_font_size, color=darker)


def test_parts_of_detectron2s_visualizer_are_there_for_subclasses():
    picture = np.zeros((60, 80, 3), np.uint8)
    picture[..., 0] = 90
    mask = torch.zeros(1, 60, 80, dtype=torch.bool)
    mask[0, 20:40, 20:60] = True
    instances = Instances((60, 80), pred_boxes=Boxes([[20, 20, 60, 40]]), pred_masks=mask)
    visualizer = OwnVisualizer(picture)
    visualizer.draw_box((0, 0, 10, 10))
    drawn = visualizer.draw_instance_predictions(instances).get_image()
    assert drawn[55, 5].tolist() == [30, 30, 30]  # grey, also where a box had been drawn
    assert drawn[25, 25].tolist() == [90, 0, 0]
    assert visualizer._change_color_brightness("red", 0.0) == (1.0, 0.0, 0.0)
    assert visualizer._change_color_brightness("red", -0.5) == pytest.approx((0.5, 0.0, 0.0))
    assert visualizer._change_color_brightness("red", 1.0) == pytest.approx((1.0, 1.0, 1.0))
    assert visualizer._convert_keypoints(torch.ones(1, 2, 3)).shape == (1, 2, 3)


def test_names_of_a_picture_that_begins_again_are_written_as_on_a_new_one():
    pictures = []
    for is_reset in (False, True):
        visualizer = Visualizer(np.full((60, 90, 3), 40, np.uint8))
        if is_reset:
            visualizer.overlay_instances(boxes=np.array([[5.0, 5, 60, 50]]), labels=["old"])
            visualizer.output.reset_image(np.full((60, 90, 3), 40, np.uint8))
        drawn = visualizer.overlay_instances(
            boxes=np.array([[5.0, 5, 60, 50]]), labels=["new"], assigned_colors=["red"]
        )
        pictures.append(drawn.get_image())
    assert np.array_equal(*pictures)
