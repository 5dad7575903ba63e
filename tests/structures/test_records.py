from detkit.structures import AnnotationRecord, ImageRecord, ModelInput, ModelOutput


def test_records_name_the_keys_that_cross_packages():
    assert AnnotationRecord.__required_keys__ == {"bbox", "bbox_mode", "category_id"}
    optional = {"id", "iscrowd", "difficult", "segmentation", "keypoints", "area"}
    assert AnnotationRecord.__optional_keys__ == optional
    assert ImageRecord.__required_keys__ == {"file_name", "image_id"}
    assert ModelInput.__required_keys__ == {"image"}
    assert ModelOutput.__optional_keys__ == {"instances", "proposals", "sem_seg", "panoptic_seg"}
