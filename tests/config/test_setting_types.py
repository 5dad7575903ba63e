import pytest

from detkit.config import get_cfg


@pytest.fixture
def cfg():
    return get_cfg()


def test_list_reads_python_literals(cfg):
    cfg.merge_from_list(
        ["SOLVER.STEPS", "(1, 2)", "MODEL.MASK_ON", "True", "SOLVER.BASE_LR", "1e-3", "OUTPUT_DIR", "out"]
    )
    assert (cfg.SOLVER.STEPS, cfg.MODEL.MASK_ON, cfg.SOLVER.BASE_LR, cfg.OUTPUT_DIR) == ((1, 2), True, 1e-3, "out")


def test_whole_number_serves_as_float(cfg):
    cfg.merge_from_list(["SOLVER.BASE_LR", "1"])
    assert isinstance(cfg.SOLVER.BASE_LR, float)


def test_text_stays_text_where_text_is_expected(cfg):
    cfg.merge_from_list(["MODEL.WEIGHTS", "123", "OUTPUT_DIR", "(1)"])
    assert (cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR) == ("123", "(1)")


def test_list_keeps_the_type_of_the_default(cfg):
    cfg.merge_from_list(["DATASETS.TRAIN", ["a"], "MODEL.PIXEL_STD", (1.0, 2.0, 3.0)])
    assert cfg.DATASETS.TRAIN == ("a",)
    assert cfg.MODEL.PIXEL_STD == [1.0, 2.0, 3.0]
