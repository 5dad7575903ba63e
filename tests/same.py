"""Whether two results of runs are the same, bit for bit."""

import torch


def same(a, b):
    """Compare nested containers of tensors and plain values; nan equals nan among the latter."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or a != a != b != b
