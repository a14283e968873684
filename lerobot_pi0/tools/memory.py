"""The memory of a training step: counted with the real network, on tensors that have shapes and no numbers.

The step is LeRobot's: loss, backward pass, gradient clipping, optimizer, average of the weights. Counted is the memory
that torch's tensors ask for. Not counted is what lies below: scratch space of kernels, what the allocator rounds up or
leaves empty, the driver. The operators are those of the CPU; some operators of GPUs keep less.

Axes: B batch, L prompt tokens, K flow samples, T steps of a chunk, A action dim.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lerobot.optim import OptimizerConfig
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from ..configuration_pi0 import PI0Config
from ..kernels import absent, rounding
from ..modeling_pi0 import PI0Policy
from ..network.attention import KVCache
from ..network.pi0 import Observation
from ..training.context_store import context_shape
from ..training.optimizers import use_fused_kernel

POINTS = (1, 8, 64)
"""Batch sizes that are counted. At each moment of a step memory is linear in the batch size, so the peak of a part of
the step is convex: between two counted sizes it is at most the straight line between them."""


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are created while it is active and still exist.

    `most` is their maximum since `restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, out)
        return out

    def _see(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage not in self._known:
            self._known[storage] = True
            size = storage.nbytes()
            weakref.finalize(storage, self._free, size)
            self.now += size
            self.most = max(self.most, self.now)

    def _free(self, size: int) -> None:
        self.now -= size

    def restart(self) -> None:
        """Start a new maximum."""
        self.most = self.now


class Count(NamedTuple):
    """Bytes. The peaks count all tensors of the process, for each part of the step."""

    weights: int
    gradients: int
    optimizer: int  # its states and the average of the weights (EMA)
    activations: int  # tensors kept for the backward pass, and the batch
    peaks: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def at(self) -> str:
        """The part of the step that has the peak."""
        return max(self.peaks, key=lambda part: self.peaks[part])


@dataclass(frozen=True)
class Load:
    """What one sample holds: images as (height, width) as recorded, and tokens of the prompt."""

    images: tuple[tuple[int, int], ...]
    prompt: int


class Counter:
    """Counts the memory of training steps for one configuration."""

    def __init__(
        self,
        config: PI0Config,
        adapter: Mapping[str, Any] | None = None,
        optimizer: OptimizerConfig | None = None,
        as_on_gpu: bool = True,
    ) -> None:
        """Build the policy and its optimizer without weights. Changes `config`.

        Args:
            adapter: what `--peft.*` hands to LeRobot.
            optimizer: in place of the policy's own.
            as_on_gpu: the optimizer updates all weights in one call, as torch's do on GPUs and not on CPUs; AdamW by
                its fused kernel (`use_fused_kernel`), which needs no temporary memory.

        Raises:
            ValueError: nothing would be trained, or what is asked for does not go together.
        """
        self.policy = _policy_without_weights(config, adapter)
        self._fake, self._live = FakeTensorMode(), Live()
        with self._fake, self._live:
            self._allocate_weights()
            self._weights = self._live.now
            self._make_optimizer(optimizer or config.get_optimizer_preset(), as_on_gpu)
            self._states = self._live.now - self._weights

    def _allocate_weights(self) -> None:
        """Give every parameter a tensor of its shape and dtype, which holds no numbers."""
        rounded, left_out = rounding.layers(self.policy), absent.names(self.policy)
        named = {name: p for name, p in self.policy.named_parameters() if name not in left_out}
        weights = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in named.items()}
        for name in rounded.keys() & weights.keys():
            rounded[name].put(weights.pop(name))
        self.policy.load_state_dict(weights, strict=False, assign=True)
        del weights
        self.policy.finish().train()

    def _make_optimizer(self, preset: OptimizerConfig, as_on_gpu: bool) -> None:
        """Build it and take one step, in which it creates its states."""
        trained = self.policy.get_optim_params()
        self._optimizer: Any = preset.build(trained)
        self._clip = preset.grad_clip_norm
        if as_on_gpu:
            use_fused_kernel(self._optimizer, on="cpu")  # these tensors stand for the GPU's
        for group in self._optimizer.param_groups:
            if "foreach" in group and not group.get("fused"):
                group["foreach"] = as_on_gpu
        for p in trained:
            p.grad = torch.zeros_like(p)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def trained(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.policy.parameters() if p.requires_grad)

    def count(self, batch: int, load: Load) -> Count:
        """Count a step of `batch` samples."""
        live, peaks = self._live, {}
        with self._fake, live:
            idle = live.now
            live.restart()
            given = self._batch(batch, load)
            loss = self._loss(*given)
            kept, peaks["forward"] = live.now - idle, live.most
            live.restart()
            loss.backward()
            gradients = sum(p.grad.nbytes for p in self.policy.parameters() if p.grad is not None)
            peaks["backward"] = live.most
            live.restart()
            self._update()
            peaks["optimizer"] = live.most
            del given, loss
        return Count(self._weights, gradients, self._states, kept, peaks)

    def _batch(self, batch: int, load: Load) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """Images, tokens, state and actions, as the preprocessor hands them over but for their padding."""
        cfg = self.policy.config
        pixel = (1, 1) if absent.names(self.policy) else None  # in place of a picture, where contexts are cached
        images = {str(i): torch.empty(batch, 3, *(pixel or size)) for i, size in enumerate(load.images)}
        tokens = torch.zeros(batch, load.prompt, dtype=torch.long)
        actions = torch.empty(batch, 1, cfg.chunk_size, cfg.max_action_dim)
        return images, tokens, torch.empty(batch, cfg.max_state_dim), actions

    def _loss(self, images: dict[str, Tensor], tokens: Tensor, state: Tensor, actions: Tensor) -> Tensor:
        policy = self.policy
        obs = self._observation(images, tokens, state)
        noise = torch.empty(len(state), policy.config.flow_samples or 1, *actions.shape[2:])
        return policy.objective.errors(policy.model, obs, actions, noise, torch.empty(noise.shape[:2])).mean()

    def _observation(self, images: dict[str, Tensor], tokens: Tensor, state: Tensor) -> Observation:
        """The batch as the network sees it; cached contexts come from the disk, without pictures."""
        policy, mask = self.policy, torch.ones_like(tokens, dtype=torch.bool)
        if not absent.names(policy):
            return policy.observe.assemble(images, tokens, mask, state)
        shape = context_shape(policy.config, len(images), tokens.shape[1])
        x = torch.empty(len(state), *shape, dtype=getattr(torch, policy.config.dtype))
        prefix = [KVCache(*layer.unbind(1)) for layer in x.unbind(1)]
        return Observation(state.new_empty(0), tokens, mask, state, prefix=prefix)

    def _update(self) -> None:
        """What LeRobot's loop does after the backward pass."""
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self._clip or float("inf"))
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.policy.update()


