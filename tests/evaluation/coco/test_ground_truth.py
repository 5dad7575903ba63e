import pytest

from detkit.evaluation.coco.ground_truth import load_coco_ground_truth, truth_boxes


def test_ids_lead_from_the_records_to_the_json(register, make_record):
    records = [
        make_record("b", ([1, 2, 4, 6], 0)),
        make_record("a", ([0, 0, 1, 1], 1), ([0, 0, 9, 9], 1)),
    ]
    name = register(records, thing_dataset_id_to_contiguous_id={5: 1, 8: 0})
    truth = load_coco_ground_truth(name)
    assert (truth.dataset_name, truth.class_names, truth.category_ids) == (
        name,
        ["cat", "dog"],
        [8, 5],
    )
    assert truth.image_ids == {"b": 1, "a": 2}
    objects = truth.objects_per_image()
    assert [o["category_id"] for o in objects[1]] == [8]
    assert [o["bbox"] for o in objects[2]] == [[0, 0, 1, 1], [0, 0, 9, 9]]
    assert truth_boxes(objects[1], rotated=False).tolist() == [[1, 2, 4, 6]]


def test_ids_of_the_file_are_numbered_where_the_loader_leaves_them(register, make_record, caplog):
    records = [make_record(1, ([1, 2, 4, 6], 8), ([0, 0, 1, 1], 5), ([0, 0, 9, 9], 3))]
    classes = {5: 1, 8: 0}
    name = register(records, thing_dataset_id_to_contiguous_id=classes, json_file="a.json")
    objects = load_coco_ground_truth(name).objects_per_image()[1]
    assert [o["category_id"] for o in objects] == [8, 5]
    assert "those of 1 other categories do not count" in caplog.text
    assert [a["category_id"] for a in records[0]["annotations"]] == [8, 5, 3]
    name = register(records, thing_dataset_id_to_contiguous_id=classes)  # of no file
    with pytest.raises(ValueError, match="an object of class id 8"):
        load_coco_ground_truth(name)


def test_crowds_are_not_objects_to_be_found(register, make_record):
    name = register([make_record(1, ([0, 0, 9, 9], 0), ([0, 0, 9, 9], 0, {"iscrowd": 1}))])
    assert load_coco_ground_truth(name).num_objects == 1


def test_data_set_that_is_not_annotated_has_no_objects(register):
    truth = load_coco_ground_truth(register([{"file_name": "1.jpg", "image_id": 1}]))
    assert truth.num_objects == 0
    assert truth.objects_per_image() == {1: []}


def test_no_boxes_keep_their_shape():
    assert truth_boxes([], rotated=False).shape == (0, 4)
    assert truth_boxes([], rotated=True).shape == (0, 5)


def test_data_set_that_nobody_registered_is_an_error():
    with pytest.raises(KeyError, match="'nobody_registered_this' is not registered"):
        load_coco_ground_truth("nobody_registered_this")
