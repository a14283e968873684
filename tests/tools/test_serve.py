"""`lerobot-pi0 serve` and LeRobot's own robot client, over gRPC on loopback."""

import logging
import os
import pickle
import signal
import socket
import threading
import time

import numpy as np
import pytest
from conftest import CAMERAS, DIMS

grpc = pytest.importorskip("grpc")
from stand_in import JOINTS, StandIn, StandInConfig, save_policy  # noqa: E402

from lerobot_pi0 import PI0Policy  # noqa: E402
from lerobot_pi0.tools import ToolError, main, serve  # noqa: E402

PATIENCE = 300  # s to wait for the other side; only a dead one takes longer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A running server and its port. LeRobot's server writes `logs/` into the current folder."""
    monkeypatch.chdir(tmp_path)
    port = free_port()
    running, policy_server = serve.start(serve.Options(port=port, obs_queue_timeout=0.3))
    yield policy_server, port
    policy_server.stop()
    running.stop(grace=None).wait()


def drive(port: int, folder, calibration_dir, actions: int) -> None:
    """LeRobot's client, until its robot has received so many actions."""
    from lerobot.async_inference.configs import RobotClientConfig
    from lerobot.async_inference.robot_client import RobotClient

    client = RobotClient(
        RobotClientConfig(
            policy_type="pi0", pretrained_name_or_path=str(folder), actions_per_chunk=20, task="reach", fps=20,
            robot=StandInConfig(calibration_dir=calibration_dir), server_address=f"127.0.0.1:{port}",
        )
    )  # fmt: skip
    assert client.start()
    threads = [
        threading.Thread(target=client.receive_actions, daemon=True),
        threading.Thread(target=client.control_loop, args=("reach",), daemon=True),
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE
    while len(StandIn.received) < actions and time.monotonic() < deadline:
        time.sleep(0.05)
    client.shutdown_event.set()
    for thread in threads:
        thread.join(PATIENCE)
    client.stop()


def test_lerobots_client_gets_actions(server, tmp_path, monkeypatch):
    """Catches a server that runs the built-in, or whose chunks LeRobot's client cannot use."""
    policy_server, port = server
    monkeypatch.setattr(StandIn, "received", [])
    save_policy(tmp_path / "checkpoint")
    drive(port, tmp_path / "checkpoint", tmp_path, actions=30)
    assert type(policy_server.policy) is PI0Policy
    assert len(StandIn.received) >= 30
    assert all(goal.shape == (DIMS,) and np.isfinite(goal).all() for goal in StandIn.received)


def observation(**changes):
    """What the client sends, and what is wrong with it."""
    from lerobot.async_inference.helpers import TimedObservation

    raw = dict.fromkeys(JOINTS, 0.0) | {"front": np.zeros((64, 64, 3), np.uint8), "task": "reach"} | changes
    return pickle.dumps(TimedObservation(time.time(), 0, {k: v for k, v in raw.items() if v is not None}, must_go=True))


def test_bad_requests_do_not_bring_it_down(server, tmp_path, monkeypatch):
    """Catches a request after which the server is gone or stuck: garbage, other types, a checkpoint that is not there,
    observations before a policy and without a camera or joint. All are errors at the client; a good one is served
    afterwards."""
    from lerobot.async_inference.helpers import RemotePolicyConfig
    from lerobot.transport import services_pb2, services_pb2_grpc

    policy_server, port = server
    monkeypatch.setattr(StandIn, "received", [])
    save_policy(tmp_path / "checkpoint")
    stub = services_pb2_grpc.AsyncInferenceStub(grpc.insecure_channel(f"127.0.0.1:{port}"))
    stub.Ready(services_pb2.Empty(), timeout=PATIENCE)

    def setup(path, kind: str = "pi0") -> bytes:
        camera = {CAMERAS[0]: {"dtype": "image", "shape": (64, 64, 3), "names": ["height", "width", "channels"]}}
        state = {"observation.state": {"dtype": "float32", "shape": (DIMS,), "names": JOINTS}}
        return pickle.dumps(RemotePolicyConfig(kind, str(path), state | camera, 10))

    def instruct(data: bytes) -> None:
        stub.SendPolicyInstructions(services_pb2.PolicySetup(data=data), timeout=PATIENCE)

    def observe(data: bytes, state=services_pb2.TRANSFER_END) -> None:
        parts = [services_pb2.Observation(transfer_state=state, data=data)]
        stub.SendObservations(iter(parts), timeout=PATIENCE)

    def answered() -> bool:
        return len(stub.GetActions(services_pb2.Empty(), timeout=PATIENCE).data) > 0

    bad_setups = [b"", b"not a pickle", pickle.dumps({"policy_type": "pi0"}), setup("nowhere"), setup("x", "no policy")]
    for data in bad_setups:
        with pytest.raises(grpc.RpcError):
            instruct(data)
    observe(observation())
    with pytest.raises(grpc.RpcError, match="no checkpoint is loaded"):
        answered()
    instruct(setup(tmp_path / "checkpoint"))
    for data in (b"", b"not a pickle", pickle.dumps([1, 2])):
        with pytest.raises(grpc.RpcError):
            observe(data)
    with pytest.raises(grpc.RpcError):
        observe(observation(), services_pb2.TRANSFER_MIDDLE)  # a stream that ends in the middle
    for bad in ({"front": None}, {"joint_0.pos": None}):
        with pytest.raises(grpc.RpcError, match=f"lacks {min(bad)}"):
            observe(observation(**bad))
    observe(observation(**{"joint_1.pos": float("nan")}))
    with pytest.raises(grpc.RpcError, match="holds NaN"):
        answered()
    observe(observation())
    assert answered()
    assert policy_server.running
    drive(port, tmp_path / "checkpoint", tmp_path, actions=5)
    assert len(StandIn.received) >= 5


def test_robots_that_go_silent(server, monkeypatch):
    """Catches a server that a few robots which lost their network in the middle of a request keep from answering."""
    from lerobot.transport import services_pb2, services_pb2_grpc

    from lerobot_pi0.tools.serving import server as policy_server

    _, port = server
    silent, over, begun = [], threading.Event(), threading.Semaphore(0)
    receive = policy_server.receive_bytes_in_chunks

    def noted(*arguments):
        begun.release()
        return receive(*arguments)

    monkeypatch.setattr(policy_server, "receive_bytes_in_chunks", noted)

    def stream():
        yield services_pb2.Observation(transfer_state=services_pb2.TRANSFER_BEGIN, data=b"x")
        over.wait(PATIENCE)

    try:
        for _ in range(8):
            channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)])
            silent.append((channel, services_pb2_grpc.AsyncInferenceStub(channel).SendObservations.future(stream())))
        assert all(begun.acquire(timeout=PATIENCE) for _ in silent), "the server has not taken up all the requests"
        stub = services_pb2_grpc.AsyncInferenceStub(grpc.insecure_channel(f"127.0.0.1:{port}"))
        stub.Ready(services_pb2.Empty(), timeout=PATIENCE)
    finally:
        over.set()
        for channel, call in silent:
            call.cancel()
            channel.close()


