import numpy as np
import pytest
import torch

from detkit.structures import Boxes, Instances, RotatedBoxes
from detkit.visualization import ColorMode, VideoVisualizer


def detections(boxes, classes, masks=None):
    kind = RotatedBoxes if len(boxes[0]) == 5 else Boxes
    found = Instances((60, 80), pred_boxes=kind(torch.tensor(boxes)))
    found.pred_classes = torch.tensor(classes)
    found.scores = torch.full((len(boxes),), 0.9)
    if masks is not None:
        found.pred_masks = masks
    return found


def colors(visualizer):
    return [old.color for old in visualizer._old_instances]


@pytest.mark.parametrize("mode", list(ColorMode))
def test_object_keeps_its_colour_while_it_moves(mode):
    visualizer = VideoVisualizer(None, mode)
    frame = np.zeros((60, 80, 3), np.uint8)
    first = visualizer.draw_instance_predictions(
        frame, detections([[5.0, 5, 25, 25], [40, 5, 60, 25]], [0, 0])
    )
    before = colors(visualizer)
    assert before[0] != before[1]
    assert first.get_image().any()
    visualizer.draw_instance_predictions(
        frame, detections([[41.0, 6, 61, 26], [6, 6, 26, 26]], [0, 0])
    )
    assert colors(visualizer)[:2] == before[::-1]


def test_rotated_object_keeps_its_colour_while_it_turns():
    visualizer = VideoVisualizer(None)
    frame = np.zeros((60, 80, 3), np.uint8)
    visualizer.draw_instance_predictions(frame, detections([[20.0, 20, 20, 10, 30]], [0]))
    before = colors(visualizer)
    drawn = visualizer.draw_instance_predictions(frame, detections([[21.0, 20, 20, 10, 40]], [0]))
    assert colors(visualizer) == before
    assert drawn.get_image().any()


def test_object_of_another_class_or_place_gets_another_colour():
    visualizer = VideoVisualizer(None)
    frame = np.zeros((60, 80, 3), np.uint8)
    visualizer.draw_instance_predictions(frame, detections([[5.0, 5, 25, 25]], [0]))
    (before,) = colors(visualizer)
    visualizer.draw_instance_predictions(
        frame, detections([[5.0, 5, 25, 25], [50, 30, 70, 50]], [1, 0])
    )
    assert before not in colors(visualizer)[:2]
    # It is remembered for some frames, and then forgotten.
    visualizer.draw_instance_predictions(frame, detections([[5.0, 5, 25, 25]], [0]))
    assert colors(visualizer)[0] == before


def test_masks_are_matched_by_their_overlap_and_colours_of_a_tracker_are_taken():
    visualizer = VideoVisualizer(None)
    frame = np.zeros((60, 80, 3), np.uint8)
    masks = torch.zeros(1, 60, 80, dtype=torch.bool)
    masks[0, 10:30, 10:30] = True
    for shift in (0, 1, 2):
        moved = detections([[10.0, 10, 30, 30]], [0], masks.roll(shift, 2))
        visualizer.draw_instance_predictions(frame, moved)
        assert len(set(colors(visualizer)[:1])) == 1
    assert len(visualizer._old_instances) == 1
    tracked = detections([[10.0, 10, 30, 30]], [0], masks)
    tracked.set("COLOR", [(1.0, 0.0, 0.0)])
    drawn = visualizer.draw_instance_predictions(frame, tracked).get_image()
    assert drawn[20, 20, 0] > 100
    assert drawn[20, 20, 1] == 0


def test_frames_without_objects_and_maps_are_drawn():
    visualizer = VideoVisualizer(None)
    frame = np.full((60, 80, 3), 9, np.uint8)
    assert (visualizer.draw_instance_predictions(frame, Instances((60, 80))).get_image() == 9).all()
    labels = np.zeros((60, 80), np.int64)
    assert (visualizer.draw_sem_seg(frame, labels).get_image() != 9).any()
    segments = [{"id": 0, "category_id": 1, "isthing": False}]
    assert (
        visualizer.draw_panoptic_seg_predictions(frame, labels, segments).get_image() != 9
    ).any()


def test_names_are_written_beside_masks_unless_they_are_hidden(monkeypatch):
    written = []
    monkeypatch.setattr(
        "detkit.visualization.canvas.Canvas.draw_text",
        lambda self, text, *_, **__: written.append(text),
    )
    masks = torch.zeros(1, 60, 80, dtype=torch.bool)
    masks[0, 10:30, 10:30] = True
    found = detections([[10.0, 10, 30, 30]], [0], masks)
    for shown in (True, False):
        visualizer = VideoVisualizer(None, show_labels=shown)
        visualizer.draw_instance_predictions(np.zeros((60, 80, 3), np.uint8), found)
    assert written == ["0 90%"]


@pytest.mark.parametrize(("shift", "is_same"), [(4, True), (5, False)])  # IoU 16/24 and 15/25
def test_masks_are_one_object_from_an_overlap_of_more_than_60_percent(shift, is_same):
    visualizer = VideoVisualizer(None)
    frame = np.zeros((60, 80, 3), np.uint8)
    masks = torch.zeros(1, 60, 80, dtype=torch.bool)
    masks[0, 10:30, 10:30] = True
    visualizer.draw_instance_predictions(frame, detections([[1.0, 1, 9, 9]], [0], masks))
    (before,) = colors(visualizer)
    moved = detections([[1.0, 1, 9, 9]], [0], masks.roll(shift, 2))
    visualizer.draw_instance_predictions(frame, moved)
    assert (colors(visualizer)[0] == before) == is_same
