"""Bounds on actions, for real robots: how far they may be from the measured joints, and how far outside the data.

The policy applies the bounds, not a processor, for two reasons. A checkpoint's processors are rebuilt from their files
and see no option of a command, but `--policy.max_action_step=5` has to work on every checkpoint. And a checkpoint with
bounds has to load in a LeRobot without this plugin. The policy's numbers are normalised; LeRobot's own processor steps
convert them into the robot's units, with the statistics of the checkpoint's processors.

Axes: B batch, T steps of a chunk, A action dims.
"""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from lerobot.configs import NormalizationMode
from lerobot.lerobot_types import TransitionKey
from lerobot.processor import NormalizerProcessorStep, UnnormalizerProcessorStep
from lerobot.processor.converters import create_transition
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from ..configuration_pi0 import PI0Config
from ..inputs.features import Statistics
from ..inputs.joints import names_in_config, relative_mask
from ..inputs.normalisation import Normalisation, name_of_bad, problem_of

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_WARNINGS = 1.0
"""Bounds may change actions at every tick of a control loop, but a warning is logged at most once a second."""

ROUNDING = 8 * torch.finfo(torch.float32).eps
"""How far the processors' float32 arithmetic may move a joint on its way to the robot, as a part of its size."""


class BoundsError(ValueError):
    """Bounds that are impossible with these features or statistics."""


def make_bounds(
    config: PI0Config, statistics: Callable[[], Statistics | Normalisation | None]
) -> "ActionBounds | None":
    """The bounds that the options ask for; None if they ask for none.

    Args:
        statistics: reads the statistics, or the whole normalisation of the checkpoint's processors; called only if a
            bound is asked for.

    Raises:
        BoundsError: statistics are missing, or the bounds make no sense with these features.
    """
    if all(x in (None, math.inf) for x in (config.max_action_step, config.action_range_margin)):
        return None
    found = statistics() or {}
    return ActionBounds(config, found if isinstance(found, Normalisation) else Normalisation.of(config, found))


