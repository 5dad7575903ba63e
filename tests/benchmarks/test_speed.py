import json
import os
import time
import weakref

import numpy as np
import pairs
import pytest
import speed
import torch
from coco_scoring import eval_contest, synthetic_detections
from contest import (
    Contest,
    Measurement,
    Setting,
    example_image,
    example_objects,
    format_table,
    measure,
)
from data_loading import data_contest
from speed import main

QUICK = Setting(torch.device("cpu"), quick=True)


def _contest(ours, theirs, **kwargs) -> Contest:
    return Contest(
        name="race",
        task="to wait",
        opponent="a snail",
        ours=ours,
        theirs=theirs,
        target=2.0,
        rounds=3,
        **kwargs,
    )


def test_both_sides_run_in_turn_after_one_round_without_the_clock() -> None:
    calls: list[str] = []
    result = measure(_contest(lambda: calls.append("a"), lambda: calls.append("b")), rounds=3)
    assert calls == ["a", "b"] * 4
    assert len(result.ours) == len(result.theirs) == 3


def test_without_a_warm_up_the_round_that_is_checked_counts() -> None:
    calls: list[str] = []
    contest = _contest(
        lambda: calls.append("a"),
        lambda: calls.append("b"),
        has_warm_up=False,
        check=lambda ours, theirs: calls.append("check"),
    )
    result = measure(contest, rounds=1)
    assert calls == ["a", "b", "check"]
    assert len(result.ours) == len(result.theirs) == 1


def test_processes_of_a_contest_end_with_it(monkeypatch) -> None:
    sides = [lambda: None, lambda: None]
    alive = [weakref.ref(side) for side in sides]
    seen = []

    def second(setting: Setting) -> Contest:
        seen.extend(side() for side in alive)
        return _contest(lambda: None, lambda: None)

    contests = {"a": lambda setting: _contest(sides.pop(), sides.pop()), "b": second}
    monkeypatch.setattr(speed, "CONTESTS", contests)
    assert main(["a", "b"]) == 0
    assert seen == [None, None]


def test_ratio_says_how_many_times_faster_detkit_is() -> None:
    result = measure(_contest(lambda: time.sleep(0.002), lambda: time.sleep(0.02)), rounds=2)
    assert 4 < result.ratio < 12


def test_sides_that_do_not_do_the_same_are_not_timed() -> None:
    def check(ours: int, theirs: int) -> None:
        raise ValueError(f"{ours} is not {theirs}")

    with pytest.raises(ValueError, match="1 is not 2"):
        measure(_contest(lambda: 1, lambda: 2, check=check), rounds=1)


def test_table_shows_medians_spread_ratio_and_target() -> None:
    contest = _contest(None, None)
    lines = format_table(
        [Measurement(contest, [0.1, 0.3, 0.2], [3.0, 2.0, 4.0], [0.2, 0.4, 0.3], [0.9, 0.5, 0.6])]
    ).splitlines()
    assert "200 ms (100 to 300)" in lines[-1]
    assert "3 s (2 to 4)" in lines[-1]
    assert "15.00x (6.67 to 30.00)" in lines[-1]
    assert "2.00x" in lines[-1]  # processor time
    assert "2.0x" in lines[-1]


def test_command_prints_the_table_and_writes_every_second(tmp_path, monkeypatch, capsys) -> None:
    contest = _contest(lambda: time.sleep(0.001), lambda: time.sleep(0.002))
    monkeypatch.setattr(speed, "CONTESTS", {"race": lambda setting: contest})
    assert main(["race", "--rounds", "2", "--json", str(tmp_path / "new" / "b.json")]) == 0
    assert "a snail" in capsys.readouterr().out
    content = json.loads((tmp_path / "new" / "b.json").read_text())
    assert content["torch"] == torch.__version__
    assert len(content["contests"][0]["detkit_seconds"]) == 2


