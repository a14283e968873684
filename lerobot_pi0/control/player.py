"""Action queue and sampling of chunks in control: `Player` samples chunks, continues the one that is being executed
(real-time chunking), and hands out one action per call.

Axes: B batch, K = 1 flow sample, T steps of a chunk, A action dims.
"""

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from ..configuration_pi0 import PI0Config
from ..inputs.observation import ObservationMaker
from ..inputs.steps import Anchor
from ..kernels.cuda_layers import on_gpu
from ..network import flow
from ..network.pi0 import PI0, Observation
from . import debug, guidance
from .attention import is_recorded
from .attention_view import AttentionView
from .bounds import ActionBounds
from .sampling import Sampler

logger = logging.getLogger(__name__)

WARM_UP = (16, 8, 32, 48)
"""Lengths of prompts, in tokens, for which kernels are loaded before the first chunk."""


@dataclass(eq=False)
class Episode:
    """The chunk that one thread executes."""

    queue: deque[Tensor] = field(default_factory=deque)
    anchor: Anchor = field(default_factory=Anchor)
    environments: int = 0
    has_begun: bool = False
    is_over: bool = False  # another thread may set it; this episode's thread then clears its queue before an action


class Episodes(threading.local):
    """`mine` is the episode of the thread that asks for it. Each thread's is made at its first access."""

    def __init__(self, known: "weakref.WeakSet[Episode]") -> None:
        self.mine = Episode()
        known.add(self.mine)


def _to(device: torch.device, state: Tensor | None) -> Tensor | None:
    """The state there; None for a policy without a state."""
    return None if state is None else state.to(device)


