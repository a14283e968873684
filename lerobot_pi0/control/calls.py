"""The network's two calls as training and control make them: as they are, or compiled (`compile_model`).

What is compiled are the functions and not the policy: they take the network as an argument, whole graphs without a
break, with shapes that stay from chunk to chunk. All that depends on values (checks, the length of prompts) happens
before, in `observation.py`, and after.

Axes: B batch, K flow samples, T steps of a chunk, A action dim.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.linear import packed
from ..network import flow
from ..network.attention import with_room
from ..network.pi0 import PI0, Context, Observation
from . import guidance

RECOMPILATIONS = 64
"""Prompts come in at most four lengths, times training and control, times guided and not; PyTorch's limit is eight."""


def velocity(
    model: PI0, x_BKTA: Tensor, time: Tensor, term: Tensor, context: Context, guide: guidance.Guide | None = None
) -> Tensor:
    """`PI0.velocity`, guided if there is a guide.

    Args:
        time: broadcasts against (B, K, T).
        term: `embed_time` of the tokens' times.
    """
    if guide is None:
        return model.velocity(x_BKTA, term, context)
    return guidance.guided(lambda x: model.velocity(x, term, context), x_BKTA, time, guide)


class Calls:
    """`context` and `velocity` of a network that is given with each call."""

    context: Callable[..., Context]
    velocity: Callable[..., Tensor]

    def __init__(self, compile_mode: str | None = None) -> None:
        """
        Args:
            compile_mode: torch.compile's mode; None compiles nothing.
        """
        self.context, self.velocity = PI0.context, velocity
        self.compiled = compile_mode is not None
        if self.compiled:
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, RECOMPILATIONS)
            how: dict[str, Any] = {"fullgraph": True, "dynamic": False, "mode": compile_mode}
            self.context = torch.compile(self.context, **how)
            self.velocity = torch.compile(self.velocity, **how)

    def begin(self) -> None:
        """To be called before the first call of a chunk or a loss: what CUDA graphs returned before may be reused."""
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()

    def chunk(
        self, model: PI0, obs: Observation, noise_BKTA: Tensor, guide: guidance.Guide | None = None, **solver: Any
    ) -> Tensor:
        """From noise to actions, float32 (B, K, T, A).

        Args:
            solver: arguments of `flow.integrate`.
        """
        self.begin()
        context = self.context(model, obs)
        if not self.compiled:  # graphs join these small things to others, and want copies
            cache, (samples, steps) = context.cache, noise_BKTA.shape[1:3]
            frame = model.frame(context, samples, steps, cache[0][0].dtype)
            differentiated = guide is not None and guide.mode == "vjp"
            room = cache if differentiated else with_room(cache, samples * steps)
            context = context._replace(cache=room, frame=frame)

        def embed(time: Tensor) -> Tensor:
            return model.embed_time(guidance.token_times(time, guide))

        def field(x: Tensor, time: Tensor, term: Tensor) -> Tensor:
            return self.velocity(model, x, time, term, context, guide)

        with contextlib.nullcontext() if self.compiled else packed(model.expert):
            return flow.integrate(field, embed, guidance.begin(noise_BKTA, guide), **solver)
