"""Sampling of a chunk: the context once, then a velocity per step of the solver, plain or compiled (`compile_model`).

What is compiled are two functions, not the policy. They take the network as an argument, are whole graphs without a
break, and have the same shapes in each chunk. Everything that depends on values (checks, the length of prompts)
happens before them, in `inputs/observation.py`, or after them.

Axes: B batch, K flow samples, T steps of a chunk, A action dim.
"""

import contextlib
from typing import Any

from torch import Tensor

from ..kernels.compilation import begin_step, compiled
from ..kernels.cpu_linear import packed
from ..kernels.kv_cache import preallocate
from ..network import flow
from ..network.pi0 import PI0, Context, Observation
from . import guidance


def velocity(
    model: PI0,
    x_BKTA: Tensor,
    time: Tensor,
    time_embedding: Tensor,
    context: Context,
    guide: guidance.Guide | None = None,
) -> Tensor:
    """`PI0.velocity`, guided if there is a guide.

    Args:
        time: broadcasts against (B, K, T).
        time_embedding: `embed_time` of the tokens' times.
    """
    if guide is None:
        return model.velocity(x_BKTA, time_embedding, context)
    return guidance.guided(lambda x: model.velocity(x, time_embedding, context), x_BKTA, time, guide)


class Sampler:
    """`context` and `velocity` as functions of the network, plain or compiled, and `chunk`, which samples with them."""

    def __init__(self, compile_mode: str | None = None) -> None:
        """Compile the two functions with torch.compile's mode `compile_mode`; None leaves them plain."""
        self.compiled = compile_mode is not None
        self.context, self.velocity = PI0.context, velocity
        if compile_mode is not None:
            self.context, self.velocity = compiled(PI0.context, compile_mode), compiled(velocity, compile_mode)

    def begin(self) -> None:
        """To be called before the first call of a chunk or a loss."""
        if self.compiled:
            begin_step()

    def chunk(
        self, model: PI0, obs: Observation, noise_BKTA: Tensor, guide: guidance.Guide | None = None, **solver: Any
    ) -> Tensor:
        """From noise to actions, float32 (B, K, T, A).

        Args:
            solver: arguments of `flow.integrate`.
        """
        self.begin()
        context = self.context(model, obs)
        if not self.compiled:  # compiled graphs compute these cheaply, and may not write into their inputs
            context = self._shared_by_steps(model, context, noise_BKTA, guide)

        def embed(time: Tensor) -> Tensor:
            return model.embed_time(guidance.token_times(time, guide))

        def field(x: Tensor, time: Tensor, time_embedding: Tensor) -> Tensor:
            return self.velocity(model, x, time, time_embedding, context, guide)

        with contextlib.nullcontext() if self.compiled else packed(model.expert):
            return flow.integrate(field, embed, guidance.begin(noise_BKTA, guide), **solver)

    @staticmethod
    def _shared_by_steps(model: PI0, context: Context, noise_BKTA: Tensor, guide: guidance.Guide | None) -> Context:
        """The context with all that the steps share: positions, the mask, and memory for new keys and values."""
        cache, (samples, steps) = context.cache, noise_BKTA.shape[1:3]
        rope_and_mask = model.rope_and_mask(context, samples, steps, cache[0].keys_BSD.dtype)
        if guide is None or guide.mode != "vjp":  # vjp differentiates, and this memory is overwritten
            cache = preallocate(cache, samples * steps)
        return context._replace(cache=cache, rope_and_mask=rope_and_mask)
