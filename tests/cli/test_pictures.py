import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from detkit.cli.pictures import write_pictures
from detkit.config import get_cfg
from detkit.data import DatasetCatalog
from detkit.data.datasets.shapes import generate_shapes
from detkit.structures import Boxes, Instances


class OneBox(nn.Module):
    """Finds one object of class 0 in every image, and remembers in which mode it ran."""

    def __init__(self, score: float) -> None:
        super().__init__()
        self.score = score
        self.modes: list[bool] = []

    def forward(self, batch):
        self.modes.append(self.training)
        size = (batch[0]["height"], batch[0]["width"])
        boxes = Boxes(torch.tensor([[5.0, 5, 90, 90]]))
        found = Instances(
            size,
            pred_boxes=boxes,
            scores=torch.tensor([self.score]),
            pred_classes=torch.tensor([0]),
        )
        return [{"instances": found}]


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    generate_shapes(tmp_path / "data" / "shapes", num_train=1, num_val=5)
    monkeypatch.setenv("DETKIT_DATASETS", str(tmp_path / "data"))
    cfg = get_cfg()
    cfg.merge_from_list(["DATASETS.TEST", "('shapes_val',)", "INPUT.MIN_SIZE_TEST", 64])
    return cfg


def test_pictures_are_spread_over_the_data_set_up_to_the_limit(cfg, tmp_path: Path) -> None:
    written = write_pictures(cfg, OneBox(0.9), tmp_path / "pictures", limit=2)
    assert [path.name for path in written] == [
        "shapes_val_val_000000.jpg",
        "shapes_val_val_000002.jpg",
    ]
    assert all(path.is_file() for path in written)


def test_small_data_set_gives_a_picture_of_every_image(cfg, tmp_path: Path) -> None:
    assert len(write_pictures(cfg, OneBox(0.9), tmp_path / "pictures", limit=12)) == 5


def test_model_runs_in_eval_mode_and_comes_back_in_its_own(cfg, tmp_path: Path) -> None:
    model = OneBox(0.9).train()
    write_pictures(cfg, model, tmp_path / "pictures", limit=1)
    assert model.modes == [False]
    assert model.training


def test_unsure_predictions_are_not_drawn(cfg, tmp_path: Path) -> None:
    (sure,) = write_pictures(cfg, OneBox(0.9), tmp_path / "sure", limit=1)
    (unsure,) = write_pictures(cfg, OneBox(0.1), tmp_path / "unsure", limit=1)
    (all_shown,) = write_pictures(cfg, OneBox(0.1), tmp_path / "all", limit=1, min_score=0)
    assert unsure.read_bytes() != sure.read_bytes()
    assert unsure.read_bytes() != all_shown.read_bytes()


def test_nothing_to_test_on_gives_no_pictures(cfg, tmp_path: Path) -> None:
    cfg.merge_from_list(["DATASETS.TEST", "()"])
    assert write_pictures(cfg, OneBox(0.9), tmp_path / "pictures") == []


def test_pictures_of_a_model_on_given_proposals(cfg, tmp_path: Path) -> None:
    records = DatasetCatalog.get("shapes_val")
    count = len(records)
    proposals = {
        "ids": [record["image_id"] for record in records],
        "boxes": [np.array([[1.0, 2, 30, 40]], dtype=np.float32)] * count,
        "objectness_logits": [np.zeros(1, dtype=np.float32)] * count,
        "bbox_mode": 0,
    }
    (tmp_path / "proposals.pkl").write_bytes(pickle.dumps(proposals))
    cfg.merge_from_list(
        [
            "MODEL.LOAD_PROPOSALS",
            True,
            "DATASETS.PROPOSAL_FILES_TEST",
            [str(tmp_path / "proposals.pkl")],
        ]
    )
    assert len(write_pictures(cfg, OneBox(0.9), tmp_path / "pictures", limit=2)) == 2
    cfg.DATASETS.PROPOSAL_FILES_TEST = ()
    with pytest.raises(ValueError, match="there is none for 'shapes_val'"):
        write_pictures(cfg, OneBox(0.9), tmp_path / "pictures")
