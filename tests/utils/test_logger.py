import logging
from pathlib import Path

from detkit.utils.logger import log_first_n, setup_logger


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
