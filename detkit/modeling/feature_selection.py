"""The features of a backbone that a head asks for."""

from collections.abc import Mapping, Sequence

from detkit.layers import ShapeSpec
from detkit.utils.near_miss import did_you_mean


def select_features(
    input_shape: Mapping[str, ShapeSpec], names: Sequence[str], key: str
) -> list[ShapeSpec]:
    """Return the shapes of the named features, in the order of the names.

    Args:
        input_shape: What the backbone gives, by name.
        names: What the head asks for.
        key: Config key that holds the names, for the error message.

    Raises:
        ValueError: No name is given, or the backbone has no such feature.
    """
    if not names:
        raise ValueError(f"{key} names no feature; the backbone has {', '.join(input_shape)}")
    for name in names:
        if name not in input_shape:
            hint = did_you_mean(name, input_shape)
            raise ValueError(
                f"{key} asks for {name!r}, but the backbone gives {', '.join(input_shape)}.{hint}"
            )
    return [input_shape[name] for name in names]
