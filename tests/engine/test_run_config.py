import logging
import sys
from pathlib import Path

import pytest
import torch

from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.engine import DefaultTrainer
from detkit.engine.run_config import (
    in_folder,
    iterations_of,
    prepare,
    run_config,
    scaled_to_batch,
    scaled_to_processes,
    without_augmentation,
)

COUNTS = [{"id": 1, "image_count": 3}, {"id": 2, "image_count": 1}]


def test_prepare_imports_registers_and_follows_the_backbone_once(tiny_cfg, tmp_path, monkeypatch):
    (tmp_path / "my_part_of_prepare.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    words = ["MODEL.BACKBONE.NAME", "build_torchvision_backbone", "IMPORTS", ["my_part_of_prepare"]]
    tiny_cfg.merge_from_list(words)
    tiny_cfg.freeze()
    prepare(tiny_cfg)
    assert "my_part_of_prepare" in sys.modules
    assert "tiny_train" in DatasetCatalog
    assert tiny_cfg.INPUT.FORMAT == "RGB"
    assert tiny_cfg.is_frozen()
    before = tiny_cfg.dump()
    prepare(tiny_cfg)
    assert tiny_cfg.dump() == before


def test_steps_have_their_order(tiny_cfg):
    # Epochs are counted with the batch of all processes, and the data see the pixels' order.
    words = ["SOLVER.REFERENCE_WORLD_SIZE", "2", "SOLVER.IMS_PER_BATCH", "4"]
    words += ["SOLVER.MAX_EPOCH", "2", "MODEL.BACKBONE.NAME", "build_torchvision_backbone"]
    tiny_cfg.merge_from_list(words)
    seen = []

    class Loader:
        num_images = 6

    cfg, loader = run_config(tiny_cfg, lambda cfg: seen.append(cfg.INPUT.FORMAT) or Loader())
    assert seen == ["RGB"]
    assert isinstance(loader, Loader)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER) == (2, 6)
    assert tiny_cfg.SOLVER.IMS_PER_BATCH == 4


def scaled(cfg, reference, processes):
    cfg.SOLVER.REFERENCE_WORLD_SIZE = reference
    return scaled_to_processes(cfg, processes)


@pytest.fixture
def reference_cfg(tiny_cfg):
    tiny_cfg.SOLVER.IMS_PER_BATCH, tiny_cfg.SOLVER.BASE_LR, tiny_cfg.SOLVER.MAX_ITER = 16, 0.1, 5000
    tiny_cfg.SOLVER.STEPS, tiny_cfg.SOLVER.WARMUP_ITERS = (4000,), 1000
    tiny_cfg.SOLVER.CHECKPOINT_PERIOD, tiny_cfg.TEST.EVAL_PERIOD = 1000, 500
    return tiny_cfg


def test_scaling_leaves_the_passes_per_iteration(reference_cfg):
    reference_cfg.SOLVER.ACCUM_STEPS = 4
    cfg = scaled(reference_cfg, 8, 2)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUM_STEPS, cfg.SOLVER.BASE_LR) == (4, 4, 0.025)
    assert cfg.SOLVER.MAX_ITER == 20000


def test_settings_follow_the_number_of_processes(reference_cfg):
    reference_cfg.freeze()
    reference_cfg.defrost()
    cfg = scaled(reference_cfg, 8, 16)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (32, 0.2, 2500)
    assert (cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.CHECKPOINT_PERIOD) == (
        (2000,),
        500,
        500,
    )
    assert cfg.TEST.EVAL_PERIOD == 250
    assert scaled_to_processes(cfg, 16) is cfg
    assert reference_cfg.SOLVER.IMS_PER_BATCH == 16


def test_learning_rate_at_the_end_follows_too(reference_cfg):
    reference_cfg.SOLVER.BASE_LR_END = 0.001
    assert scaled(reference_cfg, 8, 16).SOLVER.BASE_LR_END == 0.002


