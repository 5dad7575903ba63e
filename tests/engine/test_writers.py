import csv
import importlib
import sys
from pathlib import Path

import pytest

from detkit.engine import DefaultTrainer
from detkit.engine.writers import CSVWriter, build_writers
from detkit.utils.events import CommonMetricPrinter, EventStorage, JSONWriter, TensorboardXWriter


def rows(path):
    with Path(path).open(newline="") as file:
        return list(csv.reader(file))


def written(writer, iterations, name="a"):
    with EventStorage(0) as storage:
        for storage.iter in iterations:
            storage.put_scalar(name, 0.5 * storage.iter, smoothing_hint=False)
            writer.write()
    writer.close()


def test_each_new_scalar_is_a_row(tmp_path):
    writer = CSVWriter(str(tmp_path / "new" / "m.csv"))
    with EventStorage(0) as storage:
        storage.put_scalars(b=1.0, a=2.0)
        writer.write()
        writer.write()
        storage.step()
        storage.put_scalar("x,y", float("nan"))
        writer.write()
    writer.close()
    expected = [
        ["iteration", "name", "value"],
        ["0", "a", "2.0"],
        ["0", "b", "1.0"],
        ["1", "x,y", "nan"],
    ]
    assert rows(tmp_path / "new" / "m.csv") == expected


def test_resumed_writer_drops_what_came_after_its_checkpoint(tmp_path):
    path = tmp_path / "m.csv"
    first = CSVWriter(str(path))
    written(first, [0, 1], name="a,b")
    state = first.state_dict()
    written(CSVWriter(str(path)), [2, 3])  # after the checkpoint, before the kill
    path.write_text(path.read_text() + "4,a")  # torn
    again = CSVWriter(str(path))
    again.load_state_dict(state)
    written(again, [2, 3, 4])
    assert [row[0] for row in rows(path)] == ["iteration", "0", "1", "2", "3", "4"]


def test_names_give_writers_in_their_order(tmp_path):
    writers = build_writers(["tensorboard", "csv", "json", "console"], str(tmp_path / "out"), 10)
    assert [type(writer) for writer in writers] == [
        TensorboardXWriter,
        CSVWriter,
        JSONWriter,
        CommonMetricPrinter,
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["jsno"],
            "WRITERS must be of console, json, csv, tensorboard, wandb, mlflow; got 'jsno'. Did you mean 'json'",
        ),
        (["csv"] * 2, "twice"),
    ],
)
def test_bad_names_are_errors(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        build_writers(names, str(tmp_path))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_package_that_is_missing_is_an_error_with_the_command(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, name, raising=False)
    for _ in range(2):
        with pytest.raises(
            ImportError,
            match=rf"WRITERS names {name}, which is not installed: pip install {name}$",
        ):
            build_writers([name], str(tmp_path))
        # What the package leaves in the folder where it was used.
        (tmp_path / name).mkdir(exist_ok=True)
        importlib.invalidate_caches()


def test_key_selects_the_files_of_a_run_and_a_resume_repeats_no_row(tiny_cfg):
    tiny_cfg.DATASETS.TEST, tiny_cfg.WRITERS = (), ["csv"]
    DefaultTrainer(tiny_cfg).train()
    folder = Path(tiny_cfg.OUTPUT_DIR)
    assert not (folder / "metrics.json").exists()
    whole = {tuple(row[:2]) for row in rows(folder / "metrics.csv")}
    (folder / "last_checkpoint").write_text("model_0000002.pth")
    again = DefaultTrainer(tiny_cfg)
    again.resume_or_load(resume=True)
    again.train()
    found = [tuple(row[:2]) for row in rows(folder / "metrics.csv")]
    assert len(found) == len(set(found))
    assert set(found) == whole - {
        ("5", "time")
    }  # the clock leaves out the first steps after a start


def test_name_with_a_line_break_stays_in_its_row(tmp_path):
    writer = CSVWriter(str(tmp_path / "m.csv"))
    with EventStorage(3) as storage:
        storage.put_scalar('bbox/AP-a,"b\n9,\x1b[31mc\ud800', 1.0)
        writer.write()
    writer.close()
    _, row = csv.reader((tmp_path / "m.csv").read_text().splitlines())
    assert row == ["3", r'bbox/AP-a,"b\n9,\x1b[31mc\ud800', "1.0"]


@pytest.mark.parametrize(
    "damage",
    [b"\xff,a,1\n", "²,a,1\n".encode(), b"\0" * 50, b'2,"' + b"a" * 200000 + b'",1\n', b"2,a"],
)
def test_damaged_rows_are_dropped_when_a_run_goes_on(tmp_path, damage):
    path = tmp_path / "metrics.csv"
    good = b"iteration,name,value\n1,a,2\n"
    path.write_bytes(good + damage)
    CSVWriter(str(path)).load_state_dict({"last_write": 5})
    assert path.read_bytes() == good
