"""Semantic and panoptic models from a YAML file to scores, pictures and maps, through the commands."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detkit.cli import predict, train
from detkit.data import MetadataCatalog
from detkit.utils.colormap import rgb2id

SMALL = [
    "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32", "MODEL.FPN.OUT_CHANNELS", "32",
    "MODEL.ROI_MASK_HEAD.CONV_DIM", "16", "MODEL.ROI_MASK_HEAD.NUM_CONV", "1",
]  # fmt: skip


@pytest.fixture
def run(workplace: Path, datasets: Path, capsys: pytest.CaptureFixture[str]):
    """Trains a quick-start config for two steps and predicts: printed table, and the entries of predictions.json."""

    def run(name: str) -> tuple[str, list[dict]]:
        tiny = (
            (workplace / "tiny.yaml").read_text().replace("faster_rcnn_R_18_FPN_shapes.yaml", name)
        )
        (workplace / "tiny.yaml").write_text(tiny)
        assert train.main(["--config-file", "tiny.yaml", *SMALL]) == 0
        table = capsys.readouterr().out
        images = str(datasets / "shapes" / "JPEGImages" / "val_*.jpg")
        argv = [
            "--config-file",
            "tiny.yaml",
            "--input",
            images,
            "--output",
            "found",
            "--confidence-threshold",
            "0.01",
        ]
        assert predict.main([*argv, "MODEL.WEIGHTS", "out/model_final.pth", *SMALL]) == 0
        return table, json.loads((workplace / "found" / "predictions.json").read_text())

    return run


def test_semantic_model_trains_scores_and_predicts(run, workplace: Path) -> None:
    table, entries = run("semantic_R_18_FPN_shapes.yaml")
    assert "mIoU" in table
    assert len(list((workplace / "out" / "pictures").iterdir())) == 3
    for entry in entries:
        labels = np.asarray(Image.open(workplace / "found" / entry["sem_seg"]))
        assert labels.shape == (entry["height"], entry["width"])
        assert labels.max() < 9
        assert "instances" not in entry


def test_panoptic_model_trains_scores_and_predicts(run, workplace: Path) -> None:
    table, entries = run("panoptic_fpn_R_18_FPN_shapes.yaml")
    assert "PQ" in table
    assert "COCO average precision of boxes" in table
    assert "COCO average precision of masks" in table
    metadata = MetadataCatalog.get("shapes_val_panoptic_separated")
    names = {*metadata.thing_classes, *metadata.stuff_classes}
    for entry in entries:
        ids = rgb2id(np.asarray(Image.open(workplace / "found" / entry["panoptic"])))
        assert ids.shape == (entry["height"], entry["width"])
        assert {segment["id"] for segment in entry["segments"]} >= set(np.unique(ids).tolist()) - {
            0
        }
        assert {segment["category"] for segment in entry["segments"]} <= names
        assert all(
            instance["segmentation"]["size"] == list(ids.shape) for instance in entry["instances"]
        )
