import importlib

import pytest

from detkit.utils.detectron2_names import (
    LEFT_OUT,
    LEFT_OUT_PACKAGES,
    RENAMED,
    ROOMS,
    LeftOutError,
    answer,
    answer_detectron2_names,
)


@pytest.mark.parametrize("module", sorted(ROOMS))
def test_rooms_exist_and_the_module_can_be_imported(module):
    importlib.import_module(f"detkit.{module}")
    for room in ROOMS[module]:
        importlib.import_module(f"detkit.{room}")


@pytest.mark.parametrize("name", sorted(RENAMED))
def test_renamed_names_are_found(name):
    module, _, attribute = name.rpartition(".")
    room, _, own_name = RENAMED[name].rpartition(".")
    is_foreign = room.startswith(("torch", "pycocotools"))
    room = room if is_foreign else f"detkit.{room}"
    ours = getattr(importlib.import_module(room), own_name)
    assert getattr(importlib.import_module(f"detkit.{module}"), attribute) is ours


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("data.build", "check_metadata_consistency RepeatFactorTrainingSampler"),
        ("data.datasets.builtin", "register_coco_instances _get_builtin_metadata"),
        ("data.datasets.coco", "PolygonMasks Boxes"),
        ("engine.defaults", "DetectionCheckpointer build_model JSONWriter seed_all_rng comm"),
        ("engine.hooks", "flatten_results_dict"),
        ("modeling.meta_arch.rcnn", "build_backbone detector_postprocess"),
        ("modeling.proposal_generator.rpn", "subsample_labels"),
        ("modeling.roi_heads.cascade_rcnn", "fast_rcnn_inference"),
        ("modeling.roi_heads.fast_rcnn", "batched_nms"),
        ("modeling.roi_heads.roi_heads", "ROIPooler BottleneckBlock pairwise_iou"),
    ],
)
def test_names_that_detectron2s_module_itself_imports_are_answered(module, names):
    found = importlib.import_module(f"detkit.{module}")
    for name in names.split():
        assert callable(getattr(found, name)) or name == "comm"


@pytest.mark.parametrize("name", sorted(LEFT_OUT))
def test_left_out_names_are_imported_and_fail_in_use(name):
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(f"detkit.{module}"), attribute)
    with pytest.raises(LeftOutError, match="(is|are) left out"):
        found()
    with pytest.raises(LeftOutError, match="(is|are) left out"):
        found.load if isinstance(found, type) else found()


def test_classes_derived_from_what_is_left_out_fail_when_built():
    base = importlib.import_module("detkit.tracking.base_tracker").BaseTracker

    class Mine(base):
        pass

    with pytest.raises(LeftOutError, match="detectron2.tracking is left out"):
        Mine()


@pytest.mark.parametrize("module", sorted(LEFT_OUT_PACKAGES))
def test_whatever_is_in_left_out_modules_is_imported_and_fails_in_use(module):
    found = importlib.import_module(f"detkit.{module}").some_function
    with pytest.raises(LeftOutError, match="(is|are) left out"), found({"boxes": int}):
        pass


def test_names_that_a_package_beside_left_out_modules_lacks_stay_errors():
    with pytest.raises(ModuleNotFoundError, match=r"detkit\.export\.torchscripts"):
        importlib.import_module("detkit.export.torchscripts")
    assert not hasattr(importlib.import_module("detkit.export"), "to_torchscript")


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'detkit.layers' has no attribute 'aspp2'"):
        answer("layers", "aspp2")


def test_second_call_adds_nothing():
    import sys

    before = list(sys.meta_path)
    answer_detectron2_names()
    assert sys.meta_path == before


def test_private_names_do_what_they_do_in_detectron2():
    broadcast = answer("modeling.anchor_generator", "_broadcast_params")
    assert broadcast([0, -5.0], 2, "offsets") == [[0, -5.0], [0, -5.0]]
    assert broadcast([[1], [2]], 2, "sizes") == [[1], [2]]
    with pytest.raises(AssertionError, match="offsets must be one list for all, or one for each"):
        broadcast([[1], [2]], 3, "offsets")
    assert answer("utils.visualizer", "_KEYPOINT_THRESHOLD") == 0.05
