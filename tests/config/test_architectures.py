import pytest

from detkit.config import ConfigKeyError, declare_architecture, find_architecture
from detkit.config.architectures import score_threshold_keys


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setattr("detkit.config.architectures._ARCHITECTURES", {})

    @declare_architecture(
        score_thresholds=["MODEL.RETINANET.SCORE_THRESH_TEST"], branches=["MODEL.MASK_ON"]
    )
    class Known: ...

    @declare_architecture(score_thresholds=["MODEL.CUSTOM.THRESH"])
    class Other: ...

    return Known


def test_declaration_is_found_by_name_and_by_class(table):
    assert find_architecture("Known") is find_architecture(table) is not None
    assert find_architecture("Known").branches == ("MODEL.MASK_ON",)


def test_subclass_inherits_by_class_only(table):
    class Child(table): ...

    assert find_architecture(Child) is find_architecture(table)
    assert find_architecture("Child") is None


def test_thresholds_are_those_of_the_architecture_or_all_declared_ones():
    assert score_threshold_keys("Other") == ("MODEL.CUSTOM.THRESH",)
    assert score_threshold_keys("Unknown") == ("MODEL.RETINANET.SCORE_THRESH_TEST",)


def test_unknown_key_is_refused():
    with pytest.raises(ConfigKeyError, match=r"Did you mean 'MODEL\.RETINANET\.NUM_CLASSES'"):
        declare_architecture(num_classes="MODEL.RETINANET.NUM_CLASES")


def test_key_that_is_no_branch_is_refused():
    with pytest.raises(ValueError, match=r"branches must be of MODEL\.MASK_ON, .* got SEED"):
        declare_architecture(branches=["MODEL.MASK_ON", "SEED"])
