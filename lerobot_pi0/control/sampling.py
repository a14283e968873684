"""Sampling of a chunk: one context, then the velocity at each step of the solver; plain or compiled (`compile_model`).

Two functions are compiled, not the policy. They take the network as an argument, have no graph breaks, and see the same
shapes in each chunk. Everything that depends on values (checks, the length of prompts) happens before them, in
`inputs/observation.py`, or after them.

Axes: B batch, K flow samples, T steps of a chunk, A action dim.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from itertools import chain, repeat
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..kernels.compilation import begin_step, compiled
from ..kernels.cpu_linear import packed
from ..kernels.cuda_attention import attention_order
from ..kernels.cuda_graphs import LARGEST_BATCH, CudaGraphs
from ..kernels.cuda_layers import on_gpu
from ..kernels.frozen_prefix import with_prefix
from ..kernels.kv_cache import preallocate
from ..network import solvers
from ..network.pi0 import PI0, Context, Observation
from . import guidance
from .debug import Record


def velocity(
    model: PI0,
    x_BKTA: Tensor,
    time: Tensor,
    time_embedding: Tensor,
    context: Context,
    guide: guidance.Guide | None = None,
    record: Record | None = None,
) -> Tensor:
    """`PI0.velocity`, guided if there is a guide.

    Args:
        time: broadcasts against (B, K, T).
        time_embedding: `embed_time` of the tokens' times.
        record: called with debug data.
    """
    if guide is None:
        v = model.velocity(x_BKTA, time_embedding, context)
    else:
        v = guidance.guided(lambda x: model.velocity(x, time_embedding, context), x_BKTA, time, guide, record)
    if record is not None:
        record(time, x_t=x_BKTA, v_t=v)
    return v


class Sampler:
    """`context` and `velocity` as functions of the network, plain or compiled, and `chunk`, which samples with them."""

    def __init__(self, compile_mode: str | None = None, cuda_graphs: bool | None = False) -> None:
        """Decide how the network is called.

        Args:
            compile_mode: torch.compile's mode; None compiles nothing.
            cuda_graphs: on CUDA, capture each chunk as one CUDA graph, and the frozen VLM's part of a training step as
                another. With a `compile_mode`, the layers in this graph of a chunk are then compiled
                (`cuda_layers.compile_layers`), not `context` and `velocity`.
        """
        self.graphs = CudaGraphs() if cuda_graphs else None
        self.prefixes = CudaGraphs(of="a frozen VLM") if cuda_graphs and compile_mode is None else None
        self.compiled = compile_mode is not None
        self.context, self.velocity, self.velocity_and_state = PI0.context, velocity, PI0.velocity_and_state
        if compile_mode is not None:
            self.context, self.velocity = compiled(PI0.context, compile_mode), compiled(velocity, compile_mode)
            self.velocity_and_state = compiled(PI0.velocity_and_state, compile_mode)

    def training_context(self, model: PI0, obs: Observation) -> Context:
        """The context for a loss, in which `velocity` computes the state's token."""
        if self.prefixes is not None:
            obs = with_prefix(self.prefixes, model, obs)
        return self.context(model, obs, with_state=False)

    def begin(self) -> None:
        """To be called before the first call of a chunk or a loss."""
        if self.compiled:
            begin_step()

    def chunk(
        self,
        model: PI0,
        obs: Observation,
        noise_BKTA: Tensor,
        guide: guidance.Guide | None = None,
        record: Record | None = None,
        **solver: Any,
    ) -> Tensor:
        """From noise to actions, float32 (B, K, T, A).

        Args:
            record: called with debug data; not possible with a compiled sampler.
            solver: arguments of `solvers.integrate`.
        """
        with attention_order(noise_BKTA.device):
            if self.graphs is None or record is not None or not self._can_be_captured(noise_BKTA, **solver):
                self.begin()
                return self._chunk(model, obs, noise_BKTA, guide, record, **solver)
            function = partial((Sampler() if self.compiled else self)._chunk, model, **solver)
            return self.graphs(model, function, (obs, noise_BKTA, guide), tuple(sorted(solver.items())))

    @staticmethod
    def _can_be_captured(noise_BKTA: Tensor, solver: str = "euler", **others: Any) -> bool:
        """Whether a chunk can be a CUDA graph: not with the adaptive solver, whose steps depend on values."""
        return on_gpu(noise_BKTA.device) and len(noise_BKTA) <= LARGEST_BATCH and solver != "adaptive"

    def _chunk(
        self,
        model: PI0,
        obs: Observation,
        noise_BKTA: Tensor,
        guide: guidance.Guide | None,
        record: Record | None = None,
        **solver: Any,
    ) -> Tensor:
        contexts = self._contexts(model, obs, noise_BKTA, guide)

        def embed(time: Tensor) -> Tensor:
            return model.embed_time(guidance.token_times(time, guide))

        def field(x: Tensor, time: Tensor, time_embedding: Tensor) -> Tensor:
            recorded = () if record is None else (record,)
            return self.velocity(model, x, time, time_embedding, next(contexts), guide, *recorded)

        with contextlib.nullcontext() if self.compiled else packed(model.expert):
            return solvers.integrate(field, embed, guidance.begin(noise_BKTA, guide), **solver)

    def _contexts(
        self, model: PI0, obs: Observation, noise_BKTA: Tensor, guide: guidance.Guide | None
    ) -> Iterator[Context]:
        """The context of each velocity. On CUDA, the state's token runs with the actions of the first velocity, and its
        keys and values stay in the cache: a pass of its own would launch as many kernels as a whole velocity does."""
        if self.compiled:  # compiled graphs recompute cheaply what steps share, and must not write into their inputs
            return repeat(self.context(model, obs))
        differentiates = guide is not None and guide.mode == "vjp"
        if differentiates or not on_gpu(noise_BKTA.device):
            return repeat(self._shared_by_steps(model, self.context(model, obs), noise_BKTA, guide))
        first = self.context(model, obs, with_state=False)
        samples, steps = noise_BKTA.shape[1:3]
        cache = preallocate(first.cache, 1 + samples * steps)
        mask = F.pad(first.mask_BS, (0, 1), value=True)
        rest = Context(cache, mask, padded=first.padded)
        shared = model.rope_and_mask(rest, samples, steps, cache[0].keys_BSD.dtype)
        return chain([first._replace(cache=cache)], repeat(rest._replace(rope_and_mask=shared)))

    @staticmethod
    def _shared_by_steps(model: PI0, context: Context, noise_BKTA: Tensor, guide: guidance.Guide | None) -> Context:
        """The context with all that the steps share: positions, mask, and preallocated memory for keys and values."""
        cache, (samples, steps) = context.cache, noise_BKTA.shape[1:3]
        rope_and_mask = model.rope_and_mask(context, samples, steps, cache[0].keys_BSD.dtype)
        if guide is None or guide.mode != "vjp":  # vjp differentiates, and this memory is overwritten
            cache = preallocate(cache, samples * steps)
        return context._replace(cache=cache, rope_and_mask=rope_and_mask)
