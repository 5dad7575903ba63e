"""Settings under which foreign weights were trained, compared with those of the model that they are loaded into.

Weights load as well under wrong settings: only the results are worse. What can be seen from the
model is compared.
"""

from torch import Tensor, nn

from detkit.checkpoint.foreign_layout import Pixels, Translation

# Means differ in the last digits from source to source, by less than one grey level.
_TOLERANCE = 1.0


def differing_settings(translation: Translation, model: nn.Module) -> list[str]:
    """Say, in a sentence each, which settings of the model are not those that the weights were
    trained under.
    """
    found = []
    if translation.pixels is not None:
        found.append(_pixels_differ(translation.layout, translation.pixels, model))
    if translation.stride_in_1x1 is not None:
        found.append(_strides_differ(translation.layout, translation.stride_in_1x1, model))
    return [sentence for sentence in found if sentence]


def _pixels_differ(layout: str, pixels: Pixels, model: nn.Module) -> str:
    mean, std = (getattr(model, name, None) for name in ("pixel_mean", "pixel_std"))
    if not isinstance(mean, Tensor) or not isinstance(std, Tensor):
        return ""  # a backbone alone takes images as they come
    is_same = _is_close(mean, pixels.mean) and (pixels.std is None or _is_close(std, pixels.std))
    if is_same:
        return ""
    return (
        f"weights of {layout} want images prepared otherwise: set {pixels.settings()}; the model"
        f" has PIXEL_MEAN {_numbers(mean)}, PIXEL_STD {_numbers(std)}"
    )


def _strides_differ(layout: str, in_1x1: bool, model: nn.Module) -> str:
    """Compare with the blocks of the model that have a stride: two convolutions in a row may have
    it.
    """
    for block in model.modules():
        convs = [getattr(block, name, None) for name in ("conv1", "conv2", "conv3")]
        if all(isinstance(conv, nn.Conv2d) for conv in convs):
            strides = [conv.stride[0] for conv in convs[:2] if isinstance(conv, nn.Conv2d)]
            if max(strides) > 1 and (strides[0] > 1) != in_1x1:
                return (
                    f"the bottlenecks of {layout} have their stride in the"
                    f" {'1x1' if in_1x1 else '3x3'} convolution, the model's in the other: set"
                    f" MODEL.RESNETS.STRIDE_IN_1X1 {in_1x1}"
                )
    return ""


def _is_close(values: Tensor, wanted: tuple[float, ...]) -> bool:
    numbers = _numbers(values)
    return len(numbers) == len(wanted) and all(
        abs(a - b) < _TOLERANCE for a, b in zip(numbers, wanted, strict=True)
    )


def _numbers(values: Tensor) -> list[float]:
    return [round(value, 3) for value in values.flatten().tolist()]
