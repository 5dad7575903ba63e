"""Augmentations: what they see, what they change, and where their randomness comes from."""

import numpy as np
import pytest

from detkit.data import transforms as T
from detkit.data.transforms.augmentation import _get_aug_input_args, run_progress


def sample(height=10, width=20, boxes=((1, 2, 5, 6),), sem_seg=False):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    labels = np.arange(height * width).reshape(height, width) if sem_seg else None
    return T.AugInput(image, boxes=np.array(boxes, dtype=float), sem_seg=labels)


class CropToFirstBox(T.Augmentation):
    """Looks at the boxes, by the name of its argument."""

    def get_transform(self, image, boxes):
        x1, y1, x2, y2 = (int(v) for v in boxes[0])
        return T.CropTransform(x1, y1, x2 - x1, y2 - y1)


class Shift(T.Augmentation):
    """As written for Detectron2, with `_init` and `_rand_range`."""

    def __init__(self, limit):
        super().__init__()
        self._init(locals())

    def get_transform(self, image):
        return T.CropTransform(int(self._rand_range(self.limit)), 0, 4, 4)


def test_transform_reaches_image_boxes_and_labels():
    aug_input = sample(sem_seg=True)
    image, labels = aug_input.image, aug_input.sem_seg
    T.HFlipTransform(20)
    tfm = T.AugmentationList([T.RandomFlip(prob=1.0)])(aug_input)
    assert np.array_equal(aug_input.image, image[:, ::-1])
    assert np.array_equal(aug_input.sem_seg, labels[:, ::-1])
    assert aug_input.boxes.tolist() == [[15, 2, 19, 6]]
    assert isinstance(tfm[0], T.HFlipTransform)


def test_augmentation_sees_what_its_arguments_name():
    aug_input = sample()
    CropToFirstBox()(aug_input)
    assert aug_input.image.shape == (4, 4, 3)
    assert aug_input.boxes.tolist() == [[0, 0, 4, 4]]


def test_argument_that_no_input_has_is_named():
    class Wants(T.Augmentation):
        def get_transform(self, image, depth):
            return T.NoOpTransform()

    with pytest.raises(
        AttributeError, match="Wants.get_transform takes 'depth', which AugInput lacks"
    ):
        Wants()(sample())


def test_single_argument_is_the_image_whatever_it_is_called():
    class Mirror(T.Augmentation):
        def get_transform(self, img):
            return T.HFlipTransform(img.shape[1])

    class AroundBox(T.Augmentation):
        def get_transform(self, boxes):
            x, y, *_ = boxes[0].astype(int)
            return T.CropTransform(int(x), int(y), 2, 2)

    aug_input, plain = sample(), sample()
    Mirror()(aug_input)
    assert np.array_equal(aug_input.image, plain.image[:, ::-1])
    AroundBox()(aug_input)
    assert aug_input.image.shape == (2, 2, 3)


def test_later_augmentation_sees_what_the_earlier_one_left():
    aug_input = sample()
    tfms = aug_input.apply_augmentations(
        [T.Resize((30, 40)), T.RandomFlip(prob=1.0), T.NoOpTransform()]
    )
    assert tfms[1].width == 40
    assert aug_input.image.shape == (30, 40, 3)


def test_draws_follow_numpys_seed():
    drawn = []
    for _ in range(2):
        np.random.seed(3)
        drawn.append([Shift(10)(sample()).x0 for _ in range(8)])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 1


def test_random_apply_applies_with_its_probability():
    np.random.seed(0)
    aug = T.RandomApply(T.HFlipTransform(20), prob=0.3)
    share = np.mean([isinstance(aug(sample()), T.HFlipTransform) for _ in range(1000)])
    assert abs(share - 0.3) < 0.05


def test_random_apply_of_a_random_augmentation():
    np.random.seed(0)
    aug = T.RandomApply(T.RandomFlip(prob=0.5), prob=0.5)
    share = np.mean([isinstance(aug(sample()), T.HFlipTransform) for _ in range(1000)])
    assert abs(share - 0.25) < 0.05


def test_apply_augmentations_takes_a_bare_image():
    image = sample().image
    flipped, tfms = T.apply_augmentations([T.RandomFlip(prob=1.0)], image)
    assert np.array_equal(tfms.inverse().apply_image(flipped), image)


@pytest.mark.parametrize("prob", [-0.1, 1.1])
def test_probability_outside_of_0_to_1_is_refused(prob):
    with pytest.raises(ValueError, match=r"probability must lie in \[0, 1\]"):
        T.RandomApply(T.NoOpTransform(), prob)


def test_what_is_no_augmentation_is_refused():
    with pytest.raises(TypeError, match="neither an Augmentation nor a Transform: 'flip'"):
        T.AugmentationList(["flip"])


def test_augmentation_that_gives_no_transform_is_named():
    class Forgets(T.Augmentation):
        def get_transform(self, image):
            pass

    with pytest.raises(TypeError, match="Forgets.get_transform must return a Transform, got None"):
        Forgets()(sample())


