"""Training objective: flow-matching losses of a batch, and the error of sampled chunks on held-out data.

Axes: B batch, N cameras, C channels, H height, W width, K flow samples, T steps of a chunk, A action dims.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from lerobot.utils.constants import ACTION
from torch import Tensor

from ..configuration_pi0 import PI0Config
from ..inputs.joints import names_in_config
from ..inputs.observation import IS_PAD, ObservationMaker
from ..inputs.smoothness import Roughness, roughness
from ..kernels.cuda_attention import attention_order
from ..network import flow
from ..network.pi0 import PI0, Context, Observation
from . import augment, draws
from .environment_state import EnvironmentState

logger = logging.getLogger(__name__)

HELD_OUT_SAMPLES = 4
"""Number of flow samples K for a held-out loss. It does not depend on K in training, so all runs can be compared."""


NEAR_NOISE = 0.2
"""Beta of the times during `time_sampling_warmup_steps`: with alpha 1.5, three of five times are above 0.95."""


class NetworkCalls(Protocol):
    """The network calls that a loss needs, as functions of the network."""

    velocity_and_state: Callable[..., tuple[Tensor, Tensor | None]]

    def training_context(self, model: PI0, obs: Observation) -> Context:
        """`PI0.context` without the state's token."""

    def begin(self) -> None:
        """To be called before the first network call of a loss."""


