import re

import pytest
import torch
from checkpointing import _kept_bytes, main
from torch import nn


def test_bytes_that_are_kept_are_those_of_the_outputs_and_of_what_the_backward_pass_needs():
    # Each ReLU keeps its output, which the next convolution keeps as its input; what it was made of is freed.
    net = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.ReLU()) for _ in range(3))
    )
    image = torch.rand(1, 8, 32, 32)
    assert _kept_bytes(net, image) == 3 * 4 * image.numel()
    with torch.no_grad():
        assert _kept_bytes(net, image) == 4 * image.numel()


def test_table_has_less_memory_with_checkpoints_and_the_same_gradients(capsys):
    assert main(["--depth", "18", "--rounds", "1", "--size", "128", "128", "BN"]) == 0
    (row,) = re.findall(
        r"^\| BN +\| +(\d+) +\| +(\d+) +\| +([\d.]+) +\| yes", capsys.readouterr().out, re.MULTILINE
    )
    plain, saving, time = map(float, row)
    assert 0 < saving < plain
    assert time > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["--rounds", "0"], "--rounds must be at least 1, got 0", id="rounds"),
        pytest.param(["--depth", "20"], "MODEL.RESNETS.DEPTH must be one of", id="depth"),
        pytest.param(["BatchNorm"], "NORM must be one of .*'BatchNorm'", id="norm"),
    ],
)
def test_bad_word_is_an_error(words, message, capsys):
    assert main(words) == 2
    assert re.search(message, capsys.readouterr().err)