class Player:
    """The state of control between calls. The network is an argument of each call; it is never stored.

    LeRobot may run several episodes with one policy, each in its own thread (`--eval.max_parallel_tasks`). So each
    thread has its own queue.
    """

    def __init__(
        self,
        config: PI0Config,
        observe: ObservationMaker,
        sampler: Sampler,
        autocast: Callable[[], AbstractContextManager[Any]],
        bounds: ActionBounds | None,
    ) -> None:
        """Begin with an empty queue.

        Args:
            observe: turns batches into observations.
            sampler: samples chunks from the network.
            autocast: the context in which the network is called.
            bounds: limits on actions, if there are any.
        """
        self.config, self._observe, self._sampler, self._autocast = config, observe, sampler, autocast
        self._bounds = bounds
        self._view = AttentionView(config)
        self._warned_of_delay = self._is_warm = False
        self.rtc_processor = debug.make_processor(None)
        self._known: weakref.WeakSet[Episode] = weakref.WeakSet()
        self._episodes = Episodes(self._known)

    def reset(self) -> None:
        """Forget the chunk that this thread executes: nothing else is kept from one call to the next.

        If this thread executes no chunk, for example because it only watches a robot, all threads forget theirs.
        """
        mine = self._episodes.mine
        for episode in [mine] if mine.has_begun else list(self._known):
            episode.is_over = True
        mine.has_begun = False

    def __getstate__(self) -> dict[str, Any]:
        """State for a copy, which continues the chunk of the thread that copies; thread-locals cannot be copied."""
        return {**self.__dict__, "_known": None, "_episodes": self._episodes.mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._known = weakref.WeakSet()
        self._episodes = Episodes(self._known)
        self._episodes.mine.__dict__ |= state["_episodes"].__dict__

    def warm_up(self, model: PI0) -> None:
        """Once, on CUDA: sample chunks from blank images, so that the robot's first chunk does not wait for kernels.

        LeRobot's real-time chunking assumes the delay of the slowest chunk for all chunks. Prompts of other lengths may
        need other kernels, and guided chunks need more. CUDA graphs are not made here, but from real observations.
        """
        device = model.action_in_proj.weight.device
        if self._is_warm or not on_gpu(device):
            return
        self._is_warm = True
        sampler = self._sampler if self._sampler.graphs is None else Sampler()
        noise = torch.zeros(1, 1, self.config.chunk_size, self.config.max_action_dim, device=device)
        lengths = WARM_UP[:1] if self.config.compile_model else WARM_UP  # a compiled network sees few lengths
        with torch.inference_mode(False), torch.no_grad(), self._autocast():
            guided = self._guide(torch.ones(1, self._dims, device=device), 1, None, noise)
            for length in sorted({min(n, self.config.tokenizer_max_length or 1) for n in lengths}):
                for guide in [None] if guided is None else [None, guided]:
                    sampler.chunk(model, self._blank(length, device), noise, guide, **self._solver())

    def _blank(self, length: int, device: torch.device) -> Observation:
        """An observation of blank images with a prompt of this length."""
        cfg = self.config
        images = torch.zeros(1, max(1, len(cfg.image_features)), 3, cfg.image_size, cfg.image_size, device=device)
        tokens = torch.ones(1, length, dtype=torch.long, device=device)
        state = torch.zeros(1, cfg.max_state_dim, device=device)
        return Observation(images, tokens, tokens > 0, state, padded=cfg.compile_model)

    def _solver(self, steps: int | None = None) -> dict[str, Any]:
        cfg = self.config
        steps = cfg.num_inference_steps if steps is None else steps
        return {"solver": cfg.solver, "steps": steps, "tolerance": cfg.solver_tolerance, "dims": self._dims}

    @property
    def _dims(self) -> int:
        return self.config.output_features[ACTION].shape[0]

    def chunk(
        self,
        model: PI0,
        batch: dict[str, Any],
        noise: Tensor | None,
        inference_delay: int | None,
        prev_chunk_left_over: Tensor | None,
        execution_horizon: int | None,
        num_steps: int | None = None,
    ) -> Tensor:
        """A chunk within the bounds; arguments and errors are those of `PI0Policy.predict_action_chunk`."""
        cfg, device = self.config, model.action_in_proj.weight.device
        obs = self._observe(batch, device)
        shape = (len(obs.state_BA), cfg.chunk_size, cfg.max_action_dim)
        noise = flow.sample_noise(shape, device) if noise is None else noise
        if noise.shape != shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, expected {shape}")
        guide = self._guide(prev_chunk_left_over, inference_delay or 0, execution_horizon, noise[:, None])
        steps = cfg.num_inference_steps if num_steps is None else num_steps
        record = debug.recorder(self.rtc_processor, steps, inference_delay or 0, execution_horizon)
        with self._view.shown(model, obs, batch) if cfg.show_attention else nullcontext():
            actions = self.sample(model, obs, noise, guide, steps, record)
        return actions if self._bounds is None else self._bounds.chunk(actions, _to(device, batch.get(OBS_STATE)))

    def sample(
        self,
        model: PI0,
        obs: Observation,
        noise_BTA: Tensor,
        guide: guidance.Guide | None = None,
        steps: int | None = None,
        record: debug.Record | None = None,
    ) -> Tensor:
        """The network's chunk before the bounds, float32 (B, T, dims of the robot's actions).

        Args:
            noise_BTA: standard normal; `noise_temperature` times it is where the integration starts.
            steps: number of solver steps, in place of `config.num_inference_steps`.
            record: called with debug data; such a chunk is not compiled, nor is one whose attention is recorded.

        Raises:
            FloatingPointError: the network's output is not finite.
        """
        sampler = self._sampler if record is None and not is_recorded(model) else Sampler()
        temperature: float = self.config.noise_temperature  # type: ignore[assignment]  # resolved: not None
        with self._autocast():
            chunk = sampler.chunk(model, obs, temperature * noise_BTA[:, None], guide, record, **self._solver(steps))
        actions = chunk[:, 0, :, : self._dims]
        if not actions.isfinite().all():
            raise FloatingPointError(
                "π₀ produced actions that are not finite, so none is returned: check the weights and that the "
                "statistics of the preprocessor are those of training"
            )
        return actions

    def needs_chunk(self) -> bool:
        """Whether this thread has executed all actions of its last chunk."""
        episode = self._episodes.mine
        if episode.is_over:
            episode.queue.clear()
            episode.is_over = False
        return not episode.queue

    def start(self, chunk_BTA: Tensor, batch: dict[str, Any]) -> None:
        """Put the first `n_action_steps` actions of a chunk, which was predicted from this batch, into the queue."""
        episode = self._episodes.mine
        episode.has_begun, episode.environments = True, len(chunk_BTA)
        episode.queue.extend(chunk_BTA[:, : self.config.n_action_steps].unbind(dim=1))
        episode.anchor.set(batch)

    def next_action(self, batch: dict[str, Any]) -> Tensor:
        """The next action (B, dims), bounded by the measured joints of this batch.

        Raises:
            RuntimeError: the number of environments changed in the middle of a chunk.
            FloatingPointError: there are bounds, and the state or an action is not finite.
        """
        episode = self._episodes.mine
        queue, origin = episode.queue, episode.anchor.restore(batch)
        if OBS_STATE in batch and len(batch[OBS_STATE]) != episode.environments:
            raise RuntimeError(
                f"{len(batch[OBS_STATE])} observations for a chunk that was made for {episode.environments}: call "
                "reset() between episodes"
            )
        action = queue.popleft()
        if self._bounds is None:
            return action
        return self._bounds.step(action, *(_to(action.device, x) for x in (batch.get(OBS_STATE), origin)))

    def prepare_guidance(self) -> None:
        """Check `config.rtc_config` before a robot moves, and make its processor; log how chunks are guided.

        Raises:
            ValueError: a horizon below 1, an unknown schedule, or LeRobot's mode `trained` for a policy that is guided
                in another way.
        """
        self.rtc_processor = debug.make_processor(self.config.rtc_config)
        rtc = self.config.rtc_config
        if rtc is None or not rtc.enabled:
            return
        if rtc.execution_horizon < 1:
            raise ValueError(
                f"execution_horizon={rtc.execution_horizon} leaves no action to continue: set "
                "--inference.rtc.execution_horizon to more than the delay, counted in actions"
            )
        if getattr(rtc, "mode", None) == "trained":
            debug.check_trained_mode(self.config, rtc.execution_horizon)
        guidance.prefix_weights(rtc.prefix_attention_schedule.value, 0, torch.ones(1, 1), 1)
        logger.info("real-time chunking: rtc_guidance=%s", self.config.guidance)

    def _guide(
        self, left_over: Tensor | None, delay: int, horizon: int | None, noise_BKTA: Tensor
    ) -> guidance.Guide | None:
        cfg, rtc = self.config, self.config.rtc_config
        if rtc is None or not rtc.enabled:
            return None
        if left_over is not None and left_over.numel() and left_over.shape[-1] < self._dims:
            raise ValueError(
                f"prev_chunk_left_over has {left_over.shape[-1]} dims and the robot {self._dims}: the missing ones "
                "would be guided to the mean action. Give what this policy's predict_action_chunk returned"
            )
        if cfg.guidance == "trained" and delay > (most := cfg.rtc_training_max_delay or 0):
            if not self._warned_of_delay:
                self._warned_of_delay = True
                logger.warning(
                    "a chunk comes %d actions late, the policy was trained for %d: the arm may jerk. Train with a "
                    "larger rtc_training_max_delay, or give --policy.rtc_guidance=identity",
                    delay,
                    most,
                )
            delay = most
        return guidance.make_guide(
            cfg.guidance,
            left_over,
            delay,
            rtc.execution_horizon if horizon is None else horizon,
            noise_BKTA,
            rtc.prefix_attention_schedule.value,
            rtc.max_guidance_weight,
        )
