"""LeRobot's policy server, with the chunks that lerobot-rollout would send to the robot."""

import logging
import pickle
import threading
import time
from collections.abc import Iterator, Mapping
from queue import Empty
from typing import Any

import torch
from lerobot.async_inference.configs import PolicyServerConfig
from lerobot.async_inference.helpers import RemotePolicyConfig, TimedAction, TimedObservation
from lerobot.async_inference.policy_server import PolicyServer
from lerobot.configs import PreTrainedConfig
from lerobot.policies.utils import prepare_observation_for_inference
from lerobot.processor import RenameObservationsProcessorStep
from lerobot.transport import services_pb2
from lerobot.transport.utils import receive_bytes_in_chunks
from lerobot.utils.constants import OBS_IMAGES, OBS_STATE, OBS_STR
from lerobot.utils.feature_utils import build_dataset_frame

from .. import read_config
from ..data import build_pipelines
from ..evaluation.predictions import load_policy
from .requests import RequestError, limited, read_pickle

logger = logging.getLogger(__name__)

Features = dict[str, dict[str, Any]]


class RolloutServer(PolicyServer):
    """LeRobot's server, but for what a request may hold and what happens to an observation.

    LeRobot's stretches pictures to the shape in the checkpoint's config, takes no camera that the config does not name,
    loads no adapter, and answers an observation that it cannot serve with nothing. Here pictures, cameras, states and
    the task go the way of lerobot-rollout, and what cannot be served is an exception.
    """

    def __init__(
        self,
        config: PolicyServerConfig,
        rename_map: Mapping[str, str] | None = None,
        overrides: list[str] | None = None,
    ) -> None:
        """Wait for a client; it names the checkpoint.

        Args:
            rename_map: the robot's cameras by the policy's names. None takes the client's map, or that of training.
            overrides: options of the policy in place of the checkpoint's, such as `--vlm_quantization=int8`.
        """
        super().__init__(config)
        self.policy: Any = None
        self._rename_map, self._overrides = rename_map, overrides or []
        self._predicting = threading.Lock()

    def SendPolicyInstructions(self, request: Any, context: Any) -> Any:
        """Load the checkpoint that the client names, as lerobot-rollout does, and compare it with the robot.

        Raises:
            RequestError: the request is not LeRobot's client's, or the robot is not the policy's.
            CheckpointError: the checkpoint cannot be loaded.
        """
        if not self.running:
            raise RequestError("the server has no client: call Ready first, as LeRobot's client does")
        specs = read_pickle(request.data, RemotePolicyConfig)
        if specs.policy_type != "pi0":
            raise RequestError(
                f"policy_type={specs.policy_type!r}: this server runs pi0 alone. For other policies start LeRobot's "
                "own, python -m lerobot.async_inference.policy_server"
            )
        self.policy = None  # whatever follows: no observation of this client goes to the policy of the last one
        place = str(specs.pretrained_name_or_path)
        logger.info("loading %s onto %s for %s", place, specs.device, context.peer())
        # compile_model as in lerobot-rollout, which compiles where it is told to, and not where training did
        config = read_config(place, ["--compile_model=false", f"--device={specs.device}", *self._overrides])
        rename_map = specs.rename_map if self._rename_map is None and specs.rename_map else self._rename_map
        renamed = {} if rename_map is None else {"rename_observations_processor": {"rename_map": dict(rename_map)}}
        self.preprocessor, self.postprocessor = build_pipelines(
            config, device_processor={"device": specs.device}, **renamed
        )
        features = driven(specs.lerobot_features)
        check_robot(config, features, rename_map_of(self.preprocessor))
        self.device, self.policy_type, self.lerobot_features = specs.device, specs.policy_type, features
        self.actions_per_chunk = specs.actions_per_chunk
        self.policy = load_policy(config).to(specs.device)
        return services_pb2.Empty()

    def SendObservations(self, request_iterator: Iterator[Any], context: Any) -> Any:
        """Take an observation; it is served if it is the newest when the client asks for actions.

        Raises:
            RequestError: it is damaged or lacks a camera or a joint.
        """
        received = receive_bytes_in_chunks(limited(request_iterator), None, self.shutdown_event)
        if received is None:
            raise RequestError("the observation did not arrive whole, or another client has begun")
        observed = read_pickle(received, TimedObservation)
        wanted = [
            name for ft in (self.lerobot_features or {}).values() for name in ft["names"] if ft["dtype"] == "float32"
        ]
        wanted += [key.removeprefix(f"{OBS_IMAGES}.") for key in self.lerobot_features or {} if key != OBS_STATE]
        if missing := [name for name in wanted if name not in observed.get_observation()]:
            raise RequestError(f"the observation lacks {', '.join(missing)}, which the robot has: check its cables")
        self._enqueue_observation(observed)
        return services_pb2.Empty()

    def GetActions(self, request: Any, context: Any) -> Any:
        """Actions for the newest observation; nothing if none has come in time, and the client asks again.

        Raises:
            RequestError: no checkpoint is loaded.
            ObservationError: the policy cannot take the observation.
        """
        try:
            observed = self.observation_queue.get(timeout=self.config.obs_queue_timeout)
        except Empty:
            return services_pb2.Actions()
        if self.policy is None:
            raise RequestError("no checkpoint is loaded: start the client again; what it said before is in its log")
        started, step = time.perf_counter(), observed.get_timestep()
        with self._predicted_timesteps_lock:
            self._predicted_timesteps.add(step)
        try:
            actions = services_pb2.Actions(data=pickle.dumps(self._predict_action_chunk(observed)))
        except Exception:
            with self._predicted_timesteps_lock:  # LeRobot would not look at this step again, and say nothing for ever
                self._predicted_timesteps.discard(step)
            self.last_processed_obs = None
            raise
        took = time.perf_counter() - started
        logger.info("chunk for observation %d in %.0f ms", step, 1000 * took)
        time.sleep(max(0.0, self.config.inference_latency - took))
        return actions

    def _predict_action_chunk(self, observation_t: TimedObservation) -> list[TimedAction]:
        """The chunk of an observation in the robot's units, action by action, as lerobot-rollout makes it."""
        raw = observation_t.get_observation()
        frame = build_dataset_frame(self.lerobot_features, raw, prefix=OBS_STR)
        with self._predicting, torch.inference_mode():
            self.last_processed_obs = observation_t
            batch = prepare_observation_for_inference(frame, torch.device(self.device), raw.get("task"))
            chunk = self.policy.predict_action_chunk(self.preprocessor(batch))[:, : self.actions_per_chunk]
            actions = [self.postprocessor(action).squeeze(0).cpu() for action in chunk.unbind(dim=1)]
        return self._time_action_chunk(observation_t.get_timestamp(), actions, observation_t.get_timestep())


