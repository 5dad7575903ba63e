import json
import os
from mmap import MAP_PRIVATE, mmap

import curves
import pytest
from curves import Curve, main


def filled_memory(megabytes):
    """New pages: the heap of a process that ran other tests may hold as much that is free."""
    region = mmap(-1, megabytes << 20, MAP_PRIVATE)
    region[::4096] = b"x" * (megabytes << 8)
    return region


def test_point_holds_the_memory_that_the_call_adds():
    filled = Curve("bytes", (1,), lambda count: lambda: filled_memory(count))
    point = curves._measure(filled, 200)
    assert point["value"] == 200
    assert 150 < point["peak_mb"] < 260


def test_memory_written_is_that_of_the_process_alone():
    before = curves.written_mb(os.getpid())
    with filled_memory(100):
        assert 95 < curves.written_mb(os.getpid()) - before < 110


@pytest.mark.slow
@pytest.mark.parametrize("name", ["workers", "processes"])
def test_point_of_several_processes_is_per_image_and_per_process(name, catalogs_as_before):
    point = curves._measure(curves.CURVES[name], 2)
    assert point["value"] == 2
    assert 0.001 < point["seconds"] < 20
    # Two at once take half as long by the clock, or more where others use the machine.
    assert point["clock"] > point["seconds"] / 2.5
    assert 10 < point["peak_mb"] < 2000


@pytest.mark.slow
def test_curve_has_a_point_per_value_in_a_process_of_its_own(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["records", "--quick", "--output", str(tmp_path / "new")]) == 0
    points = json.loads((tmp_path / "new" / "curves.json").read_text())["records"]
    assert [point["value"] for point in points] == [1000, 10_000, 100_000]
    assert points[-1]["peak_mb"] > points[0]["peak_mb"] > 0
    assert (tmp_path / "new" / "curves.png").stat().st_size > 1000
    assert "records: time grows with its power" in capsys.readouterr().out


def test_unknown_curve_is_an_error(capsys):
    assert main(["recrods"]) == 2
    assert "no curve 'recrods'. Did you mean 'records'?" in capsys.readouterr().err
