"""A whole chunk, or a part of a training step, as one CUDA graph: launched once, and from then on replayed by one call.

A graph reads its inputs, its weights and all that lies between them at fixed addresses. So inputs are copied to where
they were at capture, a graph belongs to one set of shapes, and it is captured anew when weights were moved, swapped or
wrapped. Weights that change in place are simply read. Nothing that is captured may depend on a value.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

logger = logging.getLogger(__name__)

KEPT = 4
"""Graphs of a keeper at a time. Control needs one or two."""

FORGOTTEN = 32
"""Calls after which a graph that was not replayed makes room for another."""

LARGEST_BATCH = 4
"""Observations in a chunk, above which a GPU has enough to do with each kernel."""


class Recording(Protocol):
    """A function that was recorded, and runs again on the same memory."""

    out: Tensor

    def replay(self) -> None:
        """Run it again."""


_RUNNING = threading.Lock()
"""All graphs share the memory between their kernels, so one runs at a time, until its result is copied."""


class CudaRecording:
    """A function as a CUDA graph."""

    pool: Any = None  # of the memory of all graphs

    def __init__(self, function: Callable[[], Tensor]) -> None:
        """Run the function on a stream of its own, which loads kernels and libraries, then capture it."""
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(2 if self.pool is None else 1):  # the first of all also begins libraries
                function()
        current.wait_stream(stream)
        type(self).pool = self.pool or torch.cuda.graph_pool_handle()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, such as those of cameras, may allocate memory meanwhile.
        with torch.cuda.graph(self._graph, pool=self.pool, capture_error_mode="thread_local"):
            self.out = function()

    def replay(self) -> None:
        self._graph.replay()


class _Entry(NamedTuple):
    recording: Recording
    inputs: list[Tensor]
    weights: Hashable
    used: list[int]  # the number of the last call


class CudaGraphs:
    """Replays functions of a network; may be called from several threads. A copy begins without graphs."""

    def __init__(
        self, record: Callable[[Callable[[], Tensor]], Recording] = CudaRecording, of: str = "a chunk"
    ) -> None:
        """Begin without graphs.

        Args:
            record: makes a recording of a function.
            of: what the functions compute, for messages.
        """
        self._record, self._of = record, of
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._calls = 0
        self._failed = self._warned = False

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._record, self._of)

    def __call__(self, model: nn.Module, function: Callable[..., Tensor], inputs: Any, key: Hashable = None) -> Tensor:
        """function(*inputs), replayed where its graph is known.

        Args:
            inputs: a structure of tensors and plain values; the latter belong to what a graph is known by.
            key: what else the function depends on.
        """
        leaves, structure = tree_flatten(inputs)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        shapes = tuple((x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves)
        known_by = (shapes, str(structure), key, _autocast(tensors))
        with _RUNNING:
            self._calls += 1
            # A graph made in a caller's inference mode could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                entry = self._entry(known_by, model, function, leaves, structure)
            if entry is not None:
                for mine, given in zip(entry.inputs, tensors, strict=True):
                    mine.copy_(given)
                entry.recording.replay()
                return entry.recording.out.clone()
        return function(*inputs)

    def _entry(
        self, known_by: Hashable, model: nn.Module, function: Callable[..., Tensor], leaves: list[Any], structure: Any
    ) -> _Entry | None:
        """The graph of these shapes and of the weights where they are now; None where there is none to be had."""
        weights, entry = weights_of(model), self._entries.get(known_by)
        if entry is not None and entry.weights == weights:
            entry.used[0] = self._calls
            self._entries.move_to_end(known_by)
            return entry
        self._entries.pop(known_by, None)
        if self._failed or not self._has_room():
            return None
        own = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        inputs, caches = [x for x in own if isinstance(x, Tensor)], torch.is_autocast_cache_enabled()
        if _autocast(inputs):  # weights that are cast before the capture would be gone at a replay
            torch.set_autocast_cache_enabled(False)
        try:
            recording = self._record(lambda: function(*tree_unflatten(own, structure)))
        except Exception as error:
            self._failed = True
            logger.warning("no CUDA graph of %s can be made, so it is launched kernel by kernel: %s", self._of, error)
            return None
        finally:
            torch.set_autocast_cache_enabled(caches)
        entry = self._entries[known_by] = _Entry(recording, inputs, weights, [self._calls])
        return entry

    def _has_room(self) -> bool:
        if len(self._entries) < KEPT:
            return True
        oldest, entry = next(iter(self._entries.items()))
        if self._calls - entry.used[0] > FORGOTTEN:
            del self._entries[oldest]
            return True
        if not self._warned:
            self._warned = True
            logger.warning(
                "observations have come in more than %d shapes (numbers of cameras, of observations, lengths of "
                "prompts): in the others, %s is launched kernel by kernel",
                KEPT,
                self._of,
            )
        return False


def _autocast(tensors: list[Tensor]) -> Hashable:
    device = tensors[0].device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)


def weights_of(model: nn.Module) -> Hashable:
    """Where each weight lies in memory, and what an adapter does with it: what a graph depends on beside its inputs."""
    places = [_address(x) for x in (*model.parameters(), *model.buffers())]
    kinds: list[Any] = [type(m) for m in model.modules()]
    return hash((*places, *kinds, *(_adapter(m) for m in model.modules() if hasattr(m, "merged_adapters"))))


def _adapter(layer: Any) -> Hashable:
    """Which of its adapters a layer of peft adds to its output, and how strongly."""
    strength = str(getattr(layer, "scaling", None))  # layers that are trained whole have none
    return str(layer.active_adapter), layer.disable_adapters, tuple(layer.merged_adapters), strength


def _address(x: Tensor) -> Hashable:
    storage = x.untyped_storage()
    fake = x.is_meta or hasattr(x, "fake_mode")
    return (storage._cdata if fake else storage.data_ptr()), x.storage_offset(), x.dtype, x.stride()
