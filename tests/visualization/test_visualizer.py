from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from detkit.structures import Boxes, BoxMode, Instances
from detkit.visualization import ColorMode, VisImage, Visualizer, readable_scale, side_by_side

METADATA = SimpleNamespace(thing_classes=["cat", "dog"], thing_colors=[(250, 10, 20), (10, 240, 30)])


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
        "detkit.visualization.canvas.Canvas.draw_text", lambda self, text, position, **kwargs: texts.append(text)
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
    picture = Visualizer(_grey(), METADATA, instance_mode=ColorMode.SEGMENTATION).draw_instance_predictions(
        _predictions()
    )
    image = picture.get_image()
    assert image[70, 20].tolist() == [250, 10, 20]
    assert image[70, 149].tolist() == [10, 240, 30]


def test_instances_of_one_class_have_their_own_colours_by_default() -> None:
    predictions = _predictions()
    predictions.pred_classes = torch.tensor([1, 1])
    image = Visualizer(_grey(), METADATA).draw_instance_predictions(predictions).get_image()
    assert image[70, 20].tolist() != image[70, 149].tolist()


@pytest.mark.parametrize(
    "predictions", [pytest.param(_predictions(0), id="none"), pytest.param(Instances((120, 160)), id="no fields")]
)
def test_nothing_found_leaves_the_picture_as_it_is(predictions: Instances) -> None:
    picture = Visualizer(_grey(), METADATA).draw_instance_predictions(predictions)
    assert np.array_equal(picture.get_image(), _grey())


def test_boxes_follow_the_scale() -> None:
    image = Visualizer(_grey(), METADATA, scale=2).overlay_instances(boxes=[[20, 30, 80, 100]]).get_image()
    assert image.shape == (240, 320, 3)
    changed = (image != 90).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == (40, 60, 160, 200)


def test_polygons_follow_the_scale() -> None:
    picture = Visualizer(_grey(), scale=2).overlay_instances(masks=[SQUARE], assigned_colors=[(255, 0, 0)])
    rows, columns = np.nonzero((picture.get_image() != 90).any(axis=2))
    extent = np.array([columns.min(), rows.min(), columns.max(), rows.max()])
    assert np.abs(extent - [40, 60, 160, 200]).max() <= 2  # its border is drawn around it


def test_record_is_drawn_with_names_and_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = _written(monkeypatch)
    record = {
        "file_name": "x.jpg",
        "image_id": 1,
        "annotations": [
            {"bbox": [20, 30, 60, 70], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0},
            {"bbox": [90, 40, 150, 110], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1, "iscrowd": 1},
        ],
    }
    image = Visualizer(_grey(), METADATA).draw_dataset_dict(record).get_image()
    assert sorted(texts) == ["cat", "dog (crowd)"]
    assert image[70, 20].tolist() != [90, 90, 90]
    assert image[70, 79].tolist() != [90, 90, 90]


@pytest.mark.parametrize(
    "annotations", [pytest.param({}, id="not annotated"), pytest.param({"annotations": []}, id="empty")]
)
def test_record_without_objects_leaves_the_picture_as_it_is(annotations: dict) -> None:
    picture = Visualizer(_grey(), METADATA).draw_dataset_dict({"file_name": "x.jpg", "image_id": 1, **annotations})
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
        [{"size": [120, 160], "counts": [2430, *[70, 50] * 59, 70, 9620 - 20]}], id="plain run-length encoding"
    ),
    pytest.param([_square_mask()], id="array"),
    pytest.param(torch.as_tensor(_square_mask())[None], id="tensor"),
    pytest.param(SimpleNamespace(polygons=[[np.array(SQUARE[0])]]), id="PolygonMasks"),
    pytest.param(SimpleNamespace(tensor=torch.as_tensor(_square_mask())[None]), id="BitMasks"),
]


@pytest.mark.parametrize("masks", MASKS)
def test_every_form_of_a_mask_tints_the_same_pixels(masks) -> None:
    image = Visualizer(_grey()).overlay_instances(masks=masks, assigned_colors=[(255, 0, 0)]).get_image()
    tinted = (image != 90).any(axis=2)
    assert (tinted != _square_mask()).mean() < 0.02


@pytest.mark.parametrize("masks", MASKS)
def test_grey_mode_keeps_colour_within_masks_only(masks) -> None:
    red = np.full((120, 160, 3), (200, 0, 0), np.uint8)
    picture = Visualizer(red, instance_mode=ColorMode.IMAGE_BW).overlay_instances(masks=masks, alpha=0)
    image = picture.get_image()
    assert image[65, 50].tolist() == [200, 0, 0]
    assert len(set(image[5, 5].tolist())) == 1


def test_labels_of_neighbours_do_not_hide_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    places = []
    monkeypatch.setattr(
        "detkit.visualization.canvas.Canvas.draw_text", lambda self, text, position, **kwargs: places.append(position)
    )
    visualizer = Visualizer(_grey(240, 320))
    visualizer.overlay_instances(boxes=[[50, 60, 150, 160], [52, 60, 152, 160], [50, 62, 150, 158]], labels=["cat"] * 3)
    width, height = 30, 15  # less than a label takes
    for i, (x, y) in enumerate(places):
        assert all(abs(x - x2) >= width or abs(y - y2) >= height for x2, y2 in places[:i])


def test_different_numbers_of_boxes_and_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 boxes, 2 labels"):
        Visualizer(_grey()).overlay_instances(boxes=[[0, 0, 5, 5]], labels=["cat", "dog"])


@pytest.mark.parametrize(
    ("size", "scale"), [pytest.param((120, 160), 4, id="small"), pytest.param((1080, 1920), 1, id="large")]
)
def test_readable_scale_enlarges_small_pictures_only(size: tuple[int, int], scale: float) -> None:
    assert readable_scale(size) == scale


def test_side_by_side_holds_both_pictures_and_their_titles() -> None:
    truth, prediction = VisImage(_grey()), VisImage(np.full((120, 160, 3), 200, np.uint8))
    image = side_by_side(truth, prediction).get_image()
    assert np.array_equal(image[-120:, :160], truth.get_image())
    assert np.array_equal(image[-120:, -160:], prediction.get_image())
    title = image[:-120]
    assert (title[:, :160] < 128).any()
    assert (title[:, -160:] < 128).any()


def test_side_by_side_needs_one_height() -> None:
    with pytest.raises(ValueError, match="one height, got 120 and 60"):
        side_by_side(VisImage(_grey()), VisImage(_grey(60)))
