import pytest
import torch

from detkit.utils.errors import UnknownNameError
from detkit.utils.registry import Registry, locate, qualified_name


@pytest.fixture
def registry():
    registry = Registry("BACKBONE")

    @registry.register()
    class ResNet: ...

    registry.register(ResNet)  # the same once more is no clash
    return registry


def test_registered_object_is_given(registry):
    assert registry.get("ResNet").__name__ == "ResNet"
    assert "ResNet" in registry
    assert [name for name, _ in registry] == ["ResNet"]
    assert len(registry) == 1


def test_unknown_name_lists_near_misses(registry):
    with pytest.raises(
        KeyError, match=r"'Resnet' is not registered as BACKBONE. Did you mean 'ResNet'\?.*IMPORTS"
    ):
        registry.get("Resnet")


def test_unknown_name_in_an_empty_registry():
    with pytest.raises(KeyError, match="Registered: none"):
        Registry("X").get("y")


def test_second_object_of_a_name_is_refused(registry):
    def ResNet(): ...

    with pytest.raises(KeyError, match="already has 'ResNet'"):
        registry.register(ResNet)


def test_object_that_a_notebook_takes_out_may_be_registered_anew(registry):
    def ResNet(): ...

    registry._obj_map.pop("ResNet")
    assert "ResNet" not in registry
    registry.register(ResNet)
    assert registry.get("ResNet") is ResNet


def test_decorator_gives_the_object_back():
    registry = Registry("X")

    def f(): ...

    assert registry.register()(f) is f
    assert registry.register(f) is f


def test_objects_are_found_by_their_path():
    assert locate("detkit.utils.registry.Registry") is Registry
    assert locate("detkit.utils.registry.Registry.get") is Registry.get
    assert locate(qualified_name(Registry.get)) is Registry.get
    assert locate(qualified_name(torch.optim.SGD)) is torch.optim.SGD
    for name in ("detkit.utils.registry.Nothing", "nothing", "torch.optim.sgd.Nothing"):
        with pytest.raises(UnknownNameError, match="nothing to import") as caught:
            locate(name)
        assert isinstance(caught.value, ImportError)