def test_image_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(H, W, C\) or \(H, W\), got \(2, 3, 4, 5\)"):
        T.AugInput(np.zeros((2, 3, 4, 5)))


@pytest.mark.parametrize(("prob", "drawn", "is_applied"), [(0.0, 0.0, False), (1.0, 0.999, True)])
def test_probabilities_of_0_and_1_are_certain(prob, drawn, is_applied, monkeypatch):
    monkeypatch.setattr(np.random, "uniform", lambda *args: drawn)
    sample = T.AugInput(np.zeros((4, 6, 3), dtype=np.uint8))
    applied = T.RandomApply(T.HFlipTransform(6), prob)(sample)
    assert isinstance(applied, T.HFlipTransform) == is_applied


@pytest.mark.parametrize(
    ("augmentation", "text"),
    [
        (T.RandomFlip(), "RandomFlip()"),
        (T.RandomFlip(0.3), "RandomFlip(prob=0.3)"),
        (T.RandomRotation([0, 0], center=[[0, 1]]), None),
        (
            T.AugmentationList([T.RandomFlip(), T.NoOpTransform()]),
            "AugmentationList[RandomFlip(), NoOpTransform()]",
        ),
        (T.RandomApply(T.RandomFlip(), 0.2), "RandomApply(RandomFlip(), prob=0.2)"),
    ],
)
def test_augmentations_show_the_arguments_that_are_no_defaults(augmentation, text):
    assert text is None or repr(augmentation) == text
    assert type(augmentation).__name__ in repr(augmentation)


def test_input_args_name_the_parts_of_an_older_augmentation():
    class Named(T.TransformGen):
        input_args = ("image", "boxes")

        def get_transform(self, picture, rectangles):
            assert picture.shape == (4, 6, 3)
            assert rectangles.shape == (1, 4)
            return T.HFlipTransform(picture.shape[1])

    sample = T.StandardAugInput(np.zeros((4, 6, 3), np.uint8), boxes=np.array([[0.0, 0, 2, 2]]))
    Named()(sample)
    assert sample.boxes.tolist() == [[4, 0, 6, 2]]


def test_input_args_of_an_object_hold_too():
    class CropAround(T.RandomCrop):
        def __init__(self):
            super().__init__("absolute", (2, 2))
            self.input_args = ("image", "boxes")

        def get_transform(self, img, around):
            x, y = around[0, :2].astype(int)
            return T.CropTransform(int(x), int(y), 2, 2)

    sample = T.AugInput(np.zeros((4, 6, 3), np.uint8), boxes=np.array([[3.0, 1, 5, 3]]))
    CropAround()(sample)
    assert sample.boxes.tolist() == [[0, 0, 2, 2]]


def test_augmentation_that_is_called_in_its_own_way_gets_the_parts_it_names():
    class Twice(T.Augmentation):
        def get_transform(self, image, boxes):
            return T.CropTransform(int(boxes[0, 0]), 0, 2, image.shape[0])

        def __call__(self, aug_input):
            for _ in range(2):
                last = self.get_transform(*_get_aug_input_args(self, aug_input))
                aug_input.transform(last)
            return last

    sample = T.AugInput(np.zeros((4, 6, 3), np.uint8), boxes=np.array([[3.0, 1, 5, 3]]))
    assert Twice()(sample).x0 == 0
    assert (sample.image.shape, sample.boxes.tolist()) == ((4, 2, 3), [[0, 1, 2, 3]])
    with pytest.raises(
        AttributeError, match="Twice.get_transform takes 'boxes', which object lacks"
    ):
        _get_aug_input_args(Twice(), type("object", (), {"image": 1})())


def test_apply_transform_gens_returns_image_and_transforms():
    image = np.arange(24, dtype=np.uint8).reshape(4, 6)
    flipped, transforms = T.apply_transform_gens([T.RandomFlip(1.0)], image)
    np.testing.assert_array_equal(flipped, image[:, ::-1])
    assert len(transforms) == 1


def test_random_apply_can_be_asked_for_its_transform():
    image = np.zeros((4, 6, 3), np.uint8)
    always = T.RandomApply(T.RandomFlip(1.0), 1.0).get_transform(image)
    assert isinstance(always, T.HFlipTransform)
    assert isinstance(T.RandomApply(T.HFlipTransform(6), 0.0).get_transform(image), T.NoOpTransform)


@pytest.mark.parametrize(("share", "is_over"), [(0.49, False), (0.5, True), (1.0, True)])
def test_until_ends_at_its_share_of_the_run_in_both_ways_of_use(share, is_over):
    until = T.Until(T.RandomFlip(1.0), 0.5)
    image = np.zeros((2, 3, 3), np.uint8)
    with run_progress(share):
        found = [until.get_transform(image), until(T.AugInput(image))]
    assert [isinstance(transform, T.NoOpTransform) for transform in found] == [is_over] * 2


def test_argument_that_is_given_is_printed():
    assert str(T.RandomFlip(prob=float("0.5"))) == "RandomFlip(prob=0.5)"
    assert str(T.RandomFlip()) == "RandomFlip()"
