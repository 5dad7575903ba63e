import pytest
import torch

from detkit.checkpoint.key_matching import (
    depth_difference,
    group_names,
    match_weights,
    strip_wrapper_prefixes,
    unusual_values,
)


def tensors(**shapes):
    return {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}


def test_everything_matches():
    state = tensors(a__weight=(2, 3), a__bias=(2,))
    chosen, report = match_weights(state, state)
    assert chosen == state
    assert report.is_complete
    assert report.summary() == "loaded 2/2 tensors"


def test_report_groups_what_is_reinitialised_and_left_over():
    model = tensors(
        backbone__a__weight=(1,),
        backbone__b__weight=(1,),
        head__cls__weight=(3, 2),
        head__cls__bias=(3,),
        head__box__bias=(4,),
    )
    file = tensors(
        backbone__a__weight=(1,),
        backbone__b__weight=(1,),
        head__cls__weight=(81, 2),
        mask__fcn__weight=(1,),
        mask__fcn__bias=(1,),
    )
    chosen, report = match_weights(file, model)
    assert list(chosen) == ["backbone.a.weight", "backbone.b.weight"]
    assert report.missing == ("head.cls.bias", "head.box.bias")
    assert report.mismatched == {"head.cls.weight": ((81, 2), (3, 2))}
    assert not report.is_complete
    assert report.summary() == (
        "loaded 2/5 tensors (40%); re-initialised: head.*; other shapes: head.cls.weight (81, 2) in the file, (3, 2) in the model; "
        "left over in the file: mask.*"
    )


def test_many_shapes_are_shortened():
    model = {f"m{i}": torch.zeros(1) for i in range(6)}
    _, report = match_weights({name: torch.zeros(2) for name in model}, model)
    assert report.summary().count("in the file") == 1
    assert "and 5 more" in report.summary()


def test_batch_counter_and_old_constants_count_neither_way():
    model = tensors(norm__num_batches_tracked=(), norm__weight=(1,))
    file = tensors(
        norm__weight=(1,),
        pixel_mean=(3,),
        proposal_generator__anchor_generator__cell_anchors__0=(3, 4),
    )
    _, report = match_weights(file, model)
    assert report.is_complete
    assert report.summary() == "loaded 1/1 tensors"


def test_state_that_grows_in_training_counts_neither_way_and_is_loaded():
    fresh, trained = tensors(w=(1,)), tensors(w=(1,), loss_normalizer=())
    for file, model in ((trained, fresh), (fresh, trained)):
        chosen, report = match_weights(file, model)
        assert report.is_complete
        assert report.summary() == "loaded 1/1 tensors"
        assert ("loss_normalizer" in chosen) == (file is trained)


@pytest.mark.parametrize(
    ("file", "model", "want"),
    [
        pytest.param(["module.a", "module.b"], ["a", "b"], ["a", "b"], id="data-parallel"),
        pytest.param(["module._orig_mod.a"], ["a"], ["a"], id="two-wrappers"),
        pytest.param(["module.a", "b"], ["a", "b"], ["module.a", "b"], id="not-all"),
        pytest.param(["module.a"], ["module.a"], ["module.a"], id="the-models-own-name"),
        pytest.param(
            ["module.module.a"], ["module.a"], ["module.module.a"], id="own-name-wrapped-is-left"
        ),
        pytest.param([], ["a"], [], id="nothing"),
    ],
)
def test_wrapper_prefixes_are_stripped(file, model, want):
    assert list(strip_wrapper_prefixes(file, model).values()) == want


@pytest.mark.parametrize(
    ("names", "universe", "want"),
    [
        pytest.param([], ["a.w"], [], id="none"),
        pytest.param(["a.w"], ["a.w", "b.w"], ["a.*"], id="one-module"),
        pytest.param(["a.w"], ["a.w", "a.b"], ["a.w"], id="part-of-a-module"),
        pytest.param(
            ["a.b.w", "a.b.v", "a.c.w"],
            ["a.b.w", "a.b.v", "a.c.w", "x"],
            ["a.*"],
            id="outermost-module",
        ),
        pytest.param(
            ["a.b.w", "a.b.v"], ["a.b.w", "a.b.v", "a.c.w", "x"], ["a.b.*"], id="inner-module"
        ),
        pytest.param(["a", "b"], ["a", "b"], ["*"], id="all"),
    ],
)
def test_names_are_grouped(names, universe, want):
    assert group_names(names, universe) == want


# --- depth of ResNets ---


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


def test_report_of_a_large_file_is_short_and_its_details_are_complete():
    names = [f"{part}.layer{i}.weight" for part in ("body", "head") for i in range(200)]
    model = {name: torch.zeros(1) for name in names}
    in_file = {
        name: torch.zeros(1) for name in names if not name.endswith(("5.weight", "7.weight"))
    }
    in_file |= {f"old{i}.weight": torch.zeros(1) for i in range(500)}
    report = match_weights(in_file, model)[1]
    assert report.summary().startswith(
        "loaded 320/400 tensors (80%); re-initialised: body.layer5.*"
    )
    assert "and 74 more" in report.summary()
    assert len(report.summary()) < 500
    assert "body.layer5  loaded 0/1 (0%)" in report.details()
    assert "missing: head.layer197.weight" in report.details()
    assert "left over in the file: old499.weight" in report.details()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.full((4,), float("nan")), "w has 4 of 4 values that are NaN or infinite"),
        (torch.tensor([1.0, float("inf"), 0, 0]), "w has 1 of 4 values"),
        (torch.full((4,), 1e300, dtype=torch.float64), "w has values up to 1.0e+300"),
        (torch.full((4,), -1e20), "w has values up to 1.0e+20"),
        (torch.ones(4, dtype=torch.bool), "w is of type bool"),
        (torch.ones(4, dtype=torch.complex64), "w is of type complex64"),
        (torch.ones(4, dtype=torch.int8), "w is of type int8"),
    ],
)
def test_values_of_no_trained_model_are_named(value, said):
    (found,) = unusual_values(
        {"w": value, "n": torch.tensor(3)}, {"w": torch.zeros(4), "n": torch.tensor(0)}
    )
    assert said in found


@pytest.mark.parametrize(
    "value", [torch.zeros(4), torch.tensor([1e5, -1e5]), torch.zeros(0), torch.ones(2).half()]
)
def test_usual_values_are_not_named(value):
    assert unusual_values({"w": value}, {"w": torch.zeros(value.shape)}) == []