def driven(features: Features) -> Features:
    """The robot's features without the readings that lerobot-rollout leaves out of the state, such as efforts."""
    state = features.get(OBS_STATE)
    names = [name for name in (state or {}).get("names", ()) if name.endswith((".pos", ".vel"))]
    if state is None or not names:
        return features
    return features | {OBS_STATE: state | {"names": names, "shape": (len(names),)}}


def rename_map_of(preprocessor: Any) -> dict[str, str]:
    """The names that a pipeline gives to the robot's cameras."""
    steps = [step for step in preprocessor.steps if isinstance(step, RenameObservationsProcessorStep)]
    return dict(steps[0].rename_map) if steps else {}


def check_robot(config: PreTrainedConfig, features: Features, rename_map: Mapping[str, str]) -> None:
    """Compare a robot with the policy, before it moves. Cameras may be fewer or more, as for lerobot-rollout.

    Raises:
        RequestError: other cameras, or another number of joints.
    """
    cameras = {rename_map.get(key, key) for key in features if key.startswith(OBS_IMAGES)}
    expected = set(config.image_features)
    if cameras and not (cameras & expected and (expected <= cameras or cameras <= expected)):
        raise RequestError(
            f"the robot's cameras are {sorted(cameras)}, the policy's {sorted(expected)}: name them in the client's "
            "--robot.cameras as in training, or start the server with "
            '--rename_map=\'{"observation.images.ROBOT": "observation.images.POLICY"}\''
        )
    dims, state = len(features.get(OBS_STATE, {}).get("names", ())), config.robot_state_feature
    if dims and state is not None and dims != state.shape[0] != getattr(config, "max_state_dim", None):
        raise RequestError(
            f"the robot has {dims} joints ({', '.join(features[OBS_STATE]['names'])}), the policy was trained with "
            f"{state.shape[0]}: this is another robot"
        )
