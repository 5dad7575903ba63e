import logging
import os
import pickle

import numpy as np
import pytest
import torch
from iopath.common import file_io as iopath
from torch import nn
from torch.nn.parallel import DataParallel

from detkit.checkpoint import (
    CheckpointError,
    DetectionCheckpointer,
    HasInitialWeights,
    save_checkpoint_file,
)
from detkit.checkpoint.detection_checkpoint import (
    IncompatibleKeys,
    align_and_update_state_dicts,
)
from detkit.utils.file_io import DownloadHandler, PathManager


class Net(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.ModuleDict({"cls": nn.Linear(4, num_classes), "box": nn.Linear(4, 4)})


class Counter:
    """A checkpointable."""

    def __init__(self, n=0):
        self.n = n

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state):
        self.n = state["n"]


def same_weights(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def saved(tmp_path, model=None, name="m", **extra):
    DetectionCheckpointer(model or Net(), str(tmp_path)).save(name, **extra)
    return str(tmp_path / f"{name}.pth")


def test_saved_model_and_states_come_back(tmp_path):
    model, other, counter = Net(), Net(), Counter()
    writer = DetectionCheckpointer(
        model, str(tmp_path), metadata={"thing_classes": ["a", "b"]}, counter=Counter(7)
    )
    writer.save("model_0", iteration=4)
    rest = DetectionCheckpointer(other, counter=counter).load(str(tmp_path / "model_0.pth"))
    assert same_weights(model, other)
    assert counter.n == 7
    assert rest == {"iteration": 4, "metadata": {"thing_classes": ["a", "b"]}}


def test_empty_list_of_checkpointables_loads_weights_alone(tmp_path):
    DetectionCheckpointer(Net(), str(tmp_path), counter=Counter(7)).save("m")
    counter = Counter()
    DetectionCheckpointer(Net(), counter=counter).load(str(tmp_path / "m.pth"), checkpointables=[])
    assert counter.n == 0


def test_state_missing_from_the_file_is_named(tmp_path, caplog):
    path = saved(tmp_path)
    with caplog.at_level(logging.WARNING, logger="detkit"):
        DetectionCheckpointer(Net(), counter=Counter()).load(path)
    assert "has no state of 'counter'" in caplog.text


def test_wrappers_are_neither_saved_nor_needed(tmp_path):
    model = Net()
    path = saved(tmp_path, DataParallel(model))
    assert not any(name.startswith("module.") for name in torch.load(path)["model"])
    other = Net()
    DetectionCheckpointer(DataParallel(other)).load(path)
    assert same_weights(model, other)


def test_weights_saved_with_a_wrapper_load(tmp_path):
    model, other = Net(), Net()
    torch.save(DataParallel(model).state_dict(), tmp_path / "w.pth")
    DetectionCheckpointer(other).load(str(tmp_path / "w.pth"), strict=True)
    assert same_weights(model, other)


def test_zoo_pickle_fills_the_model(tmp_path):
    model, other = Net(), Net()
    weights = {n: t.numpy() for n, t in model.state_dict().items() if "num_batches" not in n}
    (tmp_path / "w.pkl").write_bytes(
        pickle.dumps({"model": weights, "__author__": "Detectron2"}, 2)
    )
    checkpointer = DetectionCheckpointer(other)
    assert checkpointer.load(str(tmp_path / "w.pkl"), strict=True) == {"__author__": "Detectron2"}
    assert same_weights(model, other)
    assert checkpointer.load_report.is_complete


def test_fine_tuning_on_other_classes_reports_what_starts_afresh(tmp_path, caplog):
    model, other = Net(num_classes=80), Net(num_classes=2)
    before = other.head["cls"].weight.clone()
    checkpointer = DetectionCheckpointer(other)
    with caplog.at_level(logging.WARNING, logger="detkit"):
        checkpointer.load(saved(tmp_path, model))
    assert "loaded 9/11 tensors (81%); re-initialised: head.cls.*" in caplog.text
    assert "head.cls.weight (80, 4) in the file, (2, 4) in the model" in caplog.text
    assert torch.equal(other.head["cls"].weight, before)
    assert torch.equal(other.head["box"].weight, model.head["box"].weight)


def test_strict_load_refuses_a_partial_match_and_changes_nothing(tmp_path):
    path, other = saved(tmp_path, Net(num_classes=80)), Net(num_classes=2)
    before = [t.clone() for t in other.state_dict().values()]
    with pytest.raises(
        CheckpointError,
        match=r"m\.pth does not fill the model: loaded 9/11.*head\.cls\.\*.*--allow-partial",
    ):
        DetectionCheckpointer(other).load(path, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(before, other.state_dict().values(), strict=True))


def test_strict_load_accepts_what_is_left_over(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2))
    larger = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    checkpointer = DetectionCheckpointer(model)
    checkpointer.load(saved(tmp_path, larger), strict=True)
    assert "left over in the file: 1.*" in checkpointer.load_report.summary()


