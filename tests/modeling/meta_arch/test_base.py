"""Tests of detkit.modeling.meta_arch.base."""

import io

import pytest
import torch

from detkit.modeling.backbone import Backbone
from detkit.modeling.meta_arch.base import Detector, rescale_outputs
from detkit.structures import Boxes, ImageList, Instances

MEAN, STD = [100.0, 110.0, 120.0], [1.0, 2.0, 4.0]


class Nothing(Backbone):
    """A backbone that asks for sizes divisible by 32."""

    size_divisibility = 32

    def forward(self, x):
        return {"x": x}


def make(memory_format=torch.contiguous_format, **kwargs):
    detector = Detector(**{"backbone": Nothing(), "pixel_mean": MEAN, "pixel_std": STD, **kwargs})
    detector.batch_in(memory_format)
    return detector


def image(height=20, width=40, channels=3):
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8)


def test_images_are_normalised_padded_and_batched():
    inputs = [{"image": image(20, 40)}, {"image": image(33, 10)}]
    images = make().preprocess_image(inputs)
    assert images.tensor.shape == (2, 3, 64, 64)
    assert images.image_sizes == [(20, 40), (33, 10)]
    for i, x in enumerate(inputs):
        expected = (x["image"].double() - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(
            STD
        ).view(3, 1, 1)
        torch.testing.assert_close(images[i].double(), expected, rtol=1e-6, atol=1e-6)
    assert not images.tensor[0, :, 20:].any()
    assert not images.tensor[0, :, :, 40:].any()


def test_images_given_are_not_changed():
    x = torch.rand(3, 20, 40)
    before = x.clone()
    make().preprocess_image([{"image": x}])
    torch.testing.assert_close(x, before)


def test_whole_numbers_normalise_like_floats():
    inputs = [{"image": image()}]
    whole = make(pixel_mean=[100, 110, 120], pixel_std=[1, 2, 4]).preprocess_image(inputs)
    assert torch.equal(whole.tensor, make().preprocess_image(inputs).tensor)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_torch_can_save_a_whole_model(memory_format):
    file = io.BytesIO()
    torch.save(make(memory_format=memory_format), file)
    file.seek(0)
    assert torch.load(file, weights_only=False).memory_format == memory_format


@pytest.mark.parametrize(
    "memory_format", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"]
)
def test_batch_is_in_the_memory_format(memory_format):
    images = make(memory_format=memory_format).preprocess_image(
        [{"image": image()}, {"image": image()}]
    )
    assert images.tensor.is_contiguous(memory_format=memory_format)


def test_interleaved_images_are_normalised_alike():
    x = image()
    interleaved = x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(
        make().preprocess_image([{"image": interleaved}]).tensor,
        make().preprocess_image([{"image": x}]).tensor,
    )


def test_number_of_channels_is_that_of_the_mean():
    detector = make(pixel_mean=[1.0], pixel_std=[1.0])
    assert detector.preprocess_image([{"image": image(channels=1)}]).tensor.shape[1] == 1


class _OwnPreparation(Detector):
    def preprocess_image(self, batched_inputs):
        images = [self._move_to_current_device(x["image"]) for x in batched_inputs]
        images = [(x - self.pixel_mean) / self.pixel_std for x in images]
        return ImageList.from_tensors(images)


def test_subclass_may_prepare_images_itself():
    own, batch = _OwnPreparation(Nothing(), MEAN, STD), [{"image": image(32, 64)}]
    assert torch.equal(own.preprocess_image(batch).tensor, make().preprocess_image(batch).tensor)
    assert own.to("meta").preprocess_image(batch).tensor.device.type == "meta"


def test_images_follow_the_model_to_its_device():
    detector = make().to("meta")
    assert detector.device.type == "meta"
    assert detector.preprocess_image([{"image": image()}]).tensor.device.type == "meta"


def test_mean_and_deviation_are_not_in_the_state_dict():
    assert make().state_dict() == {}


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(20, 40, 3), torch.zeros(20, 40), torch.zeros(4, 20, 40)],
    ids=["HWC", "HW", "four-channels"],
)
def test_image_of_another_shape_is_named(bad):
    inputs = [{"image": image()}, {"image": bad, "file_name": "b.jpg"}]
    with pytest.raises(
        ValueError, match=r"\(C, H, W\) with C = 3.*image 1 of the batch \(b.jpg\) has shape"
    ):
        make().preprocess_image(inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            {"pixel_std": [1.0]},
            "pixel_mean and pixel_std must have a number per channel",
            id="lengths",
        ),
        pytest.param({"pixel_std": [1.0, 0.0, 1.0]}, "pixel_std must be positive", id="zero"),
    ],
)
def test_bad_statistics_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_missing_field_names_image_and_mode():
    with pytest.raises(
        ValueError, match="Detector needs 'instances' in training: image 0 of the batch has only"
    ):
        make().take_field([{"image": image()}], "instances")


def test_forward_chooses_by_mode():
    with pytest.raises(NotImplementedError, match="does not implement training_losses"):
        make()([])
    with pytest.raises(NotImplementedError, match="does not implement inference"):
        make().eval()([])


@pytest.mark.parametrize("key", ["instances", "proposals"])
def test_outputs_have_the_size_that_is_asked_for(key):
    results = [Instances((20, 40), pred_boxes=Boxes([[0, 0, 10, 10]])) for _ in range(2)]
    outputs = rescale_outputs(
        results, [{"image": image(), "height": 40, "width": 40}, {"image": image()}], key
    )
    assert [list(output) for output in outputs] == [[key], [key]]
    assert outputs[0][key].image_size == (40, 40)
    assert outputs[0][key].pred_boxes.tensor.tolist() == [[0, 0, 10, 20]]
    assert outputs[1][key].pred_boxes.tensor.tolist() == [[0, 0, 10, 10]]


@pytest.mark.parametrize("missing", ["backbone", "pixel_mean", "pixel_std"])
def test_all_of_the_parts_are_given_or_none(missing):
    with pytest.raises(TypeError, match="needs backbone, pixel_mean and pixel_std"):
        make(**{missing: None})
    assert list(Detector().children()) == []