def _policy_without_weights(config: PI0Config, adapter: Mapping[str, Any] | None) -> PI0Policy:
    """The policy on the `meta` device, quantized and with its adapter as `config` says. Changes `config`.

    Raises:
        ValueError: nothing would be trained, or what is asked for does not go together.
    """
    kind, config.vlm_quantization = config.vlm_quantization, None  # this machine may have no kernels for it
    if kind and not config.train_expert_only:
        raise ValueError("vlm_quantization rounds a VLM that is frozen: leave it out, or train the expert alone")
    config.device, config.compile_model = "cpu", False
    config.max_action_step = config.action_range_margin = None  # they need statistics, and no memory
    policy = PI0Policy.empty(config, pretrained=bool(config.pretrained_path or config.vlm_path))
    config.save_expert_only = False  # nothing is saved, and there need be no checkpoint
    if kind:
        config.vlm_quantization = kind
        rounding.prepare(policy.model, kind)
    if adapter is not None:
        policy.wrap_with_peft(peft_cli_overrides=dict(adapter))
    return policy.train()  # gives the weights the dtypes of training


def count(counter: Counter, load: Load, batch: int, points: Sequence[int] = POINTS) -> dict[int, Count]:
    """Count steps of `batch` samples, and of the batch sizes that `peak_at` needs."""
    return {size: counter.count(size, load) for size in sorted({batch, *points})}


def peak_at(counts: Mapping[int, Count], batch: int) -> float:
    """Peak of a batch size that was not counted: linear between its two neighbours, for each part of the step."""
    sizes = sorted(counts)
    above = next((i for i, size in enumerate(sizes) if size >= batch), len(sizes) - 1)
    low, high = sizes[max(above, 1) - 1], sizes[max(above, 1)]
    weight = (batch - low) / (high - low)
    pairs = ((counts[low].peaks[part], counts[high].peaks[part]) for part in counts[low].peaks)
    return max(a + (b - a) * weight for a, b in pairs)


def largest_batch(counts: Mapping[int, Count], limit: float) -> int:
    """The largest batch whose peak stays within `limit` bytes; 0 if not even one sample does."""
    low, high = 0, 1
    while peak_at(counts, high) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak_at(counts, middle) <= limit else (low, middle)
    return low
