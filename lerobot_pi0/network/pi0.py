"""The network of π₀ as two calls: `context` encodes an observation, `velocity` computes the velocity of noisy actions.

Axes: B batch, N cameras, L prompt tokens, S tokens of the context, K flow samples, T steps of a chunk,
A action dim, W width, H query heads.

Tokens form three blocks, each of which sees itself and the earlier ones (paper, section IV): the prefix (images and
prompt, with the VLM's weights), the state and the actions (with the expert's weights). The prefix never sees the state
and the state never sees the actions. So the first two blocks are computed once per observation, and an action token
needs only their keys and values.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from einops import rearrange, repeat
from torch import Tensor, nn

from . import flow, time_embedding
from .attention import KVCache, Mask, additive_mask
from .gemma import Gemma, Rope
from .siglip import VisionTower
from .sizes import Architecture


class Observation(NamedTuple):
    """Inputs of the network: only cameras that exist, no padding beyond the longest prompt."""

    images_BNCHW: Tensor  # in [-1, 1]
    tokens_BL: Tensor
    token_mask_BL: Tensor  # False on padding
    state_BA: Tensor
    padded: bool = True  # False if it is known that no token is padding: then no mask is needed
    prefix: Sequence[KVCache] | None = None  # keys and values of images and prompt per layer, if they are known already


class Context(NamedTuple):
    """Prefix and state, as the expert's action tokens see them."""

    cache: Sequence[KVCache]  # per layer, S tokens each
    mask_BS: Tensor  # False on padding
    state_B1W: Tensor | None = None  # the state's token, if it is not in the cache but runs with the actions
    rope_and_mask: tuple[Rope, Mask | None] | None = None  # of the actions, if several velocities share them
    padded: bool = True


def block_mask(mask_BS: Tensor, samples: int, steps: int, heads: int, with_state: bool = False) -> Tensor:
    """Attention mask of K samples of T action tokens: each sees the context (except padding) and its own sample.

    With a single sample, all queries see the same keys and share one row. The examples have one head and one row per
    query. Left: two samples of two tokens, after a context of three tokens, the last of which is padding. Right: the
    state's token runs with them, in the first row, and sees no action:

        1 1 0   1 1 0 0          1 1 0   1 0 0 0 0
        1 1 0   1 1 0 0          1 1 0   1 1 1 0 0
        1 1 0   0 0 1 1          1 1 0   1 1 1 0 0
        1 1 0   0 0 1 1          1 1 0   1 0 0 1 1
                                 1 1 0   1 0 0 1 1

    Returns:
        boolean (B, 1, S + T) for one sample without the state, (B, Q·H, S + Q) for Q = K·T or 1 + K·T queries.
    """
    own = repeat(torch.eye(samples, device=mask_BS.device), "k l -> (k t) (l u)", t=steps, u=steps)
    if with_state:
        own = F.pad(F.pad(own, (0, 0, 1, 0)), (1, 0), value=1.0)
    shared = samples == 1 and not with_state
    own = own[:1] if shared else own.repeat_interleave(heads, dim=0)
    seen = mask_BS[:, None].expand(-1, len(own), -1)
    return torch.cat([seen, own.bool().expand(len(mask_BS), -1, -1)], dim=2)


