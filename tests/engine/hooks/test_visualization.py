import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from detkit.engine import TrainerBase, hooks
from detkit.engine.hooks.visualization import draw_truth_and_prediction, drawable
from detkit.structures import Boxes, BoxMode, Instances


class Trainer(TrainerBase):
    def run_step(self):
        pass


class Model(nn.Module):
    """One box in each image; notes the mode it ran in."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.modes = []

    def forward(self, batch):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return [{"instances": instances([0.9])} for _ in batch]


def instances(scores):
    boxes = Boxes(torch.tensor([[2.0, 2.0, 20.0, 20.0]]).repeat(len(scores), 1))
    classes = torch.zeros(len(scores), dtype=torch.int64)
    return Instances((30, 40), pred_boxes=boxes, scores=torch.tensor(scores), pred_classes=classes)


@pytest.fixture
def records(tmp_path):
    made = []
    for i in range(5):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (40, 30), (10 * i, 0, 0)).save(path)
        box = {"bbox": [1, 1, 10, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        made.append({"file_name": str(path), "image_id": i, "height": 30, "width": 40, "annotations": [box]})
    return made


def run(tmp_path, records, iterations=4, period=2, **kwargs):
    model, trainer = Model(), Trainer()
    hook = hooks.VisualizationHook(period, model, lambda: records, dict, str(tmp_path / "out"), **kwargs)
    trainer.register_hooks([hook])
    trainer.train(0, iterations)
    return model, trainer, sorted(path.name for path in (tmp_path / "out").iterdir())


def test_draws_every_period_and_at_the_end(tmp_path, records):
    _, trainer, names = run(tmp_path, records, num_images=2)
    assert names == ["00_0000001.jpg", "00_0000004.jpg", "01_0000001.jpg", "01_0000004.jpg"]
    assert [(name, i) for name, _, i in trainer.storage.images()] == [
        ("predictions/00", 1),
        ("predictions/01", 1),
        ("predictions/00", 4),
        ("predictions/01", 4),
    ]
    assert all(image.dtype == np.uint8 and image.shape[0] == 3 for _, image, _ in trainer.storage.images())


def test_model_runs_in_eval_mode_and_comes_back_as_it_was(tmp_path, records):
    model, _, _ = run(tmp_path, records, iterations=1)
    assert set(model.modes) == {(False, False)}
    assert model.training
    assert model.norm.training


@pytest.mark.parametrize(("num_images", "drawn"), [(1, 1), (3, 3), (9, 5)])
def test_fixed_number_of_images_is_spread_over_the_data_set(tmp_path, records, num_images, drawn):
    _, _, names = run(tmp_path, records, iterations=1, period=0, num_images=num_images)
    assert len(names) == drawn


def test_empty_data_set_draws_nothing(tmp_path):
    assert run(tmp_path, [], iterations=1)[2] == []


def test_picture_has_truth_on_the_left_and_prediction_on_the_right(records):
    empty = draw_truth_and_prediction(records[0], instances([])).get_image().astype(int)
    drawn = draw_truth_and_prediction(records[0], instances([0.9])).get_image().astype(int)
    columns = np.flatnonzero(np.abs(drawn - empty).max((0, 2)) > 20)
    assert columns.min() >= drawn.shape[1] // 2


def test_scores_below_the_threshold_are_not_drawn():
    output = {"instances": instances([0.9, 0.5, 0.4])}
    assert drawable(output, 0.5).scores.tolist() == pytest.approx([0.9, 0.5])


def test_best_proposals_are_drawn_for_a_model_without_instances():
    proposals = Instances((30, 40), proposal_boxes=Boxes(torch.rand(50, 4)), objectness_logits=torch.rand(50))
    boxes = drawable({"proposals": proposals}, 0.5, num_proposals=20).pred_boxes
    assert torch.equal(boxes.tensor, proposals.proposal_boxes.tensor[:20])


def test_proposals_can_be_drawn(records):
    proposals = Instances(
        (30, 40), proposal_boxes=Boxes(torch.tensor([[1.0, 1, 9, 9]])), objectness_logits=torch.ones(1)
    )
    none = Instances((30, 40), proposal_boxes=Boxes(torch.zeros(0, 4)), objectness_logits=torch.zeros(0))
    with_box, without = (
        draw_truth_and_prediction(records[0], drawable({"proposals": p}, 0.5)).get_image() for p in (proposals, none)
    )
    assert with_box.shape == without.shape
    assert (with_box != without).any()
