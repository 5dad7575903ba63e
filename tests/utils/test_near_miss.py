import pytest

from detkit.utils.near_miss import did_you_mean, near_misses

KNOWN = ["MODEL.WEIGHTS", "MODEL.RPN.NMS_THRESH", "SOLVER.BASE_LR", "SOLVER.MAX_ITER"]


@pytest.mark.parametrize(
    ("name", "best"),
    [
        pytest.param("SOLVER.BASE_LRR", "SOLVER.BASE_LR", id="typo"),
        pytest.param("base_lr", "SOLVER.BASE_LR", id="leaf-only-in-lower-case"),
        pytest.param("solver.base_lr", "SOLVER.BASE_LR", id="case"),
        pytest.param("RPN.NMS_THRESH", "MODEL.RPN.NMS_THRESH", id="lost-parent"),
        pytest.param("TRAINER.MAX_ITER", "SOLVER.MAX_ITER", id="wrong-parent"),
    ],
)
def test_best_suggestion(name, best):
    assert near_misses(name, KNOWN)[0] == best


def test_names_with_and_without_a_parent_go_together():
    assert near_misses("SOLVER.VERSIN", ["MODEL.WEIGHTS", "VERSION"])[0] == "VERSION"


def test_a_last_part_that_one_name_has_comes_before_the_parent():
    known = ["SOLVER.WARMUP_ITERS", "SOLVER.STEPS", "SOLVER.MAX_ITER", "WRITERS"]
    assert near_misses("SOLVER.WRITERS", known)[0] == "WRITERS"


def test_a_last_part_that_several_have_does_not_say_more():
    known = ["A.NORM", "B.NORM", "MODEL.FPN.NORMS"]
    assert near_misses("MODEL.FPN.NORM", known)[0] == "MODEL.FPN.NORMS"


def test_nothing_close_gives_nothing():
    assert near_misses("zzz", KNOWN) == []
    assert did_you_mean("zzz", KNOWN) == ""
    assert did_you_mean("x", []) == ""


def test_sentence():
    assert did_you_mean("MODEL.WEIGHT", KNOWN[:1]) == " Did you mean 'MODEL.WEIGHTS'?"
