"""Depth maps, scalars and numpy arrays: features that LeRobot passes on in a form that π₀ cannot take.

Axes: B batch, T steps of a chunk, D = 1 dim.
"""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.lerobot_types import EnvTransition, TransitionKey
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_STATE
from lerobot.utils.feature_utils import dataset_to_policy_features
from torch import Tensor

from ..configuration_pi0 import PI0Config

logger = logging.getLogger(__name__)

IS_PAD = f"{ACTION}_is_pad"
"""LeRobot's key for the mask of steps that are beyond the end of the episode."""


class ObservationError(ValueError):
    """A batch that the policy cannot take. The message names the key, what was found, and what to do."""


def is_depth(feature: PolicyFeature) -> bool:
    """Whether this is a camera with one channel: a depth map."""
    return feature.type is FeatureType.VISUAL and 1 in (feature.shape[0], feature.shape[-1])


def cameras_of(dataset: dict[str, dict[str, Any]]) -> dict[str, PolicyFeature]:
    """The cameras of a dataset without depth maps. `dataset` holds its features, as in LeRobotDatasetMetadata."""
    features = dataset_to_policy_features(dataset)
    return {key: x for key, x in features.items() if x.type is FeatureType.VISUAL and not is_depth(x)}


def leave_out_depth(config: PI0Config) -> None:
    """Remove depth maps from the config's input features: π₀ was trained on colour images."""
    features = config.input_features or {}
    depth = [key for key, x in features.items() if is_depth(x)]
    if depth:
        logger.warning("depth cameras are left out, because π₀ takes colour images: %s", ", ".join(depth))
        config.input_features = {key: x for key, x in features.items() if key not in depth}


def has_state(config: PI0Config, names: Mapping[str, Any]) -> bool:
    """Whether the policy has a state, judged by `names`: keys of a batch, or of features or statistics.

    If a dataset has no state, LeRobot gives the config a state feature of `max_state_dim` dims. So a state with a
    feature of this size may be absent.
    """
    feature = (config.input_features or {}).get(OBS_STATE)
    return OBS_STATE in names or feature is None or tuple(feature.shape) != (config.max_state_dim,)


def restore_dims(transition: EnvTransition) -> EnvTransition:
    """Restore the last axis of states and actions with one dim, which LeRobot reads as scalars.

    Such states come as (B,), which LeRobot's step before this one turns into (1, B). Such chunks come as (B, T); the
    length of LeRobot's `action_is_pad` shows that they are not single actions of T dims.
    """
    changed: Any = dict(transition)
    observation, action = transition.get(TransitionKey.OBSERVATION) or {}, transition.get(TransitionKey.ACTION)
    state = observation.get(OBS_STATE)
    if isinstance(state, Tensor):
        samples = [len(x) for key, x in observation.items() if key.startswith(OBS_IMAGE) and _is_batch(x)]
        if state.ndim == 0:
            state = state.reshape(1, 1)
        elif samples and state.ndim == 2 and len(state) == 1 < samples[0] == state.shape[1]:
            state = state.T
        changed[TransitionKey.OBSERVATION] = {**observation, OBS_STATE: state}
    padded = (transition.get(TransitionKey.COMPLEMENTARY_DATA) or {}).get(IS_PAD)
    steps = 0 if padded is None else len(np.ravel(padded))
    if isinstance(action, Tensor) and action.ndim == 2 and action.numel() == steps:
        changed[TransitionKey.ACTION] = action[..., None]
    return changed


def _is_batch(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 4


def check_sample(transition: EnvTransition) -> None:
    """Refuse inputs with which LeRobot's steps would fail with an unclear error.

    Raises:
        ObservationError: there is no task, or a numpy array has no batch dimension (LeRobot adds one only to tensors).
    """
    task = (transition.get(TransitionKey.COMPLEMENTARY_DATA) or {}).get("task")
    if task is None:
        raise ObservationError(
            "no 'task' in the batch: π₀ takes an instruction. Set batch['task'] = 'put the cube into the box', in the "
            "words of the training data, or '' where there is none"
        )
    for key, x in (transition.get(TransitionKey.OBSERVATION) or {}).items():
        axes = 2 if key == OBS_STATE else 4 if key.startswith(OBS_IMAGE) else 0
        if isinstance(x, np.ndarray) and x.ndim < axes:
            raise ObservationError(
                f"{key!r} is a numpy array of shape {x.shape}, and LeRobot's preprocessor adds no batch dimension to "
                "arrays: convert the observation with lerobot.policies.utils.prepare_observation_for_inference"
            )
