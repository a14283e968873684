"""A second loss for networks that learn from random weights in simulation: to tell from what is seen where things are.

Datasets of simulators have `observation.environment_state`: the places of objects, which no policy reads. Flow matching
teaches a small network only slowly where to look (docs/metaworld.md). Here the state's token, which sees pictures,
words and state but no action, has to tell the normalised environment state. What the last layer makes of this token is
otherwise not used.

No weight is added, so a checkpoint is what it would be without. The output layer of the actions reads the token: its
rows beyond the robot's dims, which π₀ pads with zeros. At the input, π₀'s padding is noise, which would disturb a small
network. So the input layer's columns for padding start at zero, and stay there because padding is zero in training.

Axes: B batch, K flow samples, T steps of a chunk, A action dim, W width, E dims of the environment state.
"""

from typing import Any

import torch
from lerobot.utils.constants import ACTION, OBS_ENV_STATE
from torch import Tensor

from ..configuration_pi0 import PI0Config
from ..inputs.features import Statistics
from ..inputs.samples import ObservationError
from ..network.pi0 import PI0

STILL = 1e-6
"""A number whose deviation is below this fraction of its size (or of 1) does not vary, and need not be told."""


class EnvironmentState:
    """The second loss.

    Args:
        weight: of this loss beside that of flow matching.
        dims: of the robot's actions.
        mean, std: (E,) of the environment state in the data.
    """

    def __init__(self, weight: float, dims: int, mean: Tensor, std: Tensor) -> None:
        self.weight, self._dims, self._mean = weight, dims, mean
        varies = std > STILL * mean.abs().clamp(min=1)
        self._scale = torch.where(varies, 1 / std.clamp(min=torch.finfo(std.dtype).tiny), 0)
        self._share = varies / varies.sum().clamp(min=1)  # of each number in the mean
        self._unread: bool | None = None  # whether the network reads no padding of actions; not known yet

    @classmethod
    def of(cls, config: PI0Config, statistics: Statistics | None) -> "EnvironmentState | None":
        """The loss that the options ask for; None if they ask for none, or the data has no environment state.

        Raises:
            ValueError: the data has no statistics of it, or the output layer too few rows.
        """
        if not config.environment_state_weight or OBS_ENV_STATE not in (config.input_features or {}):
            return None
        known = (statistics or {}).get(OBS_ENV_STATE) or {}
        if not {"mean", "std"} <= known.keys():
            raise ValueError(
                f"environment_state_weight needs mean and std of {OBS_ENV_STATE!r}: `lerobot-edit-dataset "
                "--operation.type recompute_stats` makes them; or set --policy.environment_state_weight=0"
            )
        mean, std = (torch.as_tensor(known[name], dtype=torch.float32).reshape(-1) for name in ("mean", "std"))
        dims = config.output_features[ACTION].shape[0]
        if dims + len(mean) > config.max_action_dim:
            raise ValueError(
                f"environment_state_weight needs room for {dims} dims of actions and {len(mean)} of {OBS_ENV_STATE!r} "
                f"in max_action_dim={config.max_action_dim}: train from scratch with --policy.max_action_dim="
                f"{dims + len(mean)}, or set --policy.environment_state_weight=0"
            )
        return cls(config.environment_state_weight, dims, mean, std)

    @torch.no_grad()
    def prepare(self, model: PI0) -> None:
        """Let a network with random weights read no padding of actions."""
        model.action_in_proj.weight[:, self._dims :] = 0

    def without_padding(self, model: PI0, noise_BKTA: Tensor) -> Tensor:
        """The noise, without that of the padding if the network does not read it: so it will not learn to."""
        if self._unread is None:
            self._unread = not bool(model.action_in_proj.weight[:, self._dims :].any())
        if not self._unread:  # it comes from a checkpoint that was trained with this noise
            return noise_BKTA
        return torch.cat([noise_BKTA[..., : self._dims], torch.zeros_like(noise_BKTA[..., self._dims :])], dim=-1)

    def loss(self, model: PI0, state_B1W: Tensor | None, batch: dict[str, Any]) -> Tensor:
        """Mean squared error of what the state's token tells, in variances of the data: float32 (B,).

        Raises:
            ObservationError: the batch has no environment state, or one of other dims than the data's statistics.
        """
        if OBS_ENV_STATE not in batch:
            raise ObservationError(
                f"no {OBS_ENV_STATE!r} in the batch, which environment_state_weight needs: set it to 0"
            )
        assert state_B1W is not None  # in training the state's token runs with the actions
        device, expected = state_B1W.device, (len(state_B1W), len(self._mean))
        seen = torch.as_tensor(batch[OBS_ENV_STATE]).to(device, torch.float32).flatten(1)
        if seen.shape != expected:
            raise ObservationError(f"{OBS_ENV_STATE!r} has shape {tuple(seen.shape)}, expected {expected}")
        if self._mean.device != device:  # once: the host would wait for each copy
            self._mean, self._scale, self._share = (x.to(device) for x in (self._mean, self._scale, self._share))
        told = model.action_out_proj(state_B1W[:, 0].to(model.action_out_proj.weight.dtype)).float()
        errors = told[:, self._dims :][:, : len(self._mean)] - (seen - self._mean) * self._scale
        return (errors.square() * self._share).sum(dim=1)