class PI0(nn.Module):
    """The network of π₀. Its parameters have the names of published checkpoints; `vision`, `vlm` and `expert` are
    short names for its parts."""

    paligemma_with_expert: Any
    sample_noise = staticmethod(flow.sample_noise)

    def __init__(self, arch: Architecture, image_size: int) -> None:
        super().__init__()
        self.arch = arch
        self._frequencies: tuple[Any, Tensor] | None = None
        vlm, width = arch.vlm, arch.expert.width
        paligemma = nn.ModuleDict(
            {
                "vision_tower": VisionTower(vlm.vision, image_size),
                "multi_modal_projector": nn.ModuleDict({"linear": nn.Linear(vlm.vision.width, vlm.gemma.width)}),
                "language_model": Gemma(vlm.gemma, vlm.vocab_size),
            }
        )
        self.paligemma_with_expert = nn.ModuleDict(
            {
                "paligemma": nn.ModuleDict({"model": paligemma}),
                "gemma_expert": nn.ModuleDict({"model": Gemma(arch.expert)}),
            }
        )
        self.state_proj = nn.Linear(arch.state_dim, width)
        self.action_in_proj = nn.Linear(arch.action_dim, width)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)
        self.action_out_proj = nn.Linear(width, arch.action_dim)

    @property
    def paligemma(self) -> Any:
        """Vision tower, projector and language model: what is frozen when only the expert is trained."""
        return self.paligemma_with_expert["paligemma"]["model"]

    @property
    def vision(self) -> VisionTower:
        return self.paligemma["vision_tower"]

    @property
    def vlm(self) -> Gemma:
        return self.paligemma["language_model"]

    @property
    def expert(self) -> Gemma:
        return self.paligemma_with_expert["gemma_expert"]["model"]

    def unread_parameters(self) -> list[nn.Parameter]:
        """Parameters of published checkpoints on which no action depends: from the VLM's last layer only keys and
        values are used, so its queries, attention output and MLP are not, nor is the final norm."""
        last = self.vlm.layers[-1]
        modules = last.self_attn.q_proj, last.self_attn.o_proj, last.post_attention_layernorm, last.mlp, self.vlm.norm
        return [p for module in modules for p in module.parameters()]

    def prefix(self, obs: Observation) -> tuple[Tensor, Tensor]:
        """Tokens of the first block (B, S, W), images before the prompt; and which of them are not padding (B, S)."""
        features = self.vision(rearrange(obs.images_BNCHW, "b n c h w -> (b n) c h w"))
        images = self.paligemma["multi_modal_projector"]["linear"](features)
        images_BSW = rearrange(images, "(b n) p w -> b (n p) w", b=len(obs.images_BNCHW))
        prompt_BLW = self.vlm.embed(obs.tokens_BL)
        mask = torch.cat([obs.token_mask_BL.new_ones(images_BSW.shape[:2]), obs.token_mask_BL], dim=1)
        return torch.cat([images_BSW.to(prompt_BLW.dtype), prompt_BLW], dim=1), mask

    def encode_prefix(self, obs: Observation) -> tuple[Sequence[KVCache], Tensor]:
        """Keys and values of the first block per layer, and which of its tokens are not padding (B, S).

        A frozen VLM runs without autograd: it keeps no activations and has no backward pass. Each call checks whether
        it is frozen, since PEFT and users set `requires_grad` after construction.
        """
        if obs.prefix is not None:
            images = obs.prefix[0].keys_BSD.shape[1] - obs.token_mask_BL.shape[1]
            return obs.prefix, F.pad(obs.token_mask_BL, (images, 0), value=True)
        trains_vlm = torch.is_grad_enabled() and any(p.requires_grad for p in self.paligemma.parameters())
        with torch.set_grad_enabled(trains_vlm):
            x, mask = self.prefix(obs)
            hidden = additive_mask(mask[:, None], x.dtype) if obs.padded else None
            return self.vlm.cache(x, self.vlm.rope(mask.cumsum(dim=1) - 1), hidden), mask

    def context(self, obs: Observation, with_state: bool = True) -> Context:
        """Keys and values of prefix and state, computed once per observation.

        Args:
            with_state: False leaves the state's token to `velocity`. Training does this: `velocity` runs only once
                there, so state and actions go through the expert together, which saves a second pass.
        """
        cache, mask = self.encode_prefix(obs)
        state = self.state_proj(obs.state_BA.to(self.state_proj.weight.dtype))[:, None]
        if not with_state:
            return Context(cache, mask, state, padded=obs.padded)
        position = mask.sum(dim=1, keepdim=True)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        rope = self.expert.rope(position)
        hidden = additive_mask(mask[:, None], state.dtype) if obs.padded else None
        cache = self.expert.cache(state, rope, hidden, past=cache)
        return Context(cache, mask, padded=obs.padded)

    def rope_and_mask(self, context: Context, samples: int, steps: int, dtype: torch.dtype) -> tuple[Rope, Mask | None]:
        """RoPE's angles and the mask for the tokens of `velocity`. The mask is None if each token sees everything."""
        with_state = context.state_B1W is not None
        own = torch.arange(steps, device=context.mask_BS.device).repeat(samples)
        own = F.pad(own + 1, (1, 0)) if with_state else own
        rope = self.expert.rope(context.mask_BS.sum(dim=1, keepdim=True) + own)
        if samples == 1 and not with_state and not context.padded:
            return rope, None
        visible = block_mask(context.mask_BS, samples, steps, self.expert.cfg.heads, with_state)
        return rope, additive_mask(visible, dtype, samples, shared=int(with_state))

    def embed_time(self, time: Tensor) -> Tensor:
        """The part of the first action MLP layer's output that depends on time alone, with its bias: (*, W).

        sin and cos of W/2 frequencies (openpi: `create_sinusoidal_pos_embedding`), then the time half of
        `action_time_mlp_in`. One call serves all steps of a solver. The layer is called with zeros for the actions, and
        its weight is not split in two, so that an adapter (LoRA) around the layer has its effect.
        """
        arch, width = self.arch, self.arch.expert.width
        if time.device.type == "cpu":
            period = time_embedding.periods(width, arch.min_period, arch.max_period, time.device)
            angle = time[..., None].double() * (2 * math.pi / period)
        else:
            angle = time_embedding.angles(time, self._frequency_parts(time))
        embedding = torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.action_time_mlp_in.weight.dtype)
        return self.action_time_mlp_in(F.pad(embedding, (width, 0)))

    def _frequency_parts(self, time: Tensor) -> Tensor:
        """`frequency_parts` on the device of `time`, copied there only once: the host would wait for each copy."""
        wanted = time.device, type(time)
        if self._frequencies is None or self._frequencies[0] != wanted:
            arch = self.arch
            parts = time_embedding.frequency_parts(arch.expert.width, arch.min_period, arch.max_period)
            self._frequencies = wanted, parts.to(time.device, non_blocking=True)
        return self._frequencies[1]

    def velocity(self, x_BKTA: Tensor, time_embedding: Tensor, context: Context) -> Tensor:
        """Velocity of noisy actions: float32, in the shape of `x_BKTA`.

        Args:
            x_BKTA: K chunks per observation, which do not see each other.
            time_embedding: `embed_time` of the actions' times; broadcasts against (B, K, T, W).
        """
        return self.velocity_and_state(x_BKTA, time_embedding, context)[0]

    def velocity_and_state(
        self, x_BKTA: Tensor, time_embedding: Tensor, context: Context
    ) -> tuple[Tensor, Tensor | None]:
        """`velocity`, and the state's token after the last layer (B, 1, W), if it runs with the actions. No action
        depends on it; training may."""
        samples, steps = x_BKTA.shape[1:3]
        width = self.arch.expert.width
        actions = self.action_in_proj(x_BKTA.to(self.action_in_proj.weight.dtype))
        h = self.action_time_mlp_in(F.pad(actions, (0, width)))
        h = F.silu(h - self.action_time_mlp_in.bias.to(h.dtype) + time_embedding)  # both terms include the bias
        h = rearrange(self.action_time_mlp_out(h), "b k t w -> b (k t) w")

        state = context.state_B1W
        if state is not None:
            h = torch.cat([state.to(h.dtype), h], dim=1)
        rope, mask = context.rope_and_mask or self.rope_and_mask(context, samples, steps, h.dtype)
        h = self.expert(h, rope, mask, context.cache)
        state, h = (None, h) if state is None else (h[:, :1], h[:, 1:])
        velocity = self.action_out_proj(h.to(self.action_out_proj.weight.dtype))
        return rearrange(velocity, "b (k t) a -> b k t a", k=samples).float(), state
