import importlib
from types import ModuleType

import pytest

from benchmarks.detectron2_names import Name, listed_names, look_up


def test_every_listed_name_is_answered_or_has_a_reason():
    found = [look_up(module, name) for module, name in listed_names()]
    assert len(found) > 650
    assert [f"{x.module}.{x.name}" for x in found if not x.home and not x.reason] == []
    assert sum(bool(x.home) for x in found) > 600


def test_only_modules_are_answered_by_modules():
    # Not a function's module, as that of `layers.nms`.
    answers = {
        name: getattr(importlib.import_module(f"detkit.{module}"), name, None)
        for module, name in listed_names()
    }
    modules = {name for name, found in answers.items() if isinstance(found, ModuleType)}
    assert modules <= {"datasets", "detection_utils", "hooks", "samplers", "transforms"}


def test_name_of_nothing_is_neither():
    assert look_up("layers", "NoSuchLayer") == Name("layers", "NoSuchLayer", "", "")


@pytest.mark.parametrize(
    ("module", "name", "home"),
    [
        ("utils.visualizer", "Visualizer", "detkit.visualization.visualizer"),
        ("engine.train_loop", "AMPTrainer", "detkit.engine.simple_trainer"),
        ("data", "detection_utils", "detkit.data"),
    ],
)
def test_home_is_where_it_is_defined(module, name, home):
    assert look_up(module, name).home == home