def test_no_length_shrinks_to_nothing_and_no_evaluation_stays_none(reference_cfg):
    reference_cfg.SOLVER.MAX_ITER = reference_cfg.SOLVER.CHECKPOINT_PERIOD = (
        reference_cfg.TEST.EVAL_PERIOD
    ) = 1
    cfg = scaled(reference_cfg, 1, 8)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (1, 1, 1)
    reference_cfg.TEST.EVAL_PERIOD = 0
    assert scaled(reference_cfg, 1, 8).TEST.EVAL_PERIOD == 0


@pytest.mark.parametrize(("reference", "processes"), [(0, 4), (4, 4)])
def test_settings_stay_where_nothing_is_to_be_scaled(reference_cfg, reference, processes):
    assert scaled(reference_cfg, reference, processes) is reference_cfg


def test_scaled_config_stays_frozen(reference_cfg):
    reference_cfg.SOLVER.REFERENCE_WORLD_SIZE = 8
    reference_cfg.freeze()
    assert scaled_to_processes(reference_cfg, 4).is_frozen()


def test_batch_that_the_reference_cannot_share_is_an_error(reference_cfg):
    with pytest.raises(
        ValueError,
        match=r"SOLVER\.IMS_PER_BATCH=16 must be a multiple of SOLVER\.REFERENCE_WORLD_SIZE=3",
    ):
        scaled(reference_cfg, 3, 4)


def test_scaling_to_more_processes_leaves_epochs(tiny_cfg):
    tiny_cfg.merge_from_list(
        ["TEST.EVAL_PERIOD", "2ep", "SOLVER.STEPS", ["8ep", 8], "SOLVER.REFERENCE_WORLD_SIZE", 1]
    )
    cfg = scaled_to_processes(tiny_cfg, 2)
    assert (cfg.TEST.EVAL_PERIOD, cfg.SOLVER.STEPS) == ("2ep", ("8ep", 4))


# By hand: 7 images in 3 epochs are 21 images.
@pytest.mark.parametrize(
    ("batch", "accum", "iterations"), [(1, 1, 21), (2, 1, 11), (4, 1, 6), (2, 2, 6), (3, 1, 7)]
)
def test_epochs_give_the_iterations_computed_by_hand(batch, accum, iterations):
    assert iterations_of("3ep", "K", num_images=7, batch=batch * accum) == iterations


@pytest.mark.parametrize(
    ("epochs", "iterations"),
    [(".1ep", 3), ("0.1ep", 3), ("1.5ep", 45), ("2ep", 60), (5, 5), (0, 0)],
)
def test_parts_of_epochs_are_exact_and_numbers_stay(epochs, iterations):
    assert iterations_of(epochs, "K", num_images=30, batch=1) == iterations


def test_shares_need_no_number_of_images_and_stay(tiny_cfg):
    tiny_cfg.merge_from_list(["SOLVER.STEPS", ["60%", 8], "SOLVER.WARMUP_ITERS", "0.5%"])
    cfg, _ = run_config(tiny_cfg, lambda cfg: iter([]))
    assert (cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS) == (("60%", 8), "0.5%")


@pytest.mark.parametrize("text", ["2", "ep", "2 ep", "-1ep", "2epochs"])
def test_another_text_names_its_key(text):
    with pytest.raises(
        ValueError,
        match=r"SOLVER\.STEPS must be a number of iterations, or of epochs such as '2ep'",
    ):
        iterations_of(text, "SOLVER.STEPS", num_images=7, batch=2)


@pytest.mark.parametrize(
    ("batch", "accum", "iterations"), [(1, 1, 12), (2, 1, 6), (4, 1, 3), (2, 3, 2)]
)
def test_run_takes_the_iterations_of_its_epochs(tiny_cfg, batch, accum, iterations):
    tiny_cfg.DATASETS.TEST = ()  # six images
    tiny_cfg.SOLVER.MAX_EPOCH, tiny_cfg.SOLVER.IMS_PER_BATCH, tiny_cfg.SOLVER.ACCUM_STEPS = (
        2.0,
        batch,
        accum,
    )
    assert DefaultTrainer(tiny_cfg).max_iter == iterations


