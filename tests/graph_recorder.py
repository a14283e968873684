"""A stand-in for CUDA graphs on the CPU: it keeps every tensor and runs the same operators again on the same memory, as
a CUDA graph does. It refuses to read a value, as the capture of a CUDA graph does."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Records a function; `replay` runs its operators again, each into the memory of its first result."""

    made = 0

    def __init__(self, function) -> None:
        super().__init__()
        type(self).made += 1
        self.steps: list[tuple] = []
        with self:
            self.out = function()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value is read while a graph is captured")
        out = function(*args, **kwargs)
        self.steps.append((function, args, kwargs, out))
        return out

    def replay(self) -> None:
        for function, args, kwargs, kept in self.steps:
            with torch.autocast("cpu", enabled=False):  # what it casts is among the operators
                fresh = function(*args, **kwargs)
            for old, new in zip(tree_leaves(kept), tree_leaves(fresh), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                    old.copy_(new)


def refuse(function) -> None:
    """In the place of a recorder: what CUDA does with an operation that cannot be captured."""
    function()
    raise RuntimeError("operation not permitted when stream is capturing")
