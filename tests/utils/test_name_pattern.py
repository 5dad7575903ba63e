import time

import pytest

from detkit.utils import name_pattern
from detkit.utils.name_pattern import names_with

NAMES = ["backbone.res2.0.conv1.weight", "backbone.res3.0.conv1.weight", "head.bias", "über.weight"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("^backbone", NAMES[:2]),
        (r"res[23]\.\d+\.conv\d+", NAMES[:2]),  # two repetitions: in a process of its own
        (r"(?:res2|head).*(?:weight|bias)$", [NAMES[0], NAMES[2]]),
        (r"^\w+\.\w+$", NAMES[2:]),
        ("nothing.*.*", []),
    ],
)
def test_names_are_those_that_re_finds(pattern, found):
    assert names_with(pattern, NAMES) == found


@pytest.mark.parametrize("pattern", ["(", "[a", "*", "(?P<n>a)(?P<n>b)", "a{2,1}"])
def test_what_is_no_regular_expression_is_named(pattern):
    with pytest.raises(ValueError, match="is not a regular expression"):
        names_with(pattern, NAMES)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(.*a){25}b", "(a?){40}a{40}b"])
def test_search_without_end_is_ended(monkeypatch, pattern):
    monkeypatch.setattr(name_pattern, "_SECONDS", 0.5)
    start = time.perf_counter()
    with pytest.raises(ValueError, match="takes more than 0.5 s to search: write it without"):
        names_with(pattern, ["a" * 60 + "."])
    assert time.perf_counter() - start < 5