def test_the_command(tmp_path, monkeypatch, capfd):
    """Catches a command that does not start, listens elsewhere than on loopback, or that ctrl-C does not stop."""
    from lerobot.transport import services_pb2, services_pb2_grpc

    monkeypatch.chdir(tmp_path)
    port, answers = free_port(), []

    def client() -> None:
        stub = services_pb2_grpc.AsyncInferenceStub(grpc.insecure_channel(f"127.0.0.1:{port}"))
        answers.append(stub.Ready(services_pb2.Empty(), timeout=PATIENCE, wait_for_ready=True))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=client, daemon=True)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever other tests have left there
    try:
        thread.start()
        assert main(["serve", f"--port={port}"]) == 0
    finally:
        signal.signal(signal.SIGINT, handler)
    thread.join()
    assert len(answers) == 1
    assert f"serving π₀ on 127.0.0.1:{port}" in capfd.readouterr().err
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))  # it is free again


@pytest.mark.parametrize(("host", "loopback"), [
    ("127.0.0.1", True), ("127.0.1.9", True), ("localhost", True), ("[::1]", True), ("::1", True),
    ("0.0.0.0", False), ("[::]", False), ("192.168.1.7", False), ("robot.example", False),
])  # fmt: skip
def test_loopback(host, loopback):
    """Catches an open address that is taken for a private one: no warning would be given."""
    assert serve.is_loopback(host) is loopback


def test_ipv6(tmp_path, monkeypatch):
    """Catches an address that counts as loopback and cannot be listened on: IPv6 wants brackets before a port."""
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:  # a machine without IPv6 has to say so
            with pytest.raises(ToolError, match="cannot listen on ::1"):
                serve.start(serve.Options(host="::1", port=free_port()))
            return
    for host in ("::1", "[::1]"):
        running, policy_server = serve.start(serve.Options(host=host, port=free_port()))
        policy_server.stop()
        running.stop(grace=None).wait()


def test_an_open_address_is_warned_about(tmp_path, monkeypatch, caplog):
    """Catches a server that unpickles what a network sends, and does not say so."""
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING), pytest.raises(ToolError, match="Port must be between"):
        serve.start(serve.Options(host="0.0.0.0", port=0))
    assert "can load any checkpoint here and take the robot's place" in caplog.text


def test_addresses_that_cannot_be_listened_on(server):
    """Catches a second server that starts in silence on a port that is taken: the message says what to do."""
    _, port = server
    for options in (serve.Options(port=port), serve.Options(host="192.0.2.1", port=free_port())):
        with pytest.raises(ToolError, match=r"cannot listen on .*--port or --host"):
            serve.start(options)
    with pytest.raises(ToolError, match="non-negative"):
        serve.start(serve.Options(port=port, inference_latency=-1))
