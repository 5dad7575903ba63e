import math
import pickle

import pytest
import torch

from detkit.utils.memory import retry_if_cuda_oom
from detkit.utils.serialize import PicklableWrapper


def test_function_is_tried_again_and_then_called_on_the_cpu():
    calls = []

    def function(x, factor=1):
        calls.append(x.device.type)
        if len(calls) < 3:
            raise torch.OutOfMemoryError("full")
        return x * factor

    assert retry_if_cuda_oom(function)(torch.ones(2), factor=3).tolist() == [3, 3]
    assert calls == ["cpu"] * 3


def test_other_errors_come_through():
    def function():
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        retry_if_cuda_oom(function)()


def test_wrapped_function_is_called():
    wrapper = PicklableWrapper(PicklableWrapper(lambda x: x + 1))
    assert wrapper(2) == 3


def test_local_function_is_pickled_with_what_it_uses():
    offset, inner = 2, lambda x: x + 1

    def function(x, y=3, *, z=4):
        return math.floor(inner(x) + y + z + offset)

    assert pickle.loads(pickle.dumps(PicklableWrapper(function)))(0.5) == 10
    assert pickle.loads(pickle.dumps(PicklableWrapper(function)))(0.5, 4, z=5) == 12
    assert pickle.loads(pickle.dumps(PicklableWrapper(math.floor)))(1.5) == 1
