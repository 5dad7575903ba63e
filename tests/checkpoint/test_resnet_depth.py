import pytest

from detkit.checkpoint.resnet_depth import depth_difference


def names(prefix="", blocks=(3, 4, 6, 3), convs=3):
    return [
        f"{prefix}res{stage}.{block}.conv{conv}.weight"
        for stage, count in enumerate(blocks, start=2)
        for block in range(count)
        for conv in range(1, convs + 1)
    ]


@pytest.mark.parametrize(
    ("file", "model"),
    [
        pytest.param(names(), names(), id="same"),
        pytest.param(names(blocks=(3, 4, 23)), names(blocks=(3, 4)), id="a-stage-is-not-used"),
        pytest.param(["head.weight"], names(), id="no-resnet-in-the-file"),
        pytest.param(names(), ["head.weight"], id="no-resnet-in-the-model"),
        pytest.param([], [], id="nothing"),
    ],
)
def test_depths_that_agree_or_cannot_be_compared(file, model):
    assert depth_difference(file, model) == ""


@pytest.mark.parametrize("swap", [False, True])
def test_more_or_fewer_blocks_are_told(swap):
    sides = names("backbone."), names("backbone.", blocks=(3, 4, 23, 3))
    told = depth_difference(*(sides[::-1] if swap else sides))
    file, model = (23, 6) if swap else (6, 23)
    assert (
        told
        == f"backbone.res4 has {file} blocks of 3 convolutions in the file, {model} of 3 in the model"
    )


def test_blocks_that_found_no_place_in_the_model_are_counted():
    model = names("backbone.bottom_up.")
    deeper = names(blocks=(3, 4, 23, 3))
    placed = [
        f"backbone.bottom_up.{name}" if f"backbone.bottom_up.{name}" in model else name
        for name in deeper
    ]
    assert depth_difference(placed, model).startswith(
        "backbone.bottom_up.res4 has 23 blocks of 3 convolutions in the f"
    )


def test_resnets_of_torchvision_and_timm_are_compared_too():
    file = ["layer1.0.conv1.weight", "layer1.1.conv1.weight", "layer1.2.conv1.weight", "fc.weight"]
    placed = [f"backbone.body.{name}" for name in file[:2]]
    told = depth_difference([*placed, *file[2:]], placed)
    assert (
        told
        == "backbone.body.layer1 has 3 blocks of 1 convolutions in the file, 2 of 1 in the model"
    )


def test_other_blocks_are_told():
    assert "3 blocks of 2 convolutions in the file, 3 of 3 in the model" in depth_difference(
        names(convs=2), names()
    )