def test_tables_are_put_into_a_page(tmp_path, monkeypatch) -> None:
    shares = {"detkit": {"ROIAlign": 0.001, "all else": 0.003}, "snail": {"all else": 0.01}}
    contest = _contest(lambda: None, lambda: None, shares=lambda: shares)
    monkeypatch.setattr(speed, "CONTESTS", {"race": lambda setting: contest})
    page = tmp_path / "page.md"
    page.write_text("Before\n\n<!-- speed -->\nold\n<!-- /speed -->\n\nAfter\n")
    for _ in range(2):
        assert main(["race", "--shares", "--markdown", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("Before\n\n<!-- speed -->\n\n")
    assert text.endswith("\n\n<!-- /speed -->\n\nAfter\n")
    assert "old" not in text
    assert text.count("| race ") == 1
    assert f"torch {torch.__version__}" in text
    rows = [line.split("|") for line in text.splitlines()]
    cells = [[cell.strip() for cell in row[1:-1]] for row in rows]
    assert ["all else", "3 ms (75%)", "10 ms (100%)"] in cells
    assert ["ROIAlign", "1 ms (25%)", "0 ms (0%)"] in cells


def test_of_a_part_the_table_shows_what_is_added() -> None:
    contest = _contest(None, None, is_part=True)
    lines = format_table([Measurement(contest, [3.4], [3.0], [2.5], [2.25])]).splitlines()
    assert "+0.40 s" in lines[-1]
    assert "+0.25 s" in lines[-1]
    assert "+2.0 s" in lines[-1]


def test_operators_are_named_by_their_use(monkeypatch) -> None:
    def convolve() -> None:
        torch.nn.functional.conv2d(torch.zeros(1, 8, 32, 32), torch.zeros(8, 8, 3, 3)).relu_()

    monkeypatch.setattr("pairs._side", lambda: convolve)
    seconds = pairs._profiled_side()()
    assert set(seconds) >= {"convolutions, matrix products", "additions, products, norms, ReLU"}
    assert 0 < sum(seconds.values()) < 10


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        pytest.param(["data", "--markdown", "no.md"], "no.md", id="no page"),
        pytest.param(["data", "--markdown", os.devnull], "needs the lines", id="no marks"),
        pytest.param(["infre"], "no contest 'infre'. Did you mean 'infer'?", id="unknown contest"),
        pytest.param(
            ["data", "--rounds", "0"], "--rounds must be at least 1, got 0", id="no rounds"
        ),
        pytest.param(["data", "--device", "gpu"], "'gpu'", id="unknown device"),
    ],
)
def test_wrong_argument_is_explained(argv: list[str], message: str, capsys) -> None:
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_mappers_load_the_same_image_and_objects() -> None:
    contest = data_contest(QUICK)
    ours, theirs = contest.ours(), contest.theirs()
    assert contest.check is not None
    contest.check(ours, theirs)
    assert ours["image"].shape == (3, 800, 1067)
    assert len(ours["instances"]) == len(theirs["instances"]) == 10
    # Each side flips when its own random numbers say so.
    mirrored = theirs["image"].flip(2)
    difference = min(
        (ours["image"].float() - side.float()).abs().mean() for side in (theirs["image"], mirrored)
    )
    assert difference < 1
    boxes = theirs["instances"].gt_boxes.tensor
    candidates = [
        boxes,
        torch.stack([1067 - boxes[:, 2], boxes[:, 1], 1067 - boxes[:, 0], boxes[:, 3]], dim=1),
    ]
    assert min((ours["instances"].gt_boxes.tensor - c).abs().max() for c in candidates) < 0.01


def test_evaluators_score_the_same_detections_alike(monkeypatch) -> None:
    monkeypatch.setattr("coco_scoring.synthetic_detections", lambda n: synthetic_detections(20))
    contest = eval_contest(QUICK)
    ours, theirs = contest.ours(), contest.theirs()
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert 5 < ours < 95


def test_synthetic_data_have_the_proportions_of_coco() -> None:
    truth, detections = synthetic_detections(200)
    assert truth.num_objects / 200 == pytest.approx(7, rel=0.1)
    assert sum(map(len, detections)) / 200 == pytest.approx(38, rel=0.1)
    classes = np.array([a["category_id"] for a in truth.coco["annotations"]])
    assert (classes == 1).mean() > 0.15


def test_equal_seeds_give_equal_detections() -> None:
    first, second = (synthetic_detections(5, seed=3)[1] for _ in range(2))
    assert all(np.array_equal(a.boxes, b.boxes) for a, b in zip(first, second, strict=True))


def test_example_objects_lie_within_the_example_image() -> None:
    boxes, classes = example_objects(num_classes=80)
    height, width = example_image().shape[:2]
    assert boxes.shape == (10, 4)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= [width, height]).all()
    assert classes.max() < 80


@pytest.mark.slow
@pytest.mark.parametrize("name", ["infer", "train", "retinanet", "import"])
def test_contests_of_models_run(name: str) -> None:
    measurement = measure(speed.CONTESTS[name](QUICK), rounds=1)
    assert len(measurement.ours) == len(measurement.theirs) == 1
    assert min(measurement.ours + measurement.theirs) > 0
