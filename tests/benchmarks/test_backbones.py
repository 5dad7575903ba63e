import argparse
import re
import time

import pytest
import torch
from backbones import add_options, image_asked_for, main, seconds_of

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


def asked(*words):
    parser = argparse.ArgumentParser()
    add_options(parser, devices="cpu")
    return image_asked_for(parser.parse_args(words))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_image_and_threads_are_those_asked_for():
    image = asked("--size", "32", "64", "--threads", "3")
    assert image.shape == (1, 3, 32, 64)
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["--rounds", "0"], "--rounds must be at least 1, got 0", id="rounds"),
        pytest.param(
            ["--size", "100", "64"], "--size must be multiples of 32, got 100 64", id="size"
        ),
        pytest.param(
            ["--size", "64", "0"], "--size must be multiples of 32, got 64 0", id="nothing"
        ),
        pytest.param(["--device", "abacus"], "abacus", id="device"),
    ],
)
def test_option_out_of_range_is_an_error(words, message):
    with pytest.raises(ValueError, match=message):
        asked(*words)


def test_clock_runs_as_long_as_the_run():
    image = torch.zeros(1)
    seen = []
    assert seconds_of(lambda x: (seen.append(x), time.sleep(0.02)), image) >= 0.02
    assert seen == [image]
