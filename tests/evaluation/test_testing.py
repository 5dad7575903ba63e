import logging
import math

import pytest

from detkit.config import get_cfg
from detkit.evaluation import flatten_results_dict, print_csv_format, verify_results
from detkit.evaluation.testing import metrics_table, per_class_table

RESULTS = {"bbox": {"AP": 40.0, "AP50": 60.25, "APs": math.nan, "AP-cat": 40.0}}


def expecting(*expected):
    cfg = get_cfg()
    cfg.TEST.EXPECTED_RESULTS = list(expected)
    return cfg


def test_copypaste_lines_leave_out_the_classes(caplog):
    with caplog.at_level(logging.INFO):
        print_csv_format(RESULTS)
    assert caplog.messages == [
        "copypaste: Task: bbox",
        "copypaste: AP,AP50,APs",
        "copypaste: 40.0000,60.2500,nan",
    ]


def test_copypaste_takes_a_task_that_is_a_number(caplog):
    with caplog.at_level(logging.INFO):
        print_csv_format({"accuracy": 0.5})
    assert caplog.messages == ["copypaste: accuracy=0.5"]


def test_nested_results_become_flat():
    assert flatten_results_dict({"a": {"b": {"c": 1}, "d": 2}, "e": 3}) == {
        "a/b/c": 1,
        "a/d": 2,
        "e": 3,
    }
    assert flatten_results_dict({}) == {}


@pytest.mark.parametrize(
    "expected",
    [[], [["bbox", "AP", 41.0, 1.0]], [["bbox", "AP", 40, 0], ["bbox", "AP50", 60.0, 0.5]]],
    ids=["nothing", "at the tolerance", "two"],
)
def test_expected_results_are_met(expected):
    assert verify_results(expecting(*expected), RESULTS)


def test_missed_results_are_all_named():
    cfg = expecting(
        ["bbox", "AP", 42.0, 1.0], ["bbox", "AP50", 60.25, 0.1], ["bbox", "APs", 1.0, 99.0]
    )
    with pytest.raises(
        RuntimeError, match=r"bbox/AP is 40.0000, expected 42.0 \+- 1.0; bbox/APs is nan"
    ) as error:
        verify_results(cfg, RESULTS)
    assert "AP50" not in str(error.value)


def test_metric_that_was_not_evaluated_is_an_error_with_near_misses():
    with pytest.raises(
        ValueError, match="asks for bbox/AP51, which was not evaluated. Did you mean 'bbox/AP50'"
    ):
        verify_results(expecting(["bbox", "AP51", 1.0, 1.0]), RESULTS)


def test_malformed_expectation_is_an_error():
    with pytest.raises(
        ValueError, match=r"takes \[task, metric, value, tolerance\], got \['bbox', 'AP', 1.0\]"
    ):
        verify_results(expecting(["bbox", "AP", 1.0]), RESULTS)


def test_table_of_metrics_has_a_column_each():
    header, _, row = metrics_table({"AP": 12.34567, "APs": math.nan}).splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["AP", "APs"]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["12.346", "nan"]


def test_table_of_classes_has_every_class_and_keeps_names_that_look_like_numbers():
    metrics = {"AP": 1.0, **{f"AP-{name}": 50.0 for name in ("cat", "007", "1e5", "t-shirt")}}
    header, _, *rows = per_class_table(metrics).splitlines()
    cells = [cell.strip() for row in rows for cell in row.strip("|").split("|")]
    assert header.count("class") == 3
    assert [cell for cell in cells if cell] == [
        "cat",
        "50.000",
        "007",
        "50.000",
        "1e5",
        "50.000",
        "t-shirt",
        "50.000",
    ]


def test_name_in_a_table_stays_in_its_row():
    _, _, row = per_class_table({"AP-a\nb\x1b": 1.0}).splitlines()
    assert r"a\nb\x1b" in row


def test_table_of_no_classes_is_empty():
    assert per_class_table({"AP": 1.0}) == ""
