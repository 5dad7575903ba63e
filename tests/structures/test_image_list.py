import pytest
import torch

from detkit.structures import ImageList

SIZES = [(5, 7), (6, 4), (3, 9)]


def _images(*leading: int) -> list[torch.Tensor]:
    return [torch.rand(*leading, height, width) + 1 for height, width in SIZES]


@pytest.mark.parametrize(
    "leading", [(3,), (), (1,)], ids=["colour", "without channels", "one channel"]
)
@pytest.mark.parametrize("divisibility", [0, 1, 8])
def test_images_come_back_and_the_rest_is_padding(leading, divisibility):
    images = _images(*leading)
    batch = ImageList.from_tensors(images, divisibility, pad_value=-2.0)
    expected = (8, 16) if divisibility == 8 else (6, 9)
    assert batch.tensor.shape == (3, *leading, *expected)
    assert batch.image_sizes == SIZES
    assert len(batch) == 3
    for index, image in enumerate(images):
        assert torch.equal(batch[index], image)
    padding = batch.tensor[batch.tensor < 0]
    assert (padding == -2).all()
    assert len(padding) == batch.tensor.numel() - sum(image.numel() for image in images)


def test_channels_last_batch_has_the_same_numbers():
    images = _images(3)
    contiguous = ImageList.from_tensors(images, 4)
    channels_last = ImageList.from_tensors(images, 4, memory_format=torch.channels_last)
    assert channels_last.tensor.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(contiguous.tensor, channels_last.tensor)


def test_one_image_is_a_batch_with_its_own_memory():
    image = torch.rand(3, 8, 8)
    batch = ImageList.from_tensors([image], 4)
    batch.tensor.zero_()
    assert image.sum() > 0


def test_dtype_is_kept():
    batch = ImageList.from_tensors([torch.full((2, 2), 7, dtype=torch.uint8)], 4, pad_value=255)
    assert batch.tensor.tolist() == [[[7, 7, 255, 255]] * 2 + [[255] * 4] * 2]


def test_square_size_pads_to_a_square():
    batch = ImageList.from_tensors(
        _images(3), 2, padding_constraints={"square_size": 13, "size_divisibility": 4}
    )
    assert batch.tensor.shape[-2:] == (16, 16)
    unconstrained = ImageList.from_tensors(_images(3), 2, padding_constraints={"square_size": 0})
    assert unconstrained.tensor.shape[-2:] == (6, 10)


def test_gradients_reach_the_images():
    image = torch.rand(3, 4, 4, requires_grad=True)
    ImageList.from_tensors([image, torch.rand(3, 6, 6)]).tensor.sum().backward()
    assert image.grad is not None
    assert torch.equal(image.grad, torch.ones(3, 4, 4))


def test_to_moves_the_batch():
    batch = ImageList.from_tensors(_images(3)).to("meta")
    assert batch.device.type == "meta"
    assert batch.image_sizes == SIZES


def test_batch_is_sent_on_with_another_dtype():
    batch = ImageList.from_tensors(_images(3)).to("cpu", torch.float16)
    assert batch.tensor.dtype == torch.float16
    assert batch.image_sizes == SIZES


def test_images_may_have_further_dimensions():
    clips = [torch.ones(5, 3, 4, 6), torch.ones(5, 3, 5, 5)]
    batch = ImageList.from_tensors(clips, 4)
    assert batch.tensor.shape == (2, 5, 3, 8, 8)
    assert batch[1].shape == (5, 3, 5, 5)
    assert batch.tensor.sum() == 5 * 3 * (24 + 25)


def test_no_images_are_an_error():
    with pytest.raises(ValueError, match="need at least one image"):
        ImageList.from_tensors([])


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        pytest.param(
            [torch.zeros(3, 2, 2), torch.zeros(1, 2, 2)],
            ValueError,
            "and image 1 \\(1, 2, 2\\)",
            id="channels",
        ),
        pytest.param([torch.zeros(2)], ValueError, r"image 0 has shape \(2,\)", id="no image"),
        pytest.param([torch.zeros(3, 2, 2), [1]], TypeError, "image 1 is list", id="no tensor"),
    ],
)
def test_images_that_do_not_go_together_are_an_error(images, error, message):
    with pytest.raises(error, match=message):
        ImageList.from_tensors(images)


def test_image_as_large_as_the_square_fits():
    batch = ImageList.from_tensors(_images(3), padding_constraints={"square_size": 9})
    assert batch.tensor.shape[-2:] == (9, 9)


def test_image_larger_than_the_square_is_an_error():
    with pytest.raises(ValueError, match="padded to a square of 8: got one of 6 x 9"):
        ImageList.from_tensors(_images(3), padding_constraints={"square_size": 8})


def test_one_size_per_image_is_needed():
    with pytest.raises(ValueError, match="need one size per image: got 1 sizes, 2 images"):
        ImageList(torch.zeros(2, 3, 4, 4), [(4, 4)])
