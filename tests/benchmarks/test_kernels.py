import pytest
from kernels import main


def test_row_of_a_layer_has_both_times_and_their_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    main(["128 channels", "--rounds", "1"])
    _, row = capsys.readouterr().out.splitlines()
    name, fast, plain, ratio = row.split(" | ")
    assert name == "convolution 3x3, 128 channels, 50x68"
    assert float(plain[:-3]) / float(fast[:-3]) == pytest.approx(float(ratio), abs=0.1)