class RenamesOldTensors(nn.Linear):
    """Takes what files without a version call `kernel`, as users' modules of several versions do."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, metadata, *args):
        if metadata.get("version") is None and f"{prefix}kernel" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}kernel")
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)


@pytest.mark.parametrize("strict", [False, True])
def test_modules_that_rename_old_tensors_get_what_is_left_over(tmp_path, strict, caplog):
    model = nn.Sequential(RenamesOldTensors(2, 2), nn.Linear(2, 1))
    weights = {name: value + 1 for name, value in model.state_dict().items()}
    old = {name.replace("0.weight", "0.kernel"): value for name, value in weights.items()}
    torch.save({**old, "0.mystery": torch.zeros(1)}, tmp_path / "old.pth")
    checkpointer = DetectionCheckpointer(model)
    with caplog.at_level(logging.INFO, logger="detkit"):
        checkpointer.load(str(tmp_path / "old.pth"), strict=strict)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert checkpointer.load_report.is_complete
    assert checkpointer.load_report.unexpected == ("0.mystery",)
    assert "loaded 4/4 tensors; left over in the file: 0.mystery" in caplog.text


def test_strict_load_changes_nothing_if_left_overs_do_not_fill_the_model(tmp_path):
    model = nn.Sequential(RenamesOldTensors(2, 2), nn.Linear(2, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    old = {"0.kernel": torch.ones(2, 2), "0.bias": torch.ones(2), "1.weight": torch.ones(1, 2)}
    torch.save(old, tmp_path / "old.pth")
    with pytest.raises(CheckpointError, match=r"loaded 3/4.*re-initialised: 1\.bias\."):
        DetectionCheckpointer(model).load(str(tmp_path / "old.pth"), strict=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("strict", [False, True])
def test_tensor_that_a_module_renames_away_was_not_loaded(tmp_path, strict):
    class Prefixes(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            state_dict[f"{prefix}inner.bias"] = state_dict.pop(f"{prefix}bias")
            super()._load_from_state_dict(state_dict, prefix, *args)

    model = Prefixes(2, 2)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pth")
    checkpointer = DetectionCheckpointer(model)
    if strict:
        with pytest.raises(CheckpointError, match="does not fill the model: loaded 1/2"):
            checkpointer.load(str(tmp_path / "w.pth"), strict=True)
    else:
        checkpointer.load(str(tmp_path / "w.pth"))
        assert checkpointer.load_report.missing == ("bias",)


def test_averaged_weights_have_the_versions_of_their_modules(tmp_path):
    model = nn.Sequential(RenamesOldTensors(2, 2))
    average = {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2), "0.kernel": torch.zeros(2, 2)}
    DetectionCheckpointer(model, str(tmp_path)).save("w", ema={"weights": average})
    DetectionCheckpointer(model).load(str(tmp_path / "w.pth"), averaged=True)
    # Of version 2, so a `kernel` is not taken for the weight.
    assert torch.equal(model[0].weight, torch.ones(2, 2))


def test_subclasses_find_the_logger_of_detectron2s_checkpointer():
    assert DetectionCheckpointer(nn.Linear(1, 1)).logger.name.startswith("detkit")


def test_weights_of_another_model_are_an_error(tmp_path):
    path = saved(tmp_path, nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(
        CheckpointError,
        match=r"another model: none of its 2 names.*In the file: 0\.weight.*backbone\.0\.weight",
    ):
        DetectionCheckpointer(Net()).load(path)


def test_same_names_with_other_shapes_everywhere_are_an_error(tmp_path):
    path = saved(tmp_path, nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="another model: no tensor has the model's shape"):
        DetectionCheckpointer(nn.Linear(3, 3)).load(path)


def test_foreign_weights_of_another_model_are_an_error_that_names_their_layout(tmp_path):
    weights = {
        name: np.ones(1, np.float32) for name in ("conv1_w", "res_conv1_bn_s", "res2_0_branch2a_w")
    }
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(weights))
    with pytest.raises(
        CheckpointError, match=r"R-50\.pkl holds weights of another model.*the layout of Caffe2"
    ):
        DetectionCheckpointer(Net()).load(str(tmp_path / "R-50.pkl"))


@pytest.mark.parametrize("as_manager", [False, True])
def test_handlers_of_its_path_manager_open_addresses(as_manager, tmp_path):
    class Handler(iopath.PathHandler):
        def _get_supported_prefixes(self):
            return ["mine://"]

        def _get_local_path(self, path, force=False, **kwargs):
            return path.replace("mine://", f"{tmp_path}/")

    model = nn.Linear(2, 1)
    DetectionCheckpointer(model, str(tmp_path)).save("saved")
    checkpointer = DetectionCheckpointer(nn.Linear(2, 1))
    if as_manager:
        manager = iopath.PathManager()
        manager.register_handler(Handler())
        manager.register_handler(iopath.HTTPURLHandler())
        checkpointer.path_manager = manager
        assert isinstance(PathManager._path_handlers["https://"], DownloadHandler)
    else:
        checkpointer.path_manager.register_handler(Handler(), allow_override=True)
    checkpointer.load("mine://saved.pth")
    assert torch.equal(checkpointer.model.weight, model.weight)


def test_no_path_starts_from_random_weights():
    assert DetectionCheckpointer(Net()).load("") == {}


def test_no_path_is_an_error_when_strict():
    with pytest.raises(ValueError, match=r"set MODEL\.WEIGHTS"):
        DetectionCheckpointer(Net()).load("", strict=True)


def test_resume_takes_the_last_checkpoint_with_all_states(tmp_path):
    writer = DetectionCheckpointer(Net(), str(tmp_path), counter=Counter(1))
    writer.save("model_1", iteration=1)
    writer.checkpointables["counter"].n = 2
    writer.save("model_2", iteration=2)
    counter = Counter()
    reader = DetectionCheckpointer(Net(), str(tmp_path), counter=counter)
    assert reader.get_checkpoint_file() == str(tmp_path / "model_2.pth")
    assert reader.resume_or_load("unused.pth", resume=True)["iteration"] == 2
    assert counter.n == 2


@pytest.mark.parametrize("resume", [True, False])
def test_without_resume_or_last_checkpoint_the_weights_alone_are_loaded(tmp_path, resume):
    DetectionCheckpointer(Net(), str(tmp_path / "a"), counter=Counter(1)).save("m", iteration=9)
    counter = Counter()
    if not resume:
        DetectionCheckpointer(Net(), str(tmp_path / "b")).save("other")
    reader = DetectionCheckpointer(Net(), str(tmp_path / "b"), counter=counter)
    reader.resume_or_load(str(tmp_path / "a" / "m.pth"), resume=resume)
    assert counter.n == 0


def test_a_runs_own_checkpoint_must_fit(tmp_path):
    DetectionCheckpointer(Net(3), str(tmp_path)).save("m")
    with pytest.raises(CheckpointError, match="does not fill the model"):
        DetectionCheckpointer(Net(4), str(tmp_path)).resume_or_load("", resume=True)


def test_last_checkpoint_that_is_gone_is_named(tmp_path):
    os.remove(saved(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"m\.pth"):
        DetectionCheckpointer(Net(), str(tmp_path)).resume_or_load("", resume=True)


def test_half_written_checkpoint_is_never_the_last(tmp_path, monkeypatch):
    checkpointer = DetectionCheckpointer(Net(), str(tmp_path))
    checkpointer.save("good")
    write = torch.save

    def crash(content, file):
        write({}, file)
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        checkpointer.save("bad")
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "good.pth")
    assert sorted(os.listdir(tmp_path)) == ["good.pth", "last_checkpoint"]


def test_folder_without_checkpoints(tmp_path):
    checkpointer = DetectionCheckpointer(Net(), str(tmp_path / "none"))
    assert not checkpointer.has_checkpoint()
    assert checkpointer.get_checkpoint_file() == ""
    assert checkpointer.get_all_checkpoint_files() == []


def test_process_that_does_not_write_still_collects_states(tmp_path):
    asked = []
    counter = Counter()
    counter.state_dict = lambda: asked.append(1) or {}
    DetectionCheckpointer(Net(), str(tmp_path), save_to_disk=False, counter=counter).save("m")
    assert asked == [1]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("key", ["model", "metadata", "counter"])
def test_taken_name_is_an_error(key):
    checkpointer = DetectionCheckpointer(Net(), counter=Counter())
    with pytest.raises(KeyError, match=f"already have an entry '{key}'"):
        checkpointer.add_checkpointable(key, Counter())


def test_object_without_state_is_an_error():
    with pytest.raises(TypeError, match="x=int has no state_dict"):
        DetectionCheckpointer(Net(), x=3)


def test_checkpoint_that_is_not_tagged_is_not_resumed_from(tmp_path):
    checkpointer = DetectionCheckpointer(Net(), str(tmp_path))
    checkpointer.save("last")
    checkpointer.save("best", tag_last=False)
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "last.pth")
    assert (tmp_path / "best.pth").exists()


# --- published weights of parts ---


class Part(nn.Module):
    """Has ones to start from, under a name; an empty name stands for random weights."""

    def __init__(self, source="the ones"):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.source = source
        self.times = 0

    def load_initial_weights(self):
        self.times += 1
        if self.source:
            self.weight.data.fill_(1)
        return self.source


def _model(source="the ones"):
    return nn.ModuleDict({"backbone": Part(source), "head": nn.Linear(2, 2)})


def _save(model, path, keep=""):
    state = {name: value for name, value in model.state_dict().items() if name.startswith(keep)}
    save_checkpoint_file({"model": state}, str(path))
    return str(path)


def test_part_is_recognised():
    assert isinstance(Part(), HasInitialWeights)
    assert not isinstance(nn.Linear(1, 1), HasInitialWeights)


@pytest.mark.parametrize(
    ("source", "said"), [("the ones", "except backbone"), ("", "the model starts from random")]
)
def test_run_without_checkpoint_starts_from_them(source, said, caplog):
    model = _model(source)
    with caplog.at_level(logging.INFO, logger="detkit"):
        DetectionCheckpointer(model).resume_or_load("")
    assert model["backbone"].weight.tolist() == ([1, 1] if source else [0, 0])
    assert said in caplog.text
    assert ("backbone starts from the ones" in caplog.text) is bool(source)


def test_checkpoint_that_fills_the_part_fetches_nothing(tmp_path):
    path = _save(_model(), tmp_path / "all.pth")
    model = _model()
    DetectionCheckpointer(model).load(path, strict=True)
    assert (model["backbone"].times, model["backbone"].weight.tolist()) == (0, [0, 0])


def test_checkpoint_of_a_part_alone_is_not_overwritten(tmp_path):
    path, part = _save(Part(), tmp_path / "part.pth"), Part()
    DetectionCheckpointer(part).load(path, strict=True)
    assert (part.times, part.weight.tolist()) == (0, [0, 0])


def test_resumed_run_fetches_nothing(tmp_path):
    DetectionCheckpointer(_model(), str(tmp_path)).save("last")
    model = _model()
    DetectionCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)
    assert model["backbone"].times == 0


def test_checkpoint_of_other_parts_leaves_the_part_to_them(tmp_path):
    path = _save(_model(), tmp_path / "head.pth", keep="head")
    model = _model()
    DetectionCheckpointer(model).load(path)
    assert model["backbone"].weight.tolist() == [1, 1]


def test_strict_load_of_a_partial_checkpoint_fetches_nothing(tmp_path):
    path = _save(_model(), tmp_path / "head.pth", keep="head")
    model = _model()
    with pytest.raises(CheckpointError, match="does not fill the model"):
        DetectionCheckpointer(model).load(path, strict=True)
    assert model["backbone"].times == 0


def test_metadata_of_odd_types_does_not_cost_the_checkpoint(tmp_path, caplog):
    metadata = {
        "thing_classes": ("a", "b"),
        "colours": {"a", "b"},
        "draw": print,
        "size": np.int64(3),
    }
    checkpointer = DetectionCheckpointer(nn.Linear(2, 1), str(tmp_path), metadata=metadata)
    checkpointer.save("model")
    assert "metadata['draw'] is a builtins.builtin_function_or_method" in caplog.text
    got = checkpointer.load(str(tmp_path / "model.pth"))["metadata"]
    assert got == {"thing_classes": ("a", "b"), "colours": {"a", "b"}, "size": 3}


def test_weights_that_are_not_numbers_are_said(tmp_path, caplog):
    torch.save(
        {"weight": torch.full((1, 2), float("nan")), "bias": torch.ones(1)}, tmp_path / "w.pth"
    )
    DetectionCheckpointer(nn.Linear(2, 1)).load(str(tmp_path / "w.pth"))
    assert "w.pth holds values that no trained model has: weight has 2 of 2 values" in caplog.text


@pytest.mark.parametrize("ema", [[1], {"weights": None}, {}, None])
def test_averaged_weights_of_another_type_are_named(tmp_path, ema):
    torch.save({"model": nn.Linear(2, 1).state_dict(), "ema": ema}, tmp_path / "w.pth")
    checkpointer = DetectionCheckpointer(nn.Linear(2, 1))
    with pytest.raises(CheckpointError, match=r"w\.pth has no averaged weights"):
        checkpointer.load(str(tmp_path / "w.pth"), averaged=True)


def test_averaged_weights_that_are_no_tensors_are_named(tmp_path):
    ema = {"weights": {"weight": "x"}}
    torch.save({"model": nn.Linear(2, 1).state_dict(), "ema": ema}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="'weight' is a str, not a tensor"):
        DetectionCheckpointer(nn.Linear(2, 1)).load(str(tmp_path / "w.pth"), averaged=True)


def test_ends_of_names_match_where_that_is_asked_for(tmp_path):
    part = nn.Linear(2, 1)
    torch.save({"model": {"head.weight": part.weight, "head.bias": part.bias}}, tmp_path / "w.pth")
    model = nn.ModuleDict({"roi": nn.ModuleDict({"head": nn.Linear(2, 1)})})
    DetectionCheckpointer(model).load(f"{tmp_path / 'w.pth'}?matching_heuristics=True")
    assert torch.equal(model["roi"]["head"].weight, part.weight)
    for wrapped in (model, nn.DataParallel(model)):
        state = wrapped.state_dict()
        aligned = align_and_update_state_dicts(state, {"head.weight": part.weight + 1})
        assert set(aligned) == {name for name in state if name.endswith("weight")}
        assert torch.equal(*aligned.values(), part.weight + 1)


def test_odd_flags_and_metadata_of_a_file_are_not_used(tmp_path):
    odd = {"matching_heuristics": torch.zeros(3), "metadata": {"thing_classes": torch.zeros(2)}}
    torch.save({"model": nn.Linear(2, 1).state_dict(), **odd}, tmp_path / "w.pth")
    got = DetectionCheckpointer(nn.Linear(2, 1)).load(str(tmp_path / "w.pth"))
    assert got["metadata"] == {}


def test_overridden_way_to_load_a_model_gets_the_checkpoint(tmp_path):
    first = nn.Linear(2, 1)
    DetectionCheckpointer(first, str(tmp_path)).save("weights", iteration=3)
    teacher = nn.Linear(2, 1)

    class Own(DetectionCheckpointer):
        def _load_model(self, checkpoint):
            teacher.load_state_dict(checkpoint["model"])
            incompatible = super()._load_model(checkpoint)
            assert incompatible.missing_keys == []
            return incompatible

    model = nn.Linear(2, 1)
    assert Own(model).load(str(tmp_path / "weights.pth"))["iteration"] == 3
    assert torch.equal(teacher.weight, first.weight)
    assert torch.equal(model.weight, first.weight)


def test_subclasses_that_read_arrays_and_load_into_several_models(caplog):
    both = nn.ModuleDict({"teacher": nn.Linear(2, 1), "student": nn.Linear(2, 1)})

    class Own(DetectionCheckpointer):
        def _load_file(self, path):
            return {"model": {"weight": np.ones((1, 2), np.float32)}}

    class OfStudent(Own):
        def _load_model(self, checkpoint):
            weights = checkpoint["model"]
            self._convert_ndarray_to_tensor(weights)
            found = self.model.load_state_dict(
                {f"student.{name}": value for name, value in weights.items()}, strict=False
            )
            return IncompatibleKeys(found.missing_keys, found.unexpected_keys, [])

    with caplog.at_level("WARNING"):
        OfStudent(both).load("any")
    assert both["student"].weight.tolist() == [[1, 1]]
    assert "missing keys: teacher.weight, teacher.bias, student.bias" in caplog.text
    model = nn.Linear(2, 1)
    Own(model).load("any")
    assert model.weight.tolist() == [[1, 1]]
