import argparse
import time

import pytest
import torch

from detkit.cli.benchmark_image import add_options, image_asked_for, seconds_of


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
