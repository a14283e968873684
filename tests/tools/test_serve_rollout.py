"""What `lerobot-pi0 serve` sends to a robot against what LeRobot's `lerobot-rollout` sends to it."""

import copy
import pickle
import socket
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from conftest import CAMERAS, DIMS, NEEDS_VNNI, shake, stats, tiny_config
from lerobot.robots import RobotConfig

grpc = pytest.importorskip("grpc")
from lerobot.async_inference.helpers import (  # noqa: E402
    RemotePolicyConfig,
    TimedObservation,
    map_robot_keys_to_lerobot_features,
)
from lerobot.rollout.configs import RolloutConfig  # noqa: E402
from lerobot.rollout.context import build_rollout_context  # noqa: E402
from lerobot.transport import services_pb2, services_pb2_grpc  # noqa: E402
from lerobot.utils.feature_utils import build_dataset_frame  # noqa: E402
from stand_in import JOINTS, StandIn  # noqa: E402

from lerobot_pi0 import PI0Policy, make_pi0_pre_post_processors  # noqa: E402
from lerobot_pi0.tools import main, parse, serve  # noqa: E402

PATIENCE = 300  # s to wait for the other side; only a dead one takes longer
STEPS = 6


@RobotConfig.register_subclass("seeing")
@dataclass
class SeeingConfig(RobotConfig):
    # Height and width of each camera's pictures.
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    # Whether it also measures efforts, which lerobot-rollout leaves out of the state.
    efforts: bool = False


