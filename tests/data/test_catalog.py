"""The catalogs: registering twice, unknown names, metadata."""

import copy
import functools
import importlib
import pickle
import sys

import numpy as np
import pytest

from detkit.data import DatasetCatalog, Metadata, MetadataCatalog, catalog
from detkit.utils.errors import ConfigError, UnknownNameError


def load(count):
    return [{"file_name": str(i), "image_id": i} for i in range(count)]


def loader_in_a_closure(count):
    return lambda: load(count)


def test_registered_records_come_back():
    DatasetCatalog.register("mine", lambda: load(2))
    assert [r["image_id"] for r in DatasetCatalog.get("mine")] == [0, 1]
    assert "mine" in DatasetCatalog
    assert "mine" in DatasetCatalog.list()


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda n: functools.partial(load, n), id="partial"),
        pytest.param(lambda n: functools.partial(load, count=n), id="keyword"),
        pytest.param(
            lambda n: functools.partial(functools.partial(load, n)), id="partial-of-partial"
        ),
    ],
)
def test_same_data_set_again_is_nothing_new_and_another_is_refused(make):
    DatasetCatalog.register("mine", make(2))
    DatasetCatalog.register("mine", make(2))
    assert len(DatasetCatalog.get("mine")) == 2
    with pytest.raises(
        ConfigError,
        match=r"'mine' is already registered with other contents.*DatasetCatalog.remove",
    ):
        DatasetCatalog.register("mine", make(3))


MODULE = """
from detkit.data import DatasetCatalog

def load():
    return [{"file_name": str(i), "image_id": i} for i in range(COUNT)]

DatasetCatalog.register("mine", load)
DatasetCatalog.register("short", lambda: load()[:1])
"""


def test_reloaded_module_replaces_its_data_sets(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    path = tmp_path / "users_data_sets.py"
    path.write_text(MODULE.replace("COUNT", "2"))
    module = importlib.import_module("users_data_sets")
    path.write_text(MODULE.replace("COUNT", "30"))
    importlib.reload(module)
    assert len(DatasetCatalog.get("mine")) == 30
    assert len(DatasetCatalog.get("short")) == 1


def test_two_lambdas_of_one_module_are_two_data_sets():
    DatasetCatalog.register("mine", lambda: load(2))
    with pytest.raises(ConfigError, match="already registered .*test_catalog.py"):
        DatasetCatalog.register("mine", lambda: load(3))


def test_function_of_another_name_is_another_data_set():
    def load():
        return []

    DatasetCatalog.register("mine", globals()["load"])
    with pytest.raises(ConfigError, match="already registered"):
        DatasetCatalog.register("mine", load)


def test_closures_are_the_same_only_if_they_are_one_object():
    loader = loader_in_a_closure(2)
    DatasetCatalog.register("mine", loader)
    DatasetCatalog.register("mine", loader)
    with pytest.raises(ConfigError, match="bind arguments with functools.partial"):
        DatasetCatalog.register("mine", loader_in_a_closure(3))


def test_removed_data_set_can_be_replaced():
    DatasetCatalog.register("mine", functools.partial(load, 2))
    DatasetCatalog.remove("mine")
    DatasetCatalog.register("mine", functools.partial(load, 3))
    assert len(DatasetCatalog.get("mine")) == 3


@pytest.fixture
def counted():
    """Registers `mine`; the list grows with each load."""
    loads = []
    DatasetCatalog.register("mine", lambda: [loads.append(1), load(3)][1])
    return loads


def test_kept_data_set_is_loaded_once_and_given_in_copies(counted):
    with DatasetCatalog.kept(["mine", "not_registered"]):
        for _ in range(3):
            records = DatasetCatalog.get("mine")
            assert records == load(3)
            records[0]["image_id"] = 99
            del records[1:]
        assert len(counted) == 1
    DatasetCatalog.get("mine")
    DatasetCatalog.get("mine")
    assert len(counted) == 3


def test_inner_block_keeps_what_the_outer_one_has(counted):
    with DatasetCatalog.kept(["mine"]):
        with DatasetCatalog.kept(["mine"]):
            DatasetCatalog.get("mine")
        DatasetCatalog.get("mine")
    assert len(counted) == 1


def test_kept_data_set_that_is_registered_again_is_not_loaded_again():
    loads = []
    with DatasetCatalog.kept(["mine"]):
        for _ in range(3):
            DatasetCatalog.register("mine", functools.partial(_counted, loads))
            DatasetCatalog.get("mine")
    assert loads == [1]


def _counted(loads):
    loads.append(1)
    return load(3)


def test_data_set_that_is_replaced_is_loaded_anew(counted):
    with DatasetCatalog.kept(["mine"]):
        DatasetCatalog.get("mine")
        DatasetCatalog.remove("mine")
        DatasetCatalog.register("mine", functools.partial(load, 1))
        assert len(DatasetCatalog.get("mine")) == 1


def test_data_sets_that_take_too_much_are_loaded_each_time(counted, monkeypatch):
    monkeypatch.setattr(catalog, "_MAX_KEPT", 100)
    with DatasetCatalog.kept(["mine"]):
        assert DatasetCatalog.get("mine") == DatasetCatalog.get("mine") == load(3)
    assert len(counted) == 2


def test_unknown_name_lists_near_misses_and_how_to_register():
    DatasetCatalog.register("cells_train", lambda: load(1))
    with pytest.raises(UnknownNameError) as caught:
        DatasetCatalog.get("cell_train")
    message = str(caught.value)
    assert message.startswith("data set 'cell_train' is not registered. Did you mean 'cells_train'")
    assert "Registered:" not in message
    assert "DATASETS.REGISTER" in message
    assert "register_coco_instances" in message
    with pytest.raises(KeyError, match="not registered"):
        DatasetCatalog.remove("cell_train")


def test_what_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="'mine' must be registered with a function"):
        DatasetCatalog.register("mine", [1, 2])


