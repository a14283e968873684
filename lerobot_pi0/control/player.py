"""The player of chunks: samples them, continues the one being executed (real-time chunking), and hands out actions.

Axes: B batch, K = 1 flow sample, T steps of a chunk, A action dims.
"""

import logging
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from ..configuration_pi0 import PI0Config
from ..inputs.observation import ObservationMaker
from ..inputs.steps import Anchor
from ..network import flow
from ..network.pi0 import PI0, Observation
from . import guidance
from .bounds import ActionBounds
from .sampling import Sampler

logger = logging.getLogger(__name__)


class Player:
    """What control keeps between calls. The network is an argument of each call; no network is stored."""

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
        self._warned_of_delay = False
        self.reset()

    def reset(self) -> None:
        """Discard the chunk that is being executed; nothing else is kept between calls."""
        self._queue: deque[Tensor] = deque()
        self._anchor = Anchor()

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
    ) -> Tensor:
        """A chunk within the bounds; arguments and errors are those of `PI0Policy.predict_action_chunk`."""
        cfg, device = self.config, model.action_in_proj.weight.device
        obs = self._observe(batch, device)
        shape = (len(obs.state_BA), cfg.chunk_size, cfg.max_action_dim)
        noise = flow.sample_noise(shape, device) if noise is None else noise
        if noise.shape != shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, expected {shape}")
        guide = self._guide(prev_chunk_left_over, inference_delay or 0, execution_horizon, noise[:, None])
        actions = self.sample(model, obs, noise, guide)
        return actions if self._bounds is None else self._bounds.chunk(actions, batch[OBS_STATE].to(device))

    def sample(self, model: PI0, obs: Observation, noise_BTA: Tensor, guide: guidance.Guide | None = None) -> Tensor:
        """The network's chunk before the bounds, float32 (B, T, dims of the robot's actions).

        Raises:
            FloatingPointError: the network's output is not finite.
        """
        cfg = self.config
        solver = {"solver": cfg.solver, "steps": cfg.num_inference_steps, "tolerance": cfg.solver_tolerance}
        with self._autocast():
            chunk = self._sampler.chunk(model, obs, noise_BTA[:, None], guide, dims=self._dims, **solver)
        actions = chunk[:, 0, :, : self._dims]
        if not actions.isfinite().all():
            raise FloatingPointError(
                "π₀ produced actions that are not finite, so none is returned: check the weights and that the "
                "statistics of the preprocessor are those of training"
            )
        return actions

    def needs_chunk(self) -> bool:
        """Whether all actions of the last chunk are executed."""
        return not self._queue

    def start(self, chunk_BTA: Tensor, batch: dict[str, Any]) -> None:
        """Execute a chunk that was predicted for this batch, up to `n_action_steps`."""
        self._queue.extend(chunk_BTA[:, : self.config.n_action_steps].unbind(dim=1))
        self._anchor.set(batch)

    def next_action(self, batch: dict[str, Any]) -> Tensor:
        """The next action (B, dims), bounded by where the joints are in this batch.

        Raises:
            RuntimeError: the number of environments changed in the middle of a chunk.
        """
        origin = self._anchor.restore(batch)
        if OBS_STATE in batch and len(batch[OBS_STATE]) != len(self._queue[0]):
            raise RuntimeError(
                f"{len(batch[OBS_STATE])} observations for a chunk that was made for {len(self._queue[0])}: call "
                "reset() between episodes"
            )
        action = self._queue.popleft()
        if self._bounds is None:
            return action
        return self._bounds.step(action, batch[OBS_STATE].to(action.device), origin.to(action.device))

    def check_guidance(self) -> None:
        """Check `config.rtc_config` before a robot moves; log how chunks are guided.

        Raises:
            ValueError: a horizon that leaves nothing to guide, or an unknown schedule.
        """
        rtc = self.config.rtc_config
        if rtc is None or not rtc.enabled:
            return
        if rtc.execution_horizon < 1:
            raise ValueError(
                f"execution_horizon={rtc.execution_horizon} leaves no action to continue: set "
                "--inference.rtc.execution_horizon to more than the delay, counted in actions"
            )
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