class Objective:
    """Losses of batches. The network is an argument of each call; it is never stored."""

    def __init__(
        self,
        config: PI0Config,
        observe: ObservationMaker,
        calls: NetworkCalls,
        autocast: Callable[[], AbstractContextManager[Any]],
        places: EnvironmentState | None = None,
    ) -> None:
        """Take the seed of the draws from torch's generator.

        Args:
            observe: turns batches into observations.
            calls: how the network is called.
            autocast: the context in which the network is called.
            places: the second loss, if there is one.
        """
        self._places = places
        self.config, self._observe, self._calls, self._autocast = config, observe, calls, autocast
        self._seed = torch.initial_seed()
        self._chunk_errors = ChunkErrors()

    def prepare(self, model: PI0) -> None:
        """Prepare a network whose weights are random for its losses."""
        if self._places is not None:
            self._places.prepare(model)

    @property
    def _joints(self) -> list[str]:
        return names_in_config(self.config, ACTION)

    @property
    def _dims(self) -> int:
        return self.config.output_features[ACTION].shape[0]

    def losses(
        self,
        model: PI0,
        batch: dict[str, Any],
        noise: Tensor | None = None,
        time: Tensor | None = None,
        delay: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Squared errors of the velocity, float32 (B, K, T, dims of the robot's actions); and in training the second
        loss (B,), if there is one.

        With `rtc_training_max_delay` the first `delay` actions are known (arXiv 2512.05964): they enter without noise,
        at t = 0, and their errors are zero. The errors of the other actions are scaled so that the mean over T is the
        mean over these other actions. In evaluation, steps after the end of an episode are left out; in training only
        with `mask_padded_actions`.
        """
        cfg, device = self.config, _device(model)
        augmented = model.training and (cfg.augment_images or cfg.augment_shift)
        obs, index = self._observe.with_index(batch, device, self._augment if augmented else None)
        actions = self._observe.actions(batch, device)[:, None]
        if noise is None or time is None or (delay is None and cfg.rtc_training_max_delay):
            drawn = self._draw(index, (len(actions), *actions.shape[2:]), device, model.training)
            given = zip((noise, time, delay), drawn, strict=True)
            noise, time, delay = (new if old is None else old for old, new in given)
        _check_draws(actions, noise, time, delay)
        places = self._places if model.training else None
        if places is not None:
            noise = places.without_padding(model, noise)
        errors, state = self.errors_and_state(model, obs, actions, noise, time, delay)
        told = None if places is None else places.loss(model, state, batch)
        masked = cfg.mask_padded_actions if model.training else IS_PAD in batch
        if masked:
            valid = self._observe.valid(batch, device)[:, None, :, None].float()
            errors = errors * valid  # in training every valid step has the same weight, whatever the batch
            if not model.training:  # the mean over T becomes the mean over the valid steps
                errors = errors / valid.mean(dim=2, keepdim=True).clamp(min=1 / cfg.chunk_size)
        return errors, told

    def errors(self, *args: Any) -> Tensor:
        """The errors of `errors_and_state`."""
        return self.errors_and_state(*args)[0]

    def errors_and_state(
        self,
        model: PI0,
        obs: Observation,
        actions_B1TA: Tensor,
        noise: Tensor,
        time: Tensor,
        delay: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Errors for given draws, before padded actions are masked, and the state's token (B, 1, W) after the last
        layer. No control flow depends on a tensor's values."""
        time, free = time[..., None], torch.ones(1, device=time.device)
        if self.config.rtc_training_max_delay and delay is not None:
            free = (torch.arange(self.config.chunk_size, device=time.device) >= delay[..., None]).float()
            time = time * free
        x_t, target = flow.interpolate(actions_B1TA, noise, time[..., None])
        self._calls.begin()
        with self._autocast(), attention_order(x_t.device):
            context = self._calls.training_context(model, obs)
            velocity, state = self._calls.velocity_and_state(model, x_t, model.embed_time(time), context)
        errors = (velocity - target)[..., : self._dims].square()
        return errors * (free / free.mean(dim=-1, keepdim=True))[..., None], state

    def summary(self, losses_BKTA: Tensor, told_B: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, float]]:
        """The loss, the loss of each sample (B,), and numbers to log: the loss, that of each joint, and the second."""
        per_sample = losses_BKTA.mean(dim=(1, 2, 3))
        names, numbers = ["loss", *(f"loss_{joint}" for joint in self._joints)], [losses_BKTA.mean(dim=(0, 1, 2))]
        if told_B is not None and self._places is not None:
            names, numbers = [*names, "loss_environment_state"], [*numbers, told_B.mean()[None]]
            per_sample = per_sample + self._places.weight * told_B
        loss = per_sample.mean()
        found = torch.cat([loss[None], *numbers]).tolist()  # one wait for the device
        return loss, per_sample, dict(zip(names, found, strict=True))

    def report_chunk_errors(self) -> None:
        """Log the errors of the chunks that were sampled since the last report."""
        self._chunk_errors.report(self._joints)

    def chunk_error(self, model: PI0, batch: dict[str, Any], sample: Callable[..., Tensor]) -> float:
        """Mean squared error of chunks for a held-out batch. Their noise depends on the sample alone.

        Args:
            sample: makes chunks (B, T, dims) from the network, an observation and noise.
        """
        device = _device(model)
        actions = self._observe.actions(batch, device)
        with torch.inference_mode(False), torch.no_grad():
            obs, index = self._observe.with_index(batch, device)
            noise, *_ = self._draw(index, actions.shape, device, model.training)
            chunk = sample(model, obs, noise[:, 0])
        valid = self._observe.valid(batch, device) if IS_PAD in batch else actions.new_ones(actions.shape[:2])
        return self._chunk_errors.add(chunk, actions[..., : self._dims], valid)

    def _augment(self, images_BNCHW: Tensor, cameras: list[str], index: list[int] | None) -> Tensor:
        """Images of these cameras, each with a random change that depends on seed, update, sample and camera."""
        cfg, fixed = self.config, ["wrist" in key for key in cameras]
        if index is not None:
            _check_index(index, len(images_BNCHW))

        def uniform(use: str, numbers: int) -> Tensor:
            if index is None:
                return torch.rand(numbers, *images_BNCHW.shape[:2], device=images_BNCHW.device)
            every = list(cfg.image_features)
            drawn = augment.draw(use, numbers, self._seed, cfg.updates, index, len(every))
            return draws.send([drawn[..., [every.index(key) for key in cameras]]], images_BNCHW.device)[0]

        if cfg.augment_images:
            images_BNCHW = augment.apply(images_BNCHW, augment.change_of(uniform("images", 6), fixed))
        if cfg.augment_shift:
            images_BNCHW = augment.shift(images_BNCHW, uniform("shifts", 2), fixed, cfg.augment_shift)
        return images_BNCHW

    def _times(self) -> flow.BetaTime:
        """The distribution of times of this update: with `time_sampling_warmup_steps`, near the noise at first."""
        cfg = self.config
        is_early = cfg.updates < (cfg.time_sampling_warmup_steps or 0)
        beta = NEAR_NOISE if is_early else cfg.time_sampling_beta_beta
        return flow.BetaTime(cfg.time_sampling_beta_alpha, beta, cfg.time_sampling_scale, cfg.time_sampling_offset)

    def _draw(
        self, index: list[int] | None, shape_BTA: Sequence[int], device: torch.device, training: bool
    ) -> list[Tensor]:
        """Noise (B, K, T, A), times (B, K) and delays (B, K), which depend on seed, update and sample.

        In evaluation they depend on the sample alone, with a fixed K, LeRobot's distribution of times and no known
        actions, so that held-out losses of runs with different options can be compared. A batch without LeRobot's
        `index` gets draws from torch's own generator.
        """
        cfg = self.config
        samples, most, distribution = HELD_OUT_SAMPLES, 0, flow.BetaTime()
        if training:
            samples, most = cfg.flow_samples or 1, cfg.rtc_training_max_delay or 0
            distribution = self._times()
        batch, *shape_TA = shape_BTA
        shape_KTA = (samples, *shape_TA)
        if index is None:
            shape = (batch, *shape_KTA)
            noise, time = flow.sample_noise(shape, device), distribution.sample(shape[:2], device)
            return [noise, time, draws.sample_delay(shape[:2], most, device)]
        _check_index(index, batch)
        seed, update = (self._seed, cfg.updates) if training else (0, -1)
        return draws.send(draws.repeatable_draws(seed, update, index, shape_KTA, distribution, most), device)


class ChunkErrors:
    """Mean squared error of sampled chunks over the held-out samples of one evaluation.

    The held-out loss that LeRobot reports says little about what the robot will do. LeRobot discards the other
    numbers that a policy returns, so this error is logged here. If actions are normalised by mean and standard
    deviation, its unit is their variance: a policy that always predicts the dataset's mean has an error of 1. Steps
    after the end of an episode do not count.
    """

    def __init__(self) -> None:
        self._sum_A: Tensor | None = None
        self._roughness: Roughness | None = None
        self._steps = 0
        self._samples = 0

    def add(self, chunk_BTA: Tensor, actions_BTA: Tensor, valid_BT: Tensor) -> float:
        """Add a batch; returns its mean squared error."""
        rough = roughness(chunk_BTA, actions_BTA, valid_BT.bool())
        self._roughness = rough if self._roughness is None else self._roughness + rough
        errors_BTA = (chunk_BTA - actions_BTA).square() * valid_BT[..., None]
        steps, sum_A = int(valid_BT.sum()), errors_BTA.sum(dim=(0, 1)).cpu().double()
        self._sum_A = sum_A if self._sum_A is None else self._sum_A + sum_A
        self._steps, self._samples = self._steps + steps, self._samples + len(chunk_BTA)
        return sum_A.mean().item() / max(steps, 1)

    def report(self, joints: Sequence[str]) -> None:
        """Log the error over all batches since the last report, and start again from zero."""
        if self._sum_A is None:
            return
        errors = (self._sum_A / max(self._steps, 1)).tolist()
        logger.info(
            "held out: error of sampled chunks %.4f over %d samples (%s)",
            sum(errors) / len(errors),
            self._samples,
            ", ".join(f"{joint} {error:.4f}" for joint, error in zip(joints, errors, strict=True)),
        )
        if self._roughness is not None:
            rough = zip(joints, self._roughness.sampled, self._roughness.recorded, strict=True)
            each = ", ".join(f"{joint} {own:.3f} {recorded:.3f}" for joint, own, recorded in rough)
            rattling = ", ".join(self._roughness.rattling(joints, [1.0] * len(joints)))
            logger.info(
                "held out: roughness of sampled and of recorded chunks: %s; rattling: %s", each, rattling or "no joint"
            )
        self.__init__()  # type: ignore[misc]


def _device(model: PI0) -> torch.device:
    return model.action_in_proj.weight.device


def _check_index(index: list[int], batch: int) -> None:
    """Raise ValueError if `index` does not have one number for each sample of the batch."""
    if len(index) != batch:
        raise ValueError(f"batch['index'] has {len(index)} numbers for {batch} samples")


def _check_draws(actions_B1TA: Tensor, noise: Tensor, time: Tensor, delay: Tensor | None) -> None:
    """Refuse draws of wrong shapes, which torch would silently broadcast."""
    batch, _, *step = actions_B1TA.shape
    each = (batch, *noise.shape[1:2])
    if noise.shape != (*each, *step) or time.shape != each or (delay is not None and delay.shape != each):
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}, time {tuple(time.shape)}, delay "
            f"{None if delay is None else tuple(delay.shape)}; expected (B, K, T, A) = ({batch}, K, {step[0]}, "
            f"{step[1]}) for noise and (B, K) for the others"
        )
