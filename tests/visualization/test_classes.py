"""Names and colours of classes; what lies in pictures is in `test_visualizer`."""

import torch

from detkit.visualization.classes import text_labels


def test_texts_of_instances():
    assert text_labels([0, 2], torch.tensor([0.984, 0.5]), ["cat"], [False, True]) == [
        "cat 98%",
        "2 50%|crowd",
    ]
    assert text_labels(None, torch.tensor([0.5]), None) == ["50%"]
    assert text_labels(None, None, ["cat"]) is None
