import collections
import io
import os
import pickle
import struct
import sys

import numpy as np
import pytest
import torch

from detkit.checkpoint.array_unpickler import UnsafePickleError, load_array_pickle


def load(data):
    return load_array_pickle(io.BytesIO(data))


class Calls:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["f4", "f8", "i8", "u1", "?", ">f4", "f2"])
def test_arrays_come_back_as_tensors(protocol, dtype):
    array = (np.arange(6).reshape(2, 3) % 2).astype(dtype)
    got = load(pickle.dumps({"a": array}, protocol))["a"]
    assert torch.equal(got, torch.from_numpy(array.astype(array.dtype.newbyteorder("="))))


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(np.array(3, np.float32), id="no-dimension"),
        pytest.param(np.zeros((0, 4), np.float32), id="empty"),
        pytest.param(np.asfortranarray(np.arange(6.0).reshape(2, 3)), id="fortran-order"),
        pytest.param(np.arange(12.0)[::2], id="strided"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_shapes_and_orders_come_back(array, protocol):
    assert load(pickle.dumps(array, protocol)).numpy() == pytest.approx(array)


def test_tensors_own_writable_memory():
    got = load(pickle.dumps(np.zeros(3)))
    got += 1
    assert got.tolist() == [1, 1, 1]


def test_numpy_scalars_become_numbers():
    got = load(pickle.dumps([np.float32(1.5), np.int64(7), np.bool_(True)]))
    assert got == [1.5, 7, True]
    assert [type(x) for x in got] == [float, int, bool]


def test_containers_come_back_plain():
    content = {
        "o": collections.OrderedDict(b=1, a=2),
        "l": [1, (2, None)],
        "s": {3},
        "t": "text",
        "y": b"\xff",
        "f": 0.5,
    }
    assert load(pickle.dumps(content, 2)) | {"s": 0} == {**content, "o": {"b": 1, "a": 2}} | {
        "s": 0
    }


def test_shared_arrays_stay_shared():
    array = np.zeros(2)
    got = load(pickle.dumps([array, array]))
    assert got[0] is got[1]


def test_python_2_pickles_of_the_zoo_load():
    # What Python 2's pickle wrote for np.array([1, 2], "<f4"): text for bytes, numpy.core, protocol 2.
    raw = struct.pack("<2f", 1.0, 2.0)
    data = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\n"
        b"U\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U"
        + bytes([len(raw)])
        + raw
        + b"tb."
    )
    assert load(data).tolist() == [1.0, 2.0]


# Each of these would leave a file behind if it ran.
@pytest.mark.parametrize(
    ("make", "asked_for"),
    [
        pytest.param(lambda f: Calls(os.system, f"touch {f}"), "system", id="os.system"),
        pytest.param(lambda f: Calls(eval, f"open({f!r}, 'w')"), "eval", id="eval"),
        pytest.param(lambda f: Calls(exec, f"open({f!r}, 'w')"), "exec", id="exec"),
        pytest.param(lambda f: Calls(open, f, "w"), "open", id="open"),
        pytest.param(lambda f: Calls(os.mkdir, f), "mkdir", id="mkdir"),
        pytest.param(lambda f: Calls(getattr, f, "upper"), "getattr", id="getattr"),
        pytest.param(lambda f: Calls(np.save, f, 1), "numpy.save", id="numpy-function"),
        pytest.param(lambda f: Calls(torch.load, f), "torch.serialization.load", id="torch.load"),
        pytest.param(lambda f: collections.deque([1]), "collections.deque", id="other-container"),
        pytest.param(lambda f: np.array([1, "a"], dtype=object), "dtype 'O8'", id="object-array"),
        pytest.param(lambda f: torch.ones(1), "torch._utils", id="torch-tensor-in-plain-pickle"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_everything_else_is_refused_and_does_not_run(make, asked_for, protocol, tmp_path):
    marker = tmp_path / "ran"
    data = pickle.dumps({"model": {"w": np.ones(1)}, "x": make(str(marker))}, protocol)
    with pytest.raises(UnsafePickleError) as error:
        load(data)
    assert asked_for in error.value.asked_for
    assert not marker.exists()


@pytest.mark.parametrize(
    ("data", "error"),
    [
        pytest.param(b"\x80\x04cos\nsystem\n.", UnsafePickleError, id="bare-name"),
        pytest.param(b"\x80\x04cnumpy\nndarray\n.", UnsafePickleError, id="allowed-name-as-value"),
        pytest.param(b"\x80\x04cnumpy\nndarray\n(tR.", UnsafePickleError, id="ndarray-called"),
        pytest.param(
            b"\x80\x04cnumpy\ndtype\n}X\x08\x00\x00\x00functionNsb.",
            UnsafePickleError,
            id="attribute-set",
        ),
        pytest.param(b"\x80\x04cnumpy\ndtype.__init__\n.", UnsafePickleError, id="dotted-name"),
        pytest.param(
            b"\x80\x04c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00utf-7\x86R.",
            UnsafePickleError,
            id="codec",
        ),
        pytest.param(b"\x80\x02Pid\n.", pickle.UnpicklingError, id="persistent-id"),
        pytest.param(b"\x80\x04]\x94h\x00a.", pickle.UnpicklingError, id="list-in-itself"),
        pytest.param(b"\x80\x04.", Exception, id="empty-stack"),
    ],
)
def test_handwritten_attacks_are_refused(data, error):
    with pytest.raises(error):
        load(data)


def test_attack_on_a_stand_in_leaves_it_working():
    with pytest.raises(UnsafePickleError):
        load(b"\x80\x04cnumpy\ndtype\n}X\x08\x00\x00\x00functionNsb.")
    assert load(pickle.dumps(np.ones(1))).tolist() == [1.0]


def hand_made_array(shape, data):
    """A pickle of a float32 array whose shape and bytes need not fit."""
    array = np.zeros(2, np.float32)
    function, args, _ = array.__reduce__()
    return pickle.dumps(Raw(function, args, (1, shape, array.dtype, False, data)), 4)


class Raw:
    def __init__(self, function, args, state):
        self.reduced = (function, args, state)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        pytest.param((1000, 1000, 1000), b"1234", id="too-few-bytes"),
        pytest.param((1,), b"12345678", id="too-many-bytes"),
        pytest.param((-1,), b"1234", id="negative-side"),
        pytest.param(("a",), b"1234", id="side-of-text"),
        pytest.param((1,), [1, 2], id="list-for-bytes"),
    ],
)
def test_arrays_that_lie_about_their_size_are_refused(shape, data):
    with pytest.raises((ValueError, TypeError)):
        load(hand_made_array(shape, data))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_pickles_raise(share):
    data = pickle.dumps({"a": np.zeros(100)})
    with pytest.raises((pickle.UnpicklingError, EOFError)):
        load(data[: int(len(data) * share)])


def test_reading_imports_nothing():
    assert "antigravity" not in sys.modules
    with pytest.raises(UnsafePickleError):
        load(b"\x80\x04cantigravity\ngeohash\n.")
    assert "antigravity" not in sys.modules
