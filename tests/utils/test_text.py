"""Tests of detkit.utils.text."""

import pytest

from detkit.utils.text import (
    cut,
    did_you_mean,
    distinct_names,
    file_stem,
    listed,
    near_misses,
    printable,
    shortened,
)

KNOWN = ["MODEL.WEIGHTS", "MODEL.RPN.NMS_THRESH", "SOLVER.BASE_LR", "SOLVER.MAX_ITER"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("plain, größe 💥 猫 قطة", None, id="scripts"),
        pytest.param("ن\u200cن 👩\u200d👧", None, id="joiners"),
        pytest.param("wide\u3000space", None, id="space"),
        pytest.param("a\nerror: b", r"a\nerror: b", id="newline"),
        pytest.param("\x1b[2J\r\x9b31m\x7f\x00", r"\x1b[2J\r\x9b31m\x7f\x00", id="control"),
        pytest.param("a\u2028b\u2029\x85", r"a\u2028b\u2029\x85", id="separators"),
        pytest.param("gpj.\u202ea", r"gpj.\u202ea", id="direction"),
        pytest.param("\udcff.png", r"\udcff.png", id="bytes of no text"),
        pytest.param("", None, id="empty"),
    ],
)
def test_what_acts_on_a_terminal_is_written_out(text, expected):
    assert printable(text) == (text if expected is None else expected)
    printable(text).encode()


def test_kept_characters_stay():
    assert printable("a\n\tb\x1b", keep="\n") == "a\n\\tb\\x1b"


def test_no_two_names_are_equal_on_any_system():
    names = ["a.jpg", "b.jpg", "a.jpg", "A.JPG", "a_2.jpg", "a", "a", "c.tar.gz", "c.tar.gz"]
    distinct = distinct_names(names)
    assert len({name.casefold() for name in distinct}) == len(names)
    assert distinct[:4] == ["a.jpg", "b.jpg", "a_2.jpg", "A_3.JPG"]
    assert [name.rpartition(".")[2].lower() for name in distinct[:5]] == ["jpg"] * 5


def test_many_equal_names_are_numbered():
    assert distinct_names(["x"] * 3) == ["x", "x_2", "x_3"]


@pytest.mark.parametrize("name", ["coco_2017_val", "my.cells-1", "größe", "a b"])
def test_plain_names_are_their_own_stems(name):
    assert file_stem(name) == name


def test_stems_stay_in_their_folder_and_apart(tmp_path):
    names = [
        "..",
        ".",
        "../x",
        "/etc/x",
        "a/b",
        "a_b",
        "a%2Fb",
        "a\\b",
        "C:x",
        "a\nb",
        ".x",
        "a\0b",
    ]
    stems = [file_stem(name) for name in names]
    assert len(set(stems)) == len(names)
    for stem in stems:
        (tmp_path / stem).write_text("")  # a file, right here
    assert len(list(tmp_path.iterdir())) == len(names)


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


def test_long_lists_and_entries_are_cut():
    assert listed([1, 2]) == "1, 2"
    assert listed([1, 2], limit=2) == "1, 2"
    assert listed(range(12), limit=3) == "0, 1, 2, ... (12 in all)"
    assert (cut("abcd", 4), cut("abcde", 4)) == ("abcd", "a...")
    assert shortened({"id": 1}) == "{'id': 1}"
    assert len(shortened({"id": "x" * 500})) == 200
