from detkit.cli.train import format_results

COCO = {"bbox": {"AP": 41.26, "AP50": 60.0, "AP-cat": 50.0, "AP-traffic-light": 30.0}}


def _rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]


def test_overall_metrics_of_a_task_are_one_row() -> None:
    assert _rows(format_results(COCO))[0] == ["", "AP", "AP50"]
    assert _rows(format_results(COCO))[2] == ["bbox", "41.3", "60.0"]


def test_metrics_of_single_classes_are_left_to_the_log() -> None:
    assert "cat" not in format_results(COCO)
    assert "traffic" not in format_results(COCO)


def test_several_tasks_are_several_tables() -> None:
    text = format_results({**COCO, "segm": {"AP": 38.0}})
    assert ["segm", "38.0"] in _rows(text)
    assert ["bbox", "41.3", "60.0"] in _rows(text)


def test_several_data_sets_are_named() -> None:
    lines = format_results({"first_val": COCO, "second_val": {"bbox": {"AP": 7.0}}}).splitlines()
    assert "first_val" in lines
    assert "second_val" in lines
    assert "| bbox |  7.0 |" in lines


def test_missing_score_is_shown_as_nan() -> None:
    assert _rows(format_results({"bbox": {"AP": float("nan")}}))[2] == ["bbox", "nan"]
