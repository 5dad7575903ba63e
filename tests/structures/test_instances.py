import copy
import json
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from detkit.structures import Boxes, Instances, RotatedBoxes, bitmask_to_rle, rle_to_bitmask
from tests.helpers import random_boxes


def _instances(count: int = 3) -> Instances:
    instances = Instances((48, 64))
    instances.pred_boxes = Boxes(random_boxes(count))
    instances.scores = torch.arange(count) / 10
    instances.names = [f"object {i}" for i in range(count)]
    return instances


def test_fields_are_attributes():
    instances = _instances()
    assert instances.image_size == (48, 64)
    assert len(instances) == 3
    assert instances.has("scores")
    assert not instances.has("gt_classes")
    assert instances.get("scores") is instances.scores
    assert list(instances.get_fields()) == ["pred_boxes", "scores", "names"]
    instances.remove("names")
    assert not instances.has("names")


def test_fields_can_be_given_at_the_start():
    instances = Instances((4, 4), scores=torch.zeros(2), names=["a", "b"])
    assert len(instances) == 2


def test_only_field_may_be_replaced_by_one_of_the_same_length():
    instances = Instances((4, 4), scores=torch.zeros(2))
    instances.scores = torch.ones(2)
    assert instances.scores.tolist() == [1, 1]


def test_field_of_another_length_is_an_error():
    with pytest.raises(
        ValueError, match="field 'gt_classes' needs one value per instance: got 2 for 3 instances"
    ):
        _instances().gt_classes = torch.zeros(2)


@pytest.mark.parametrize(
    "use", [lambda i: i.score, lambda i: i.get("score"), lambda i: i.remove("score")]
)
def test_unknown_field_is_an_error_with_near_misses(use):
    with pytest.raises(AttributeError, match="no field 'score', only .*Did you mean 'scores'"):
        use(_instances())


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        pytest.param(0, [0], id="int"),
        pytest.param(-1, [2], id="last"),
        pytest.param(slice(None, 2), [0, 1], id="slice"),
        pytest.param(torch.tensor([True, False, True]), [0, 2], id="mask"),
        pytest.param(torch.tensor([2, 0]), [2, 0], id="indices"),
        pytest.param([1, 1], [1, 1], id="list"),
        pytest.param(torch.zeros(3, dtype=torch.bool), [], id="nothing"),
    ],
)
def test_indexing_selects_in_every_field(item, expected):
    instances = _instances()
    selected = instances[item]
    assert selected.image_size == (48, 64)
    assert torch.equal(selected.pred_boxes.tensor, instances.pred_boxes.tensor[expected])
    assert torch.equal(selected.scores, instances.scores[expected])
    assert selected.names == [instances.names[i] for i in expected]
    assert len(instances) == 3


@pytest.mark.parametrize("item", [3, -4])
def test_index_beyond_the_instances_is_an_error(item):
    with pytest.raises(IndexError, match=f"instance {item} of 3"):
        _instances()[item]


def test_iteration_is_an_error_that_says_what_to_do():
    with pytest.raises(NotImplementedError, match=r"not iterable: use instances\[i\]"):
        iter(_instances())


def test_length_without_fields_is_an_error():
    with pytest.raises(NotImplementedError, match="without a field have no length"):
        len(Instances((4, 4)))


def test_to_moves_the_fields_that_can_be_moved():
    moved = _instances().to("meta")
    assert moved.pred_boxes.device.type == "meta"
    assert moved.scores.device.type == "meta"
    assert moved.names == ["object 0", "object 1", "object 2"]


def test_fields_whose_to_takes_a_device_alone_are_moved():
    class Own(list):
        def to(self, device):
            return Own([str(device)])

    moved = Instances((4, 4), own=Own([1])).to(torch.device("meta"), non_blocking=True)
    assert moved.own == ["meta"]


def test_cat_joins_what_indexing_split():
    instances = _instances()
    joined = Instances.cat([instances[:1], instances[1:1], instances[1:]])
    assert torch.equal(joined.pred_boxes.tensor, instances.pred_boxes.tensor)
    assert torch.equal(joined.scores, instances.scores)
    assert joined.names == instances.names


def test_cat_of_one_is_itself():
    instances = _instances()
    assert Instances.cat([instances]) is instances


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        pytest.param(lambda i: [], ValueError, "at least one", id="none"),
        pytest.param(
            lambda i: [i, Instances((1, 1))],
            ValueError,
            r"\(48, 64\) and item 1 \(1, 1\)",
            id="other size",
        ),
        pytest.param(
            lambda i: [i, Instances((48, 64))],
            ValueError,
            r"the same fields.* item 1 \[\]",
            id="other fields",
        ),
        pytest.param(lambda i: [i, "x"], TypeError, "item 1 is str", id="no instances"),
        pytest.param(
            lambda i: [Instances((4, 4), a="ab")] * 2, ValueError, "field 'a' is str", id="no cat"
        ),
    ],
)
def test_cat_of_what_does_not_go_together_is_an_error(make, error, message):
    with pytest.raises(error, match=message):
        Instances.cat(make(_instances()))


def test_fields_that_the_first_lacks_are_left_out_with_a_warning():
    first, second = Instances((4, 4), a=torch.zeros(2)), Instances((4, 4), a=torch.ones(1), b=[3])
    with pytest.warns(UserWarning, match=r"Instances.cat leaves out b: item 0 lacks it"):
        joined = Instances.cat([first, second])
    assert list(joined.get_fields()) == ["a"]
    assert joined.a.tolist() == [0, 0, 1]


