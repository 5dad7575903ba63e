"""The order of categories; the rest of the ground truth is held by test_evaluator.py."""

from detkit.data import MetadataCatalog
from detkit.evaluation.panoptic.ground_truth import PanopticCategories


def test_categories_are_things_then_stuff_in_the_order_of_contiguous_ids(register):
    name = register(
        [],
        thing_dataset_id_to_contiguous_id={3: 1, 8: 0},
        # 3 and 8 are things, which the head for stuff sees as one class.
        stuff_dataset_id_to_contiguous_id={2: 2, 3: 0, 5: 1, 8: 0},
    )
    categories = PanopticCategories(MetadataCatalog.get(name))
    assert categories.dataset_ids == [8, 3, 5, 2]
    assert categories.is_thing.tolist() == [True, True, False, False]
    assert [categories.number_of_dataset_id(id_, "") for id_ in (8, 3, 5, 2)] == [0, 1, 2, 3]
    assert [categories.number_of(True, k, "") for k in (0, 1)] == [0, 1]
    assert [categories.number_of(False, k, "") for k in (1, 2)] == [2, 3]
