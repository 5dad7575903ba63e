import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest
import torch
from pairs import Pair, Task

ROOT = Path(gpu.__file__).resolve().parents[1]
CPU = torch.device("cpu")


def tiny_run(folder, seconds=60.0):
    task = Task(CPU, (64, 96), is_tiny=True)
    return gpu.Run(task, 2, (1,), 1, 0.0, time.monotonic() + seconds, "eager", folder)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_failed_measurement_is_a_row_and_the_next_one_runs(tmp_path):
    def fail():
        raise RuntimeError("out of memory")

    run = tiny_run(tmp_path)
    run.attempt("first", fail)
    run.attempt("second", lambda: run.add("second", ms=1.5))
    assert rows_of(tmp_path) == [
        {"name": "first", "error": "RuntimeError: out of memory"},
        {"name": "second", "ms": 1.5},
    ]


def test_no_measurement_starts_after_the_deadline(tmp_path):
    run = tiny_run(tmp_path, seconds=-1.0)
    run.attempt("late", lambda: run.add("late", ms=1.0))
    assert rows_of(tmp_path) == [{"name": "late", "skipped": "no time left"}]


def test_part_that_does_not_end_is_stopped_with_what_it_has_measured(tmp_path, monkeypatch):
    program = tmp_path / "slow.py"
    program.write_text(
        "import pathlib, sys, time\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--alone') + 1])\n"
        "(folder / 'rows.jsonl').write_text('{\"name\": \"quick\"}\\n')\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(program))
    args = gpu.argparse.Namespace(device="cpu", tiny=True, json=None)
    rows, error = gpu._run_part("machine", 3.0, args)
    assert rows == [{"name": "quick"}]
    assert error == "not done in 3 s"


def test_machine_is_measured(tmp_path):
    run = tiny_run(tmp_path)
    gpu.machine(run)
    by_name = {row["name"]: row for row in rows_of(tmp_path)}
    assert by_name["matrix product bf16"]["tflops"] > 0
    assert by_name["copy"]["gb_per_s"] > 0


def test_busy_time_counts_what_overlaps_once():
    assert gpu.busy_time([(0, 2), (1, 3), (5, 6), (5, 5.5)]) == 4
    assert gpu.busy_time([]) == 0


def test_unknown_part_is_an_error(capsys):
    assert gpu.main(["masks"]) == 2
    assert "no part 'masks'. Did you mean 'mask'?" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["faster", "mask", "retinanet"])
def test_both_libraries_find_the_same_objects(kind):
    pair = Pair(kind, Task(CPU, (128, 160)))
    found = {side: run() for side, run in pair.infer(1, torch.float32).items()}
    (ours,), (theirs,) = found["detkit"], found["torchvision"]
    assert len(ours) == len(theirs["boxes"]) > 20
    torch.testing.assert_close(
        ours.scores.sort().values, theirs["scores"].sort().values, atol=1e-3, rtol=1e-3
    )


@pytest.mark.slow
def test_script_runs_to_its_end_on_a_cpu(tmp_path):
    words = ["--device", "cpu", "--tiny", "--tests", "0", "--budget", "550", "--out", str(tmp_path)]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [ROOT / "benchmarks" / "gpu.sh", *words, "machine", "mask", "compiled"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = {row["name"]: row for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]}
    assert not [row for row in rows.values() if "error" in row]
    assert rows["mask train bf16 batch 2 detkit"]["waits"] > 0
    assert rows["mask infer tf32 batch 1 detkit"]["gflop"] == pytest.approx(
        rows["mask infer tf32 batch 1 torchvision"]["gflop"], rel=0.02
    )
    assert rows["mask graph"]["skipped"] == "needs CUDA"
    assert rows["faster infer bf16 batch 1 backbone compiled"]["compiled_ms"] > 0
    assert (tmp_path / "profiles.txt").stat().st_size > 0