class Seeing(StandIn):
    """The stand-in with any cameras; what it sees is the same each time."""

    config_class = SeeingConfig
    name = "seeing"

    def __init__(self, config: SeeingConfig) -> None:
        config.size = 64
        super().__init__(config)

    @property
    def observation_features(self) -> dict:
        efforts = {f"joint_{i}.effort": float for i in range(DIMS)} if self.config.efforts else {}
        return dict.fromkeys(JOINTS, float) | efforts | {key: (*hw, 3) for key, hw in self.config.sizes.items()}

    def get_observation(self) -> dict:
        draw = np.random.default_rng(3)
        seen = {key: draw.normal() for key, kind in self.observation_features.items() if kind is float}
        for key, (height, width) in self.config.sizes.items():
            coarse = draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            seen[key] = np.ascontiguousarray(coarse[np.arange(height) * 6 // height][:, np.arange(width) * 8 // width])
        return seen


@pytest.fixture
def checkpoint(tmp_path):
    """Saves a policy with its processors, with weights at which everything that it sees matters."""

    def save(cameras=("front",), folder="checkpoint", rename_map=None, **options):
        keys = [f"observation.images.{name}" for name in cameras]
        policy = PI0Policy(tiny_config(keys, num_inference_steps=2, chunk_size=8, n_action_steps=8, **options))
        shake(policy)
        policy.config.action_feature_names = JOINTS
        policy.save_pretrained(tmp_path / folder)
        for processor in make_pi0_pre_post_processors(policy.config, stats(cameras=keys)):
            if rename_map and processor.name == "policy_preprocessor":
                processor.steps[0].rename_map = images(rename_map)
            processor.save_pretrained(tmp_path / folder)
        return tmp_path / folder

    return save


def images(names: dict) -> dict:
    return {f"observation.images.{a}": f"observation.images.{b}" for a, b in names.items()}


def serving(folder, robot, rename_map=None, overrides=(), monkeypatch=None, started=serve.start):
    """A server that has got a client's instructions, and a way to ask it for the chunk of an observation."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = serve.Options(port=port, rename_map=rename_map, policy=list(overrides), obs_queue_timeout=0.3)
    running, _ = started(options)
    stub = services_pb2_grpc.AsyncInferenceStub(grpc.insecure_channel(f"127.0.0.1:{port}"))
    stub.Ready(services_pb2.Empty(), timeout=PATIENCE)
    specs = RemotePolicyConfig("pi0", str(folder), map_robot_keys_to_lerobot_features(robot), STEPS, "cpu")
    stub.SendPolicyInstructions(services_pb2.PolicySetup(data=pickle.dumps(specs)), timeout=PATIENCE)
    return running, stub


def observe(stub, seen: dict, must_go=True) -> None:
    data = pickle.dumps(TimedObservation(time.time(), 0, seen, must_go))
    message = services_pb2.Observation(transfer_state=services_pb2.TRANSFER_END, data=data)
    stub.SendObservations(iter([message]), timeout=PATIENCE)


def act(stub) -> torch.Tensor | None:
    """The actions that LeRobot's client gets, (steps, dims); None if it is to ask again."""
    data = stub.GetActions(services_pb2.Empty(), timeout=PATIENCE).data
    return torch.stack([action.get_action() for action in pickle.loads(data)]) if data else None


def rollout_actions(folder, robot_config, task, rename_map, overrides, monkeypatch) -> torch.Tensor:
    """The actions that lerobot-rollout would send, from its own context and its own engine."""
    argv = ["lerobot-rollout", f"--policy.path={folder}", *(f"--policy.{x.removeprefix('--')}" for x in overrides)]
    monkeypatch.setattr("sys.argv", argv)
    config = RolloutConfig(robot=robot_config, task=task, device="cpu", rename_map=rename_map, fps=30.0)
    context = build_rollout_context(config, threading.Event())
    context.policy.inference.reset()
    torch.manual_seed(0)
    seen = context.hardware.robot_wrapper.get_observation()
    frames = [build_dataset_frame(context.data.dataset_features, seen, prefix="observation") for _ in range(STEPS)]
    return torch.stack([context.policy.inference.get_action(frame) for frame in frames])


def both(folder, sizes, tmp_path, monkeypatch, *, task="reach", map_given=None, map_of_rollout=None, overrides=(),
         efforts=False):  # fmt: skip
    """Actions of serve and of lerobot-rollout for the same observation and noise."""
    monkeypatch.chdir(tmp_path)  # LeRobot's server writes logs/
    config = SeeingConfig(calibration_dir=tmp_path, sizes=sizes, efforts=efforts)
    robot = Seeing(copy.deepcopy(config))
    renamed = None if map_given is None else images(map_given)
    running, stub = serving(folder, robot, renamed, overrides)
    try:
        observe(stub, robot.get_observation() | {"task": task})
        torch.manual_seed(0)
        served = act(stub)
    finally:
        running.stop(grace=None).wait()
    expected = images(map_of_rollout if map_of_rollout is not None else map_given or {})
    return served, rollout_actions(folder, config, task, expected, overrides, monkeypatch)


@pytest.mark.parametrize("size", [(64, 64), (48, 64), (64, 48), (480, 640), (30, 90)])
def test_sizes_of_cameras(checkpoint, tmp_path, monkeypatch, size):
    """Catches pictures that are stretched to the shape in the checkpoint's config before the policy pads them: the
    robot would be sent other actions than in lerobot-rollout, without a word."""
    served, expected = both(checkpoint(), {"front": size}, tmp_path, monkeypatch)
    assert served.shape == (STEPS, DIMS)
    assert torch.equal(served, expected)


@pytest.mark.parametrize("case", ["surplus", "absent", "renamed", "swapped", "no task", "efforts", "other sizes"])
def test_robots(checkpoint, tmp_path, monkeypatch, case):
    """Catches a camera that is lost, stretched or in another's place, and a robot that rollout drives and serve does
    not: with more cameras or fewer, other names, without a task, with readings that are not the state."""
    sizes = {"front": (48, 64), "wrist": (64, 40)}
    cameras, more = ("front", "wrist"), {}
    if case == "surplus":
        cameras = ("wrist",)
    if case == "absent":
        cameras = ("front", "left", "wrist")
    if case == "renamed":
        sizes, more = {"top": (48, 64), "hand": (64, 40)}, {"map_given": {"top": "front", "hand": "wrist"}}
    if case == "swapped":
        more = {"map_given": {"front": "wrist", "wrist": "front"}}
    if case == "no task":
        more = {"task": ""}
    if case == "efforts":
        more = {"efforts": True}
    served, expected = both(checkpoint(cameras), sizes, tmp_path, monkeypatch, **more)
    assert torch.equal(served, expected)
    if case == "swapped":
        unswapped, _ = both(tmp_path / "checkpoint", sizes, tmp_path, monkeypatch)
        assert not torch.allclose(served, unswapped, atol=1e-3)  # or the comparison says nothing


def test_the_map_of_training(checkpoint, tmp_path, monkeypatch):
    """Catches a policy that was trained with a --rename_map and cannot be served, as LeRobot's client has no such
    option."""
    names = {"top": "front", "hand": "wrist"}
    folder = checkpoint(("front", "wrist"), rename_map=names)
    sizes = {"top": (48, 64), "hand": (64, 40)}
    served, expected = both(folder, sizes, tmp_path, monkeypatch, map_of_rollout=names)
    assert torch.equal(served, expected)


@pytest.mark.parametrize(
    "option", ["--num_inference_steps=3", pytest.param("--vlm_quantization=int8", marks=NEEDS_VNNI)]
)
def test_an_option_of_the_policy(checkpoint, tmp_path, monkeypatch, option):
    """Catches options of the policy that reach lerobot-rollout and not the server, such as rounded weights."""
    folder = checkpoint()
    other, expected = both(folder, {"front": (48, 64)}, tmp_path, monkeypatch, overrides=[option])
    assert torch.equal(other, expected)
    usual, _ = both(folder, {"front": (48, 64)}, tmp_path, monkeypatch)
    assert not torch.equal(other, usual)


def test_adapter(checkpoint, tmp_path, monkeypatch):
    """Catches a LoRA checkpoint that cannot be served, or is served as its base."""
    base = checkpoint()
    policy = PI0Policy.from_pretrained(base)
    policy.config.pretrained_path = base
    adapted = policy.wrap_with_peft(peft_cli_overrides={"method_type": "LORA", "r": 4})
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.add_(0.3)
    folder = tmp_path / "adapter"
    policy.config.use_peft = True
    adapted.save_pretrained(folder)
    policy.config.save_pretrained(folder)
    for processor in make_pi0_pre_post_processors(policy.config, stats(cameras=CAMERAS[:1])):
        processor.save_pretrained(folder)
    served, expected = both(folder, {"front": (48, 64)}, tmp_path, monkeypatch)
    assert torch.equal(served, expected)
    of_base, _ = both(base, {"front": (48, 64)}, tmp_path, monkeypatch)
    assert not torch.allclose(served, of_base, atol=1e-3)


def test_errors_reach_the_client(checkpoint, tmp_path, monkeypatch):
    """Catches an observation that cannot be served and is answered with nothing, for ever: the client logs what its
    calls raise. A good observation of the same step is served afterwards."""
    monkeypatch.chdir(tmp_path)
    robot = Seeing(SeeingConfig(calibration_dir=tmp_path, sizes={"front": (48, 64)}))
    running, stub = serving(checkpoint(), robot)
    good = robot.get_observation() | {"task": "reach"}
    try:
        for _ in range(2):  # the second has the same step and nearly the same joints as the first
            observe(stub, good | {JOINTS[1]: float("nan")}, must_go=False)
            with pytest.raises(grpc.RpcError, match=r"'observation.state' holds NaN.*check the robot's readings"):
                act(stub)
        with pytest.raises(grpc.RpcError, match=r"lacks front"):
            observe(stub, {key: value for key, value in good.items() if key != "front"})
        observe(stub, good, must_go=False)
        assert act(stub).shape == (STEPS, DIMS)
        assert act(stub) is None  # nothing new: the client asks again
    finally:
        running.stop(grace=None).wait()


@pytest.mark.parametrize(("sizes", "says"), [
    ({"top": (48, 64)}, r"cameras are \['observation.images.top'\].*--rename_map="),
    ({"front": (48, 64), "top": (48, 64)}, r"name them .*as in training"),
])  # fmt: skip
def test_other_cameras_are_refused(checkpoint, tmp_path, monkeypatch, sizes, says):
    """Catches a robot whose cameras lerobot-rollout would refuse and that is driven with some of them."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(grpc.RpcError, match=says):
        serving(checkpoint(("front", "wrist")), Seeing(SeeingConfig(calibration_dir=tmp_path, sizes=sizes)))


def test_another_robot_is_refused(checkpoint, tmp_path, monkeypatch):
    """Catches a robot with other joints, which torch would refuse in the middle of a normaliser, at every step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("test_serve_rollout.JOINTS", [*JOINTS, "joint_6.pos"])
    with pytest.raises(grpc.RpcError, match=r"the robot has 7 joints \(joint_0.pos, .*trained with 6"):
        serving(checkpoint(), Seeing(SeeingConfig(calibration_dir=tmp_path, sizes={"front": (48, 64)})))


def test_options_of_the_policy():
    """Catches `--policy.…` options that the command does not take, or that lose their value."""
    args = [
        "--policy.vlm_quantization=int8",
        "--policy.num_inference_steps",
        "5",
        "--port=9",
        '--rename_map={"a": "b"}',
    ]
    options = parse(serve.Options, args, "serve")
    assert options.policy == ["--vlm_quantization=int8", "--num_inference_steps", "5"]
    assert (options.port, options.rename_map) == (9, {"a": "b"})


def test_the_checkpoint_is_the_clients_to_name(capfd):
    """Catches a checkpoint that is given to the server and not read, in silence."""
    assert main(["serve", "--policy.path=x"]) == 1
    assert "--pretrained_name_or_path" in capfd.readouterr().err