@pytest.mark.parametrize("method", ["get", "remove"])
def test_missing_field_is_a_key_error_with_a_readable_message_too(method):
    with pytest.raises(KeyError) as error:
        getattr(_instances(), method)("score")
    assert str(error.value).startswith("Instances have no field 'score', only [")
    assert not hasattr(_instances(), "score")


def test_field_without_a_length_is_an_error():
    with pytest.raises(TypeError, match="no len"):
        Instances((4, 4), number=5)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda i: pickle.loads(pickle.dumps(i))], ids=["copy", "pickle"]
)
def test_instances_can_be_sent_between_processes(duplicate):
    instances = _instances()
    other = duplicate(instances)
    assert other.image_size == instances.image_size
    assert torch.equal(other.pred_boxes.tensor, instances.pred_boxes.tensor)


def test_repr_names_size_and_fields():
    text = repr(_instances(1))
    assert "num_instances=1, image_height=48, image_width=64" in text
    assert "scores: tensor([0.])" in text
    assert "num_instances=0" in repr(Instances((4, 4)))


def _found(**fields):
    return Instances(
        (40, 60),
        pred_boxes=Boxes(torch.tensor([[10.0, 5, 30, 25.5], [0, 0, 60, 40]])),
        scores=torch.tensor([0.75, 0.5]),
        pred_classes=torch.tensor([1, 0]),
        **fields,
    )


NAMES = ["cat", "dog"]
MASKS = torch.zeros(2, 40, 60, dtype=torch.bool)
MASKS[0, 6:20, 12:30] = True
MASKS[1, 0:3] = True


def test_predictions_are_written_as_those_of_coco():
    keypoints = torch.tensor([[[3.5, 4.0, 0.25]], [[1.0, 2.0, 0.5]]])
    found = _found(pred_masks=MASKS, pred_keypoints=keypoints)
    entries = json.loads(json.dumps(found.to_coco(7, {0: 17, 1: 18})))
    assert [e["bbox"] for e in entries] == [[10, 5, 20, 20.5], [0, 0, 60, 40]]
    assert [(e["image_id"], e["category_id"], e["score"]) for e in entries] == [
        (7, 18, 0.75),
        (7, 17, 0.5),
    ]
    assert entries[0]["keypoints"] == [3, 3.5, 0.25]
    for entry, mask in zip(entries, MASKS.numpy(), strict=True):
        assert np.array_equal(rle_to_bitmask(entry["segmentation"]), mask)
    rles = [bitmask_to_rle(mask) for mask in MASKS.numpy()]
    assert _found(pred_masks=rles).to_coco()[0]["segmentation"] == entries[0]["segmentation"]
    turned = Instances((40, 60), pred_boxes=RotatedBoxes([[30, 20, 10, 4, 30]]),
                       scores=torch.ones(1), pred_classes=torch.zeros(1).long())  # fmt: skip
    assert turned.to_coco()[0]["bbox"] == [30, 20, 10, 4, 30]
    assert _found()[:0].to_coco() == []


def test_predictions_as_a_data_frame():
    pytest.importorskip("pandas", reason="pandas is not installed")
    table = _found().to_pandas(NAMES)
    assert list(table.columns) == [
        "xmin",
        "ymin",
        "xmax",
        "ymax",
        "score",
        "class_id",
        "class_name",
    ]
    assert table.iloc[0].tolist() == [10, 5, 30, 25.5, 0.75, 1, "dog"]
    assert len(_found()[:0].to_pandas(NAMES)) == 0


def test_predictions_as_detections_of_supervision():
    supervision = pytest.importorskip("supervision", reason="supervision is not installed")
    found = _found(pred_masks=MASKS)
    detections = found.to_supervision(NAMES)
    assert list(detections.data["class_name"]) == ["dog", "cat"]
    theirs = supervision.Detections.from_detectron2({"instances": found})
    for name in ("xyxy", "confidence", "class_id", "mask"):
        assert np.array_equal(getattr(detections, name), getattr(theirs, name)), name
    assert len(detections[detections.confidence > 0.6]) == 1
    rles = [bitmask_to_rle(mask) for mask in MASKS.numpy()]
    assert np.array_equal(_found(pred_masks=rles).to_supervision().mask, MASKS.numpy())
    assert len(found[:0].to_supervision(NAMES)) == 0


def test_predictions_as_detections_of_fiftyone(monkeypatch):
    # A stand-in: the package, with a database of its own, is too large for the tests.
    stand_in = SimpleNamespace(Detection=SimpleNamespace, Detections=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "fiftyone", stand_in)
    first, second = _found(pred_masks=MASKS).to_fiftyone(NAMES).detections
    assert (first.label, first.confidence) == ("dog", 0.75)
    assert first.bounding_box == pytest.approx([10 / 60, 5 / 40, 20 / 60, 21 / 40])
    assert np.array_equal(first.mask, MASKS[0, 5:26, 10:30].numpy())
    assert second.mask.shape == (40, 60)
    (plain, _) = _found().to_fiftyone().detections
    assert (plain.label, plain.mask) == ("1", None)
    assert plain.bounding_box == pytest.approx([10 / 60, 5 / 40, 20 / 60, 20.5 / 40])


@pytest.mark.parametrize("name", ["pandas", "supervision", "fiftyone"])
def test_missing_package_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ImportError, match=rf"to_{name} needs the package {name}: pip install 'detkit"
    ):
        getattr(_found(), f"to_{name}")()
