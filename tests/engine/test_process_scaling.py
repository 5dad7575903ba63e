import pytest

from detkit.engine.process_scaling import scaled_to_processes


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