def test_every_period_may_be_in_epochs(tiny_cfg, caplog):
    words = ["SOLVER.MAX_EPOCH", "4", "SOLVER.STEPS", "('2ep', 10)", "SOLVER.WARMUP_ITERS", "0.5ep"]
    words += ["SOLVER.CHECKPOINT_PERIOD", "1ep", "TEST.EVAL_PERIOD", "2ep", "VIS_PERIOD", "3ep"]
    tiny_cfg.merge_from_list(words)
    tiny_cfg.freeze()
    with caplog.at_level(logging.INFO, logger="detkit"):
        cfg = DefaultTrainer(tiny_cfg).cfg
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS) == (12, (6, 10), 2)
    assert (cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD, cfg.VIS_PERIOD) == (3, 6, 9)
    assert "an epoch of 6 images is 3 iterations of 2; training takes 12 iterations" in caplog.text
    assert tiny_cfg.TEST.EVAL_PERIOD == "2ep"


def test_text_may_be_replaced_by_a_number_and_back(tiny_cfg):
    for value, kept in (("2ep", "2ep"), (5, 5), ("7", 7), ("1ep", "1ep")):
        tiny_cfg.merge_from_list(["TEST.EVAL_PERIOD", value])
        assert kept == tiny_cfg.TEST.EVAL_PERIOD
    with pytest.raises(ValueError, match=r"TEST\.EVAL_PERIOD must be an int"):
        tiny_cfg.merge_from_list(["TEST.EVAL_PERIOD", "2 epochs"])


def test_config_without_epochs_needs_no_number_of_images(tiny_cfg):
    assert run_config(tiny_cfg, lambda cfg: iter([]))[0] == tiny_cfg


def test_data_of_unknown_number_are_an_error(tiny_cfg):
    tiny_cfg.SOLVER.MAX_EPOCH = 1.0
    with pytest.raises(
        ValueError, match=r"SOLVER\.MAX_EPOCH .* need training data of a known number"
    ):
        run_config(tiny_cfg, lambda cfg: iter([]))


def test_loader_of_torch_has_the_images_of_its_data_set(tiny_cfg):
    tiny_cfg.SOLVER.MAX_EPOCH = 3.0
    loader = torch.utils.data.DataLoader(list(range(7)))
    assert run_config(tiny_cfg, lambda cfg: loader)[0].SOLVER.MAX_ITER == 11


def test_epoch_of_a_random_subset_is_the_subset(tiny_cfg):
    tiny_cfg.DATASETS.TEST, tiny_cfg.SOLVER.MAX_EPOCH = (), 2.0
    tiny_cfg.DATALOADER.SAMPLER_TRAIN, tiny_cfg.DATALOADER.RANDOM_SUBSET_RATIO = (
        "RandomSubsetTrainingSampler",
        0.5,
    )
    assert DefaultTrainer(tiny_cfg).max_iter == 3


def test_subset_has_one_image_at_least(tiny_cfg):
    tiny_cfg.DATASETS.TEST, tiny_cfg.SOLVER.MAX_EPOCH = (), 4.0
    tiny_cfg.DATALOADER.SAMPLER_TRAIN, tiny_cfg.DATALOADER.RANDOM_SUBSET_RATIO = (
        "RandomSubsetTrainingSampler",
        0.01,
    )
    assert DefaultTrainer(tiny_cfg).max_iter == 2


@pytest.fixture
def rare_things():
    """A data set of two classes, of which the second stands in one of three pictures."""
    DatasetCatalog.register("rare_things", list)
    MetadataCatalog.get("rare_things").set(thing_classes=["dog", "okapi"], class_image_count=COUNTS)
    yield "rare_things"
    DatasetCatalog.remove("rare_things")
    MetadataCatalog.remove("rare_things")