def test_metadata_is_kept_by_name():
    MetadataCatalog.get("mine").set(thing_classes=["a"], year=2012)
    assert MetadataCatalog.get("mine").thing_classes == ["a"]
    assert MetadataCatalog.get("mine").get("split", "none") == "none"
    assert MetadataCatalog.get("mine").as_dict() == {
        "name": "mine",
        "thing_classes": ["a"],
        "year": 2012,
    }


def test_metadata_may_be_set_again_to_the_same_only():
    metadata = MetadataCatalog.get("mine")
    metadata.thing_classes = ["a", "b"]
    metadata.thing_classes = ("a", "b")
    assert metadata.thing_classes == ["a", "b"]
    with pytest.raises(
        ValueError, match=r"'thing_classes' of data set 'mine' is already \['a', 'b'\]"
    ):
        metadata.thing_classes = ["b", "a"]
    MetadataCatalog.remove("mine")
    MetadataCatalog.get("mine").thing_classes = ["b", "a"]


def test_unknown_metadata_lists_what_there_is():
    MetadataCatalog.get("mine").set(thing_classes=["a"])
    with pytest.raises(
        AttributeError, match=r"'mine' has no metadata 'thing_clases'. Did you mean 'thing_classes'"
    ):
        _ = MetadataCatalog.get("mine").thing_clases
    assert not hasattr(MetadataCatalog.get("mine"), "json_file")


def test_lazy_metadata_is_computed_at_each_look(monkeypatch):
    monkeypatch.setenv("WHERE", "a")
    metadata = MetadataCatalog.get("mine").set_lazy(
        json_file=lambda: __import__("os").environ["WHERE"]
    )
    assert metadata.json_file == "a"
    monkeypatch.setenv("WHERE", "b")
    assert metadata.json_file == metadata.as_dict()["json_file"] == "b"


def test_attributes_of_metadata_are_copied_one_by_one_and_as_a_whole():
    given = Metadata("given").set(thing_classes=["cat"], json_file="a.json")
    given.set_lazy(image_root=str)
    renamed = Metadata(name=given.name)
    for key, value in given.__dict__.items():
        setattr(renamed, key, ["dog"] if key == "thing_classes" else value)
    assert renamed.as_dict() == {"name": "given", "thing_classes": ["dog"], "json_file": "a.json"}
    for same in (copy.copy(given), copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        assert same.as_dict() == given.as_dict()
        assert same.get("image_root") == ""


def test_metadata_needs_a_name():
    with pytest.raises(ValueError, match="empty"):
        MetadataCatalog.get("")


def test_catalogs_are_dicts_of_functions_and_metadata():
    def load():
        return []

    DatasetCatalog.register("one", load)
    metadata = MetadataCatalog.get("one").set(thing_classes=["a"])
    assert DatasetCatalog["one"] is load
    assert MetadataCatalog["one"] is metadata
    assert ("one", metadata) in list(MetadataCatalog.items())
    assert DatasetCatalog.pop("one") is load
    assert "one" not in DatasetCatalog.keys()  # noqa: SIM118
    MetadataCatalog.clear()
    assert len(MetadataCatalog) == 0


def test_metadata_without_a_name_and_with_arrays():
    metadata = Metadata().set(thing_colors=np.zeros((2, 3)))
    assert metadata.name == "N/A"
    metadata.thing_colors = np.zeros((2, 3))
    with pytest.raises(ConfigError, match="is already"):
        metadata.thing_colors = np.ones((2, 3))
