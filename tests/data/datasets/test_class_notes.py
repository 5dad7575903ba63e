import pytest

from detkit.data import MetadataCatalog
from detkit.data.datasets import load_coco_json
from detkit.data.datasets.class_notes import note_keypoints


def test_classes_are_noted(write_coco):
    load_coco_json(*write_coco(), dataset_name="mine")
    metadata = MetadataCatalog.get("mine")
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1}
    assert len(metadata.thing_colors) == 2


def test_other_classes_than_noted_list_expected_and_found(write_coco):
    MetadataCatalog.get("mine").set(thing_classes=["dog", "cat"])
    with pytest.raises(
        ValueError,
        match=r"not those noted for data set 'mine'. Expected: dog, cat. Found: cat, dog",
    ):
        load_coco_json(*write_coco(), dataset_name="mine")


CAT = {
    "id": 3,
    "name": "cat",
    "keypoints": ["nose", "left_ear", "right_ear"],
    "skeleton": [[1, 2], [3, 1]],
}
NOTHING = {"id": 4, "name": "hat"}


@pytest.fixture
def metadata():
    yield MetadataCatalog.get("with keypoints")
    MetadataCatalog.remove("with keypoints")


@pytest.mark.parametrize(
    "categories", [[CAT], [NOTHING, CAT], [CAT, {**CAT, "id": 5}]], ids=["one", "some", "alike"]
)
def test_keypoints_their_mirror_and_their_lines_are_noted(metadata, categories):
    note_keypoints(metadata, categories, "a.json")
    assert metadata.keypoint_names == ["nose", "left_ear", "right_ear"]
    assert metadata.keypoint_flip_map == [("left_ear", "right_ear")]
    assert [rule[:2] for rule in metadata.keypoint_connection_rules] == [
        ("nose", "left_ear"),
        ("right_ear", "nose"),
    ]


@pytest.mark.parametrize(
    "categories",
    [[], [NOTHING], [CAT, {**CAT, "keypoints": ["tail"]}]],
    ids=["none", "no", "two kinds"],
)
def test_keypoints_that_are_not_those_of_all_are_not_noted(metadata, categories):
    note_keypoints(metadata, categories, "a.json")
    assert metadata.get("keypoint_names") is None


def test_what_is_noted_by_hand_stays(metadata):
    metadata.set(keypoint_flip_map=[], keypoint_connection_rules=[])
    note_keypoints(metadata, [CAT], "a.json")
    assert (metadata.keypoint_flip_map, metadata.keypoint_connection_rules) == ([], [])


def test_other_keypoints_than_noted_list_expected_and_found(metadata):
    metadata.set(keypoint_names=["tail"])
    with pytest.raises(
        ValueError,
        match=r"of a\.json are not those .* Expected: tail\. Found: nose, left_ear, right_ear",
    ):
        note_keypoints(metadata, [CAT], "a.json")


@pytest.mark.parametrize(
    ("skeleton", "message"),
    [
        ([[1, 4]], r"names keypoints 4, of 1 to 3"),
        ([[0, 1]], "names keypoints 0"),
        ([[1]], "must be pairs of numbers"),
    ],
)
def test_skeleton_of_other_keypoints_is_an_error(metadata, skeleton, message):
    with pytest.raises(ValueError, match=message):
        note_keypoints(metadata, [{**CAT, "skeleton": skeleton}], "a.json")
