import numpy as np
import pytest

from detkit.utils.segment_ids import id2rgb, rgb2id


def test_red_counts_least():
    assert rgb2id(np.array([1, 2, 3], dtype=np.uint8)) == 1 + 2 * 256 + 3 * 65536
    assert id2rgb(np.array(256)).tolist() == [0, 1, 0]


@pytest.mark.parametrize("shape", [(0,), (3, 5), (2, 3, 4)])
def test_colours_and_ids_are_inverse(shape):
    ids = np.random.default_rng(0).integers(0, 2**24, shape)
    np.testing.assert_array_equal(rgb2id(id2rgb(ids)), ids)


@pytest.mark.parametrize("ids", [[-1], [2**24]])
def test_id_that_no_colour_holds_is_an_error(ids):
    with pytest.raises(ValueError, match=rf"\[0, 16777216\), got {ids[0]} to {ids[0]}"):
        id2rgb(np.array(ids))
