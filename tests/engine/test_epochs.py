import logging

import pytest

from detkit.engine import DefaultTrainer
from detkit.engine.epochs import in_iterations, iterations_of


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


def test_config_without_epochs_is_the_same_one(tiny_cfg):
    assert in_iterations(tiny_cfg, []) is tiny_cfg


def test_data_of_unknown_number_are_an_error(tiny_cfg):
    tiny_cfg.SOLVER.MAX_EPOCH = 1.0
    with pytest.raises(
        ValueError, match=r"SOLVER\.MAX_EPOCH .* need training data of a known number"
    ):
        in_iterations(tiny_cfg, iter([]))


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
