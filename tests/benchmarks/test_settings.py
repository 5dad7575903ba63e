import pytest
from settings import _print


def test_table_has_both_scores_and_how_many_times_as_fast(
    capsys: pytest.CaptureFixture[str],
) -> None:
    results = [{"bbox": {"AP": 50.0}}, {"bbox": {"AP": 49.5}}]
    _print(["TEST.AMP.ENABLED", "True"], [[0.2, 0.4, 0.2], [0.1, 0.1, 0.1]], results)
    assert capsys.readouterr().out.splitlines() == [
        "TEST.AMP.ENABLED True: plain, changed",
        "bbox AP: 50.00 49.50 (-0.50)",
        "CPU ms per image: 200.0 100.0 (2.00 times as fast)",
    ]
