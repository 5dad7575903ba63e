import errno
import logging
import re
import shutil
import sys
from pathlib import Path

import pytest

from detkit.utils.errors import ConfigError
from detkit.utils.logger import (
    FILE_ONLY,
    ONCE,
    create_small_table,
    log_every_n,
    log_every_n_seconds,
    log_first_n,
    setup_logger,
    shown_if_short,
)


def test_console_and_file_get_each_line_once(tmp_path, capsys):
    for _ in range(2):  # calling it again must not double the lines
        logger = setup_logger(str(tmp_path), name="detkit_test_a")
    logger.info("hello")
    assert capsys.readouterr().out.count("hello") == 1
    assert (tmp_path / "log.txt").read_text().count("hello") == 1


def test_other_ranks_write_their_own_file_only(tmp_path, capsys):
    setup_logger(str(tmp_path), distributed_rank=1, name="detkit_test_b").info("quiet")
    assert capsys.readouterr().out == ""
    assert "quiet" in (tmp_path / "log.txt.rank1").read_text()


def test_file_name_may_be_given(tmp_path):
    setup_logger(str(tmp_path / "sub" / "run.log"), name="detkit_test_c").warning("careful")
    assert "WARNING: careful" in (tmp_path / "sub" / "run.log").read_text()


def test_names_neither_begin_a_line_nor_act_on_a_terminal(tmp_path, capsys):
    logger = setup_logger(str(tmp_path), name="detkit_test_e")
    name = "a\n[11/26 detkit] ERROR: all is lost \x1b[2J\udcff"
    logger.info("%s: %d objects", name, 3)
    logger.info("classes:\n%s", "| cat \x1b[31m |\n| dog |")
    try:
        raise ValueError(name)
    except ValueError:
        logger.exception("no good: %s", Path(name))
    shown = capsys.readouterr().out
    for text in (shown, (tmp_path / "log.txt").read_text()):
        assert r"a\n[11/26 detkit] ERROR: all is lost \x1b[2J\udcff: 3 objects" in text
        assert "\n| dog |\n" in text
        assert "\nTraceback (most recent call last):\n" in text
        assert "\x1b" not in text


def test_message_shows_n_times(caplog):
    logging.getLogger("detkit_test_d").propagate = True
    with caplog.at_level("INFO", logger="detkit_test_d"):
        for _ in range(5):
            log_first_n(logging.INFO, "once", name="detkit_test_d")
            log_first_n(logging.INFO, "twice", n=2, key="k", name="detkit_test_d")
    assert sorted(caplog.messages) == ["once", "twice", "twice"]


def setup(tmp_path, capsys):
    """Return a logger, and a function that returns what its console and its file got."""
    logger = setup_logger(str(tmp_path), name="detkit_test_e")
    return logger, lambda: (capsys.readouterr().out, (tmp_path / "log.txt").read_text())


def test_logger_names_are_in_the_file_only(tmp_path, capsys):
    logger, read = setup(tmp_path, capsys)
    logger.info("hello")
    console, file = read()
    assert re.fullmatch(r"\[\d\d:\d\d:\d\d\] hello\n", console)
    assert "detkit_test_e] INFO: hello" in file


def test_what_is_for_the_file_is_not_on_the_console(tmp_path, capsys):
    logger, read = setup(tmp_path, capsys)
    logger.info("a long table", extra=FILE_ONLY)
    logger.info("in full", extra={"console": "in short"})
    console, file = read()
    assert console.endswith("] in short\n")
    assert console.count("\n") == 1
    assert "a long table" in file
    assert "in full" in file


def test_what_is_for_once_is_on_the_console_once_per_run(tmp_path, capsys):
    logger, read = setup(tmp_path, capsys)
    for _ in range(2):
        logger.info("800 images", extra=ONCE)
    console, file = read()
    assert console.count("800 images") == 1
    assert file.count("800 images") == 2
    setup_logger(str(tmp_path), name="detkit_test_e").info("800 images", extra=ONCE)
    assert "800 images" in read()[0]


@pytest.mark.parametrize(
    ("error", "is_shown"),
    [
        (ConfigError("no such key"), False),
        (OSError(28, "No space left", "file"), False),
        (OSError("a bug"), True),
        (ValueError("a bug"), True),
    ],
)
def test_traceback_of_a_users_mistake_is_in_the_file_only(tmp_path, capsys, error, is_shown):
    logger, read = setup(tmp_path, capsys)
    try:
        raise error
    except (ValueError, OSError):
        logger.exception("stopped")
    console, file = read()
    assert ("Traceback" in console) == is_shown
    assert "Traceback" in file


def test_long_lines_are_broken_on_a_terminal_and_tables_are_not(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    table = "| " + "x" * 150
    setup_logger(name="detkit_test_f").info("%s\n%s", "many words " * 40, table)
    *text, last = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert len(text) > 3
    assert max(map(len, text)) <= 120
    assert last == table


def test_log_that_cannot_be_written_is_told_once_in_a_line(tmp_path, capsys):
    logger = setup_logger(str(tmp_path), name="detkit_full_disk_test")
    (file,) = (h for h in logger.handlers if isinstance(h, logging.FileHandler))

    def flush():
        raise OSError(errno.ENOSPC, "No space left on device")

    file.flush = flush
    for _ in range(3):
        logger.info("hello")
    console = capsys.readouterr()
    message = f"error: {tmp_path / 'log.txt'} cannot be written: No space left on device\n"
    assert console.err == message
    assert console.out.count("hello") == 3


def test_deleted_folder_of_the_log_is_made_again(tmp_path):
    logger = setup_logger(str(tmp_path / "run"), name="detkit_deleted_log_test")
    logger.info("first")
    shutil.rmtree(tmp_path / "run")
    logger.info("second")
    assert (tmp_path / "run" / "log.txt").read_text().endswith("second\n")


def test_tables_of_many_classes_are_for_the_file():
    assert shown_if_short(30) is None
    assert shown_if_short(31) == FILE_ONLY


def test_messages_every_so_often(caplog):
    with caplog.at_level(logging.INFO, logger="detkit"):
        for _ in range(7):
            log_every_n(logging.INFO, "each third", n=3)
            log_every_n_seconds(logging.INFO, "once a minute", n=60)
    assert caplog.messages.count("each third") == 3
    assert caplog.messages.count("once a minute") == 1


def test_small_table_has_names_and_values():
    lines = create_small_table({"AP": 12.3456, "AP50": 7.0}).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == ["AP", "AP50"]
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["12.346", "7.000"]
