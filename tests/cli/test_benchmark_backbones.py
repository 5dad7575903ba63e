import re

import pytest

from detkit.cli.benchmark_backbones import main

# Three rounds: the median of one alone is 0 beside a reference that another process has held up.
QUICK = ["--rounds", "3", "--size", "32", "64"]


def test_table_has_parameters_and_relative_times(capsys):
    assert main([*QUICK, "resnet:18", "torchvision:mobilenet_v3_small"]) == 0
    rows = re.findall(
        r"^\| (\S+) +\| +([\d.]+) +\| +([\d.]+) +\|", capsys.readouterr().out, re.MULTILINE
    )
    # Without the classifiers of 512, 2048 and 576 -> 1024 channels; known sizes are 11.7, 25.6 and 2.5 million with them.
    assert [(name, float(millions)) for name, millions, _ in rows] == [
        ("resnet:50", 23.5),
        ("resnet:18", 11.2),
        ("torchvision:mobilenet_v3_small", 0.9),
    ]
    assert [float(time) > 0 for _, _, time in rows] == [True, True, True]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["--rounds", "0"], "--rounds must be at least 1, got 0", id="rounds"),
        pytest.param(
            ["resnet50"], "a backbone is written resnet:DEPTH, .*, got resnet50", id="no library"
        ),
        pytest.param(
            ["torchvision:resnet51"], "no classification model 'resnet51'. Did you mean", id="name"
        ),
    ],
)
def test_bad_word_is_an_error(words, message, capsys):
    assert main(words) == 2
    assert re.search(message, capsys.readouterr().err)
