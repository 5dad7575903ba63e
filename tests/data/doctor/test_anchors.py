"""Recall of objects by anchors, against the anchors laid out one by one."""

import numpy as np
import torch

from detkit.data.doctor.anchors import AnchorLevel, best_overlaps
from detkit.modeling import DefaultAnchorGenerator
from detkit.structures import Boxes, pairwise_iou


def test_best_overlaps_are_those_with_all_anchors_of_the_image() -> None:
    random = np.random.default_rng(0)
    height, width = 96, 160
    corners = np.sort(random.uniform(0, 1, (200, 2, 2)), axis=1) * (width, height)
    boxes = corners.reshape(-1, 4)
    sizes, strides = [[20.0], [50.0]], [8, 16]
    generator = DefaultAnchorGenerator(
        sizes=sizes, aspect_ratios=[[0.5, 1.0, 2.0]], strides=strides
    )
    maps = [torch.zeros(1, 1, height // s, width // s) for s in strides]
    anchors = Boxes.cat(generator(maps))
    expected = pairwise_iou(Boxes(torch.from_numpy(boxes).float()), anchors).amax(dim=1)
    levels = [
        AnchorLevel(s, 0.5, cells.numpy())
        for s, cells in zip(strides, generator.cell_anchors, strict=True)
    ]
    found = best_overlaps(boxes, np.tile([width, height], (200, 1)), levels)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_suggested_anchors_meet_the_objects_that_the_others_miss(toy) -> None:
    toy.anchors[0] = AnchorLevel(4, 0.5, np.array([[-40.0, -40, 40, 40]]))
    toy.settings["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"] = [[1.0]]
    report = toy.check()
    (finding,) = report.findings
    assert report.anchors["recall"] == 0
    assert report.anchors["suggested"]["recall"] == 1
    (size,), (ratio,) = (
        report.anchors["suggested"]["SIZES"][0],
        report.anchors["suggested"]["ASPECT_RATIOS"][0],
    )
    sides = [a["bbox"][2:] for a in toy.files["train"]["annotations"]]
    assert min(w * h for w, h in sides) < size**2 < max(w * h for w, h in sides)
    assert min(h / w for w, h in sides) < ratio < max(h / w for w, h in sides)
    assert f"SIZES: [[{size}]], ASPECT_RATIOS: [[{ratio}]]" in finding.remedy
    assert (finding.code, finding.count) == ("anchor-recall", 8)