def test_class_counts_come_from_the_training_data(tiny_cfg, rare_things):
    tiny_cfg.DATASETS.TRAIN = (rare_things,)
    tiny_cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS = True
    cfg, _ = run_config(tiny_cfg, lambda cfg: [])
    assert list(cfg.MODEL.ROI_BOX_HEAD.FED_LOSS_CLASS_COUNTS) == [3, 1]
    assert list(tiny_cfg.MODEL.ROI_BOX_HEAD.FED_LOSS_CLASS_COUNTS) == []


@pytest.mark.parametrize(("is_on", "given"), [(False, []), (True, [1, 9])])
def test_class_counts_that_nobody_asks_for_are_not_looked_up(tiny_cfg, is_on, given):
    tiny_cfg.DATASETS.TRAIN = ("not there",)
    tiny_cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS = is_on
    tiny_cfg.MODEL.ROI_BOX_HEAD.FED_LOSS_CLASS_COUNTS = given
    cfg, _ = run_config(tiny_cfg, lambda cfg: [])
    assert list(cfg.MODEL.ROI_BOX_HEAD.FED_LOSS_CLASS_COUNTS) == given


def test_evaluation_on_the_way_goes_without_augmentation(tiny_cfg):
    tiny_cfg.TEST.AUG.ENABLED = True
    tiny_cfg.freeze()
    assert not without_augmentation(tiny_cfg).TEST.AUG.ENABLED
    assert tiny_cfg.TEST.AUG.ENABLED


def test_folder_lies_within_the_output_directory(tiny_cfg):
    tiny_cfg.freeze()
    assert Path(in_folder(tiny_cfg, "TTA").OUTPUT_DIR) == Path(tiny_cfg.OUTPUT_DIR) / "TTA"


@pytest.mark.parametrize(
    ("batch", "accum", "rate"), [(4, 1, 0.02), (2, 1, 0.01), (8, 2, 0.08), (1, 4, 0.02)]
)
def test_rate_follows_the_images_of_an_iteration(tiny_cfg, batch, accum, rate):
    words = ["SOLVER.REFERENCE_BATCH", 4, "SOLVER.BASE_LR", 0.02, "SOLVER.IMS_PER_BATCH", batch]
    tiny_cfg.merge_from_list([*words, "SOLVER.ACCUM_STEPS", accum])
    cfg = scaled_to_batch(tiny_cfg)
    assert pytest.approx(rate) == cfg.SOLVER.BASE_LR
    assert scaled_to_batch(cfg) is cfg
    assert tiny_cfg.SOLVER.BASE_LR == 0.02


def test_rate_is_scaled_once_for_batch_and_processes(tiny_cfg):
    words = ["SOLVER.REFERENCE_BATCH", 16, "SOLVER.REFERENCE_WORLD_SIZE", 1]
    tiny_cfg.merge_from_list([*words, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.BASE_LR", 0.02])
    cfg = scaled_to_batch(scaled_to_processes(scaled_to_batch(tiny_cfg), 2))
    assert cfg.SOLVER.IMS_PER_BATCH == 8
    assert pytest.approx(0.01) == cfg.SOLVER.BASE_LR


def test_batch_without_a_reference_leaves_the_rate_alone(tiny_cfg):
    assert scaled_to_batch(tiny_cfg) is tiny_cfg


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        pytest.param(["SOLVER.MAX_ITER", 90000], "MAX_ITER=90000 is 30000 epochs", id="coco's"),
        pytest.param(["SOLVER.MAX_ITER", 300], "", id="a hundred epochs"),
        pytest.param(["SOLVER.MAX_EPOCH", 500], "", id="asked for in epochs"),
    ],
)
def test_schedule_of_a_larger_data_set_is_told(tiny_cfg, caplog, settings, warned):
    class Loader:
        num_images = 6

    tiny_cfg.merge_from_list([*settings, "SOLVER.IMS_PER_BATCH", 2])
    run_config(tiny_cfg, lambda cfg: Loader())
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert (warned in warnings[0]) if warned else not warnings
