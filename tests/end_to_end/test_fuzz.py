"""Files with every kind of damage are read, or refused with one of the errors that the readers document.

Checkpoints raise CheckpointError; YAML ValueError, ConfigKeyError (an unknown key) and FileNotFoundError (a base);
annotation files ValueError and, where they name other files, FileNotFoundError; images BadImageError. Each such error is
detkit's own, with a message for users. None of the files runs anything, ends the process or takes more than seconds.
"""

import random

import pytest

from tests.end_to_end.fuzzing import KINDS, damaged, fuzz


@pytest.mark.filterwarnings("ignore")  # PIL warns of odd EXIF blocks and the like
@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_read_or_refused(name, tmp_path):
    outcomes = fuzz(KINDS[name], 100, tmp_path)
    assert outcomes.total() == 100
    assert len(outcomes) > 1, f"all of them: {outcomes}"  # some are read, some are refused


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_2000_damaged_files_are_read_or_refused(name, tmp_path, capsys):
    outcomes = fuzz(KINDS[name], 2000, tmp_path, seed=1)
    with capsys.disabled():
        print(f"\n{name}: {outcomes.total()} damaged files: {dict(outcomes)}")
    assert outcomes.total() == 2000


def test_damage_is_repeatable():
    kind = KINDS["yaml"]
    first, second = (
        [damaged(kind.seeds()[0], kind.words, random.Random(i)) for i in range(50)]
        for _ in range(2)
    )
    assert first == second
    assert len(set(first)) > 30


@pytest.mark.parametrize("name", KINDS)
def test_undamaged_seeds_are_read(name, tmp_path):
    kind = KINDS[name]
    lengths = []
    for data in kind.seeds()[:2]:  # further ones may be hostile or odd
        path = tmp_path / f"case{kind.suffix}"
        path.write_bytes(data)
        lengths.append(len(kind.read(path)))
    assert lengths
    assert min(lengths) > 0