class ActionBounds:
    """Keeps normalised actions within bounds in the robot's units, and logs each change."""

    def __init__(self, config: PI0Config, normalisation: Normalisation) -> None:
        self.config, stats = config, normalisation.statistics
        self._most, self._margin = (
            None if x == math.inf else x for x in (config.max_action_step, config.action_range_margin)
        )
        features = {**config.input_features, **config.output_features}
        features = {key: x for key, x in features.items() if key in (OBS_STATE, ACTION)}
        modes = {feature.type: normalisation.mode(feature) for feature in features.values()}
        wanted = {key: {k: torch.as_tensor(v) for k, v in stats[key].items()} for key in features if key in stats}
        self._check(features, modes, wanted)
        if problem := problem_of(config, normalisation):
            raise BoundsError(f"max_action_step and action_range_margin cannot be kept: {problem}; recompute it")
        self._to_units = UnnormalizerProcessorStep(features, modes, wanted, eps=normalisation.epsilon)
        self._normalise = NormalizerProcessorStep(features, modes, wanted, eps=normalisation.epsilon)
        dims = features[ACTION].shape[0]
        at_one = torch.tensor([[-1.0], [1.0]]).expand(2, dims)
        self._scale = self._convert(self._to_units, at_one).abs().amax(dim=0)
        self.names = names_in_config(config, ACTION)
        self._relative = torch.tensor(relative_mask(config, dims)) & config.use_relative_actions
        if self._margin is not None:
            ends = torch.stack([wanted[ACTION][name].double() for name in ("min", "max")])
            low, high = ends + torch.tensor([[-1], [1]]) * self._margin * (ends[1] - ends[0])
            inside = torch.minimum(self._rounding(torch.maximum(low.abs(), high.abs())), (high - low) / 2)
            self._range = torch.stack([low + inside, high - inside])
        if self._most is not None:
            self._check_round_trip(dims, self._most)
        self._changes: dict[str, list[Tensor]] = {}
        self._last_warning = -SECONDS_BETWEEN_WARNINGS

    def _check(self, features: dict[str, Any], modes: dict[Any, NormalizationMode], stats: Statistics) -> None:
        """Raises BoundsError where a bound could not be kept."""
        state, action = features.get(OBS_STATE), features[ACTION]
        if self._most is not None and (state is None or state.shape != action.shape):
            raise BoundsError(
                f"max_action_step compares actions with measured joints, but actions have {action.shape} dims and the "
                f"state {None if state is None else state.shape}: use action_range_margin alone"
            )
        asked = "max_action_step and action_range_margin"
        read = {key for key in features if key == ACTION or self._most is not None}
        normalised = {key for key in read if modes[features[key].type] is not NormalizationMode.IDENTITY}
        if missing := sorted((normalised | {ACTION}) - stats.keys()):
            raise BoundsError(
                f"{asked} are in the robot's units, but the policy has no statistics of {', '.join(missing)}: load a "
                "checkpoint with its processors, or remove these options"
            )
        if self._margin is not None and not {"min", "max"} <= stats[ACTION].keys():
            raise BoundsError(
                "action_range_margin needs the data's min and max, which these statistics do not hold: recompute them "
                "(lerobot-edit-dataset --operation.type=recompute_stats) and train, or use max_action_step alone"
            )

    def _check_round_trip(self, dims: int, most: float) -> None:
        """Refuse joints with a standard deviation near zero: the processors would change their bounded actions."""
        probe = self._convert(self._to_units, torch.zeros(1, dims)) + most
        lost = (self._convert(self._to_units, self._convert(self._normalise, probe)) - probe).abs()[0] > 1e-3 * most
        if lost.any():
            fixed = ", ".join(name for name, x in zip(self.names, lost, strict=True) if x)
            raise BoundsError(
                f"max_action_step cannot hold {fixed}, which never moved in the data: for any action, the processors "
                "send the one value that was recorded. Use the robot's own limit (max_relative_target), or "
                "action_range_margin alone"
            )

    def step(self, action_BA: Tensor, state_BA: Tensor | None, origin_BA: Tensor | None = None) -> Tensor:
        """Bound one action, which is executed next, by the measured joints. Arguments and result are normalised.

        Args:
            state_BA: the measured joints; None for a policy without a state, of which `max_action_step` is refused.
            origin_BA: the state to which a relative action is added, its chunk's; by default `state_BA`.
        """
        return self.chunk(action_BA[:, None], state_BA, origin_BA)[:, 0]

    def chunk(self, actions_BTA: Tensor, state_BA: Tensor | None, origin_BA: Tensor | None = None) -> Tensor:
        """Bound the first action by the measured joints, and each later one by the action before it.

        Arguments and result are normalised. The range of the data is applied first, then the distance to the measured
        joints: an arm that stands outside of the data's range moves into it slowly.

        Raises:
            FloatingPointError: an action or a measured joint is not finite.
        """
        self._refuse_bad("the policy's action for", actions_BTA, self.names)
        if self._most is not None and state_BA is not None:
            self._refuse_bad("the measured joint", state_BA, self.names)
        device = actions_BTA.device
        if device.type != "cpu":  # some have no float64, and each small operation would launch a kernel
            measured = (None if x is None else x.cpu() for x in (state_BA, origin_BA))
            return self.chunk(actions_BTA.cpu(), *measured).to(device)
        wanted = self._convert(self._to_units, actions_BTA)
        bounded = wanted
        if self._margin is not None:
            low, high = self._range.to(wanted.device)
            bounded = torch.minimum(torch.maximum(bounded, low), high)
            self._record_change("action_range_margin", wanted - bounded, wanted)
        if (most := self._most) is not None:
            assert state_BA is not None  # or `_check` had refused
            in_range = bounded
            before = self._convert(self._to_units, state_BA, observed=True)
            origin = before if origin_BA is None else self._convert(self._to_units, origin_BA, observed=True)
            offset, steps = origin * self._relative.to(wanted.device), []
            for action in in_range.unbind(dim=1):
                room = (most - 2 * self._rounding(before.abs() + most)).clamp(min=0)
                target = torch.minimum(torch.maximum(action + offset, before - room), before + room)
                steps.append(target - offset)
                before = target
            bounded = torch.stack(steps, dim=1)
            self._record_change("max_action_step", in_range - bounded, before[:, None].abs() + most)
        self._warn()
        changed = (bounded - wanted).abs() > self._rounding(wanted) / 1e3  # an action within the bounds stays as it is
        made = torch.where(changed, self._convert(self._normalise, bounded).to(actions_BTA.dtype), actions_BTA)
        self._refuse_bad("the bounded action for", made, self.names)
        return made

    def _refuse_bad(self, what: str, x: Tensor, names: list[str]) -> None:
        if bad := name_of_bad(x, names):
            raise FloatingPointError(
                f"{what} {bad}: no bound can be kept, so nothing is sent; check the robot's readings and its bus, "
                "and the statistics of the checkpoint's processors"
            )

    def _convert(self, step: Any, x: Tensor, observed: bool = False) -> Tensor:
        """Apply LeRobot's (un)normalisation in float64, whose rounding errors are far too small to matter here."""
        if observed:
            made = step(create_transition(observation={OBS_STATE: x.double()}))
            return made[TransitionKey.OBSERVATION][OBS_STATE].double()
        return step(create_transition(action=x.double()))[TransitionKey.ACTION].double()

    def _rounding(self, x: Tensor) -> Tensor:
        """How far rounding may move a joint at `x`, in its units: a bound is kept by so much more."""
        return ROUNDING * (x.abs() + self._scale)

    def _record_change(self, option: str, cut_BTA: Tensor, at: Tensor) -> None:
        """Keep the changes that a bound made, for the next warning; those of rounding at `at` are none."""
        cut_BTA = torch.where(cut_BTA.abs() > 3 * self._rounding(at), cut_BTA, 0)
        if cut_BTA.any():
            self._changes.setdefault(option, []).append(cut_BTA.abs().flatten(0, -2).cpu())

    def _warn(self) -> None:
        """Log for each joint how often and how much actions were changed since the last warning."""
        if not self._changes or time.monotonic() - self._last_warning < SECONDS_BETWEEN_WARNINGS:
            return
        for option, cuts in self._changes.items():
            cut_NA = torch.cat(cuts)
            worst, counts = cut_NA.amax(dim=0), (cut_NA > 0).sum(dim=0)
            found = zip(self.names, counts, worst, strict=True)
            joints = [f"{name} {n} times, by up to {x:.3g}" for name, n, x in found if n]
            logger.warning("%s=%g bounds actions: %s", option, getattr(self.config, option), "; ".join(joints))
        self._changes.clear()
        self._last_warning = time.monotonic()
