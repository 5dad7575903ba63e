"""MODEL_EMA: the mean itself, and in a run: saved, resumed, evaluated beside the weights, taken for prediction."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from detkit.checkpoint import CheckpointError, DetectionCheckpointer, load_checkpoint_file
from detkit.config import CfgNode
from detkit.engine import DefaultPredictor, DefaultTrainer, ModelEMA


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def move(model, step):
    with torch.no_grad():
        for value in model.state_dict().values():
            value += step


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("warmup", [False, True])
def test_mean_follows_its_definition(warmup):
    model = net()
    ema, mean = ModelEMA(model, decay=0.5, warmup=warmup), copied(model)
    for n in range(1, 12):
        move(model, 1)
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n)) if warmup else 0.5
        now = copied(model)
        mean = {
            k: decay * mean[k] + (1 - decay) * now[k] if now[k].is_floating_point() else now[k]
            for k in now
        }
    torch.testing.assert_close(ema.weights, mean)
    assert ema.weights["1.num_batches_tracked"] == 11


def test_constant_weights_are_their_own_mean():
    model = net()
    ema = ModelEMA(model, decay=0.9)
    ema.update()
    assert_same(ema.weights, copied(model))


def test_model_has_the_mean_inside_the_block_only():
    model = net()
    ema = ModelEMA(model, decay=0.9)
    move(model, 1)
    ema.update()
    before = copied(model)
    with ema.applied():
        assert_same(copied(model), ema.weights)
    assert_same(copied(model), before)
    assert not torch.equal(before["0.weight"], ema.weights["0.weight"])


def test_restored_mean_goes_on_bit_for_bit():
    model = net()
    ema = ModelEMA(model, decay=0.9)
    move(model, 2)
    ema.update()
    again = ModelEMA(model, decay=0.9)
    again.load_state_dict(ema.state_dict())
    for one in (ema, again):
        one.update()
    move(model, 3)
    for one in (ema, again):
        one.update()
    assert_same(ema.weights, again.weights)
    assert ema.num_updates == again.num_updates == 3


def test_buffer_that_appears_later_is_taken_over():
    model = net()
    model.register_buffer("late", None)
    ema = ModelEMA(model, decay=0.5, warmup=False)
    model.late = torch.ones(1)
    ema.update()
    model.late = torch.zeros(1)
    ema.update()
    assert ema.weights["late"] == 0.5


def test_mean_of_another_model_is_an_error():
    with pytest.raises(ValueError, match=r"averaged weights lack 2 tensors: 0\.bias, 0\.weight"):
        ModelEMA(nn.Sequential(nn.Linear(2, 2)), decay=0.9).load_state_dict(
            {"weights": {}, "num_updates": 1}
        )


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_out_of_range_is_an_error(decay):
    with pytest.raises(ValueError, match=r"MODEL_EMA\.DECAY must lie in \[0, 1\)"):
        ModelEMA(net(), decay=decay)


@pytest.fixture
def ema_cfg(tiny_cfg):
    tiny_cfg.MODEL_EMA.ENABLED, tiny_cfg.SOLVER.BASE_LR = True, 0.5
    return tiny_cfg


class FixedData(DefaultTrainer):
    first = 0

    @classmethod
    def build_train_loader(cls, cfg):
        rng = np.random.default_rng(5)
        images = torch.from_numpy(rng.integers(0, 255, (20, 2, 3, 40, 40), dtype=np.uint8))
        return [
            [{"image": image, "height": 40, "width": 40} for image in batch] for batch in images
        ][cls.first :]


def test_run_resumes_its_mean_bit_for_bit(ema_cfg):
    ema_cfg.DATASETS.TEST = ()
    FixedData(ema_cfg).train()
    final = load_checkpoint_file(f"{ema_cfg.OUTPUT_DIR}/model_final.pth")
    (Path(ema_cfg.OUTPUT_DIR) / "last_checkpoint").write_text("model_0000002.pth")
    resumed = type("Resumed", (FixedData,), {"first": 3})(ema_cfg)
    resumed.resume_or_load(resume=True)
    resumed.train()
    again = load_checkpoint_file(f"{ema_cfg.OUTPUT_DIR}/model_final.pth")
    assert_same(final["ema"]["weights"], again["ema"]["weights"])
    assert final["ema"]["num_updates"] == again["ema"]["num_updates"] == 6
    assert not torch.equal(final["ema"]["weights"]["head.weight"], final["model"]["head.weight"])


def test_mean_starts_from_the_weights_that_were_loaded(ema_cfg, tmp_path):
    ema_cfg.DATASETS.TEST, ema_cfg.SOLVER.MAX_ITER = (), 1
    model = DefaultTrainer.build_model(ema_cfg)
    move(model, 5)
    DetectionCheckpointer(model, str(tmp_path)).save("start")
    ema_cfg.MODEL.WEIGHTS = str(tmp_path / "start.pth")
    trainer = DefaultTrainer(ema_cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    keep = 2 / 11
    expected = keep * model.head.weight + (1 - keep) * trainer.model.head.weight
    torch.testing.assert_close(trainer.ema.weights["head.weight"], expected)


def test_mean_is_evaluated_beside_the_weights_which_stay(ema_cfg):
    ema_cfg.DATASETS.TEST = ("tiny_val",)
    seen = []

    class Spy(DefaultTrainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            seen.append((Path(cfg.OUTPUT_DIR).name, copied(model)))
            return super().test(cfg, model, evaluators)

    trainer = Spy(ema_cfg)
    results = trainer.train()
    assert list(results) == ["bbox", "bbox_EMA"]
    assert [folder for folder, _ in seen] == ["output", "EMA"]
    assert_same(seen[1][1], trainer.ema.weights)
    assert_same(seen[0][1], copied(trainer.model))
    assert "bbox_EMA/AP" in trainer.storage.latest()


def test_results_of_several_data_sets_are_side_by_side_in_each(ema_cfg):
    ema_cfg.DATASETS.TEST = ("tiny_val", "tiny_train")
    results = DefaultTrainer(ema_cfg).train()
    assert {name: list(tasks) for name, tasks in results.items()} == {
        "tiny_val": ["bbox", "bbox_EMA"],
        "tiny_train": ["bbox", "bbox_EMA"],
    }


@pytest.mark.parametrize("averaged", [False, True])
def test_prediction_takes_the_mean_where_it_is_asked_for(ema_cfg, averaged):
    ema_cfg.DATASETS.TEST = ()
    trainer = DefaultTrainer(ema_cfg)
    trainer.train()
    ema_cfg.MODEL.WEIGHTS = f"{ema_cfg.OUTPUT_DIR}/model_final.pth"
    ema_cfg.MODEL_EMA.USE_FOR_PREDICTION = averaged
    predictor = DefaultPredictor(ema_cfg)
    assert_same(copied(predictor.model), trainer.ema.weights if averaged else copied(trainer.model))


def test_checkpoint_without_a_mean_is_an_error_where_it_is_asked_for(tiny_cfg):
    tiny_cfg.DATASETS.TEST = ()
    DefaultTrainer(tiny_cfg).train()
    tiny_cfg.MODEL.WEIGHTS = f"{tiny_cfg.OUTPUT_DIR}/model_final.pth"
    tiny_cfg.MODEL_EMA.USE_FOR_PREDICTION = True
    with pytest.raises(
        CheckpointError, match=r"model_final\.pth has no averaged weights, .*MODEL_EMA\.ENABLED"
    ):
        DefaultPredictor(tiny_cfg)


def test_group_of_a_project_that_averages_by_itself_is_left_to_it(tiny_cfg):
    tiny_cfg.MODEL_EMA = CfgNode({"ENABLED": True, "DECAY": 0.9, "DEVICE": ""})
    trainer = DefaultTrainer(tiny_cfg)
    trainer.train()
    assert trainer.ema is None
    tiny_cfg.MODEL.WEIGHTS = f"{tiny_cfg.OUTPUT_DIR}/model_final.pth"
    assert DefaultPredictor(tiny_cfg).cfg.MODEL_EMA.DECAY == 0.9
