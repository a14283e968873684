"""What whoever reaches `lerobot-pi0 serve` can do to it: pickles, requests that never arrive, and its Unix socket."""

import io
import os
import pickle
import socket
import stat
import threading
import time

import numpy as np
import pytest
from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation

grpc = pytest.importorskip("grpc")
from lerobot.transport import services_pb2, services_pb2_grpc  # noqa: E402
from test_serve import PATIENCE, free_port  # noqa: E402

from lerobot_pi0.tools import ToolError, serve  # noqa: E402
from lerobot_pi0.tools.serving.requests import RequestError, limited, read_pickle  # noqa: E402

METHODS = {"Ready": services_pb2.Empty, "SendPolicyInstructions": services_pb2.PolicySetup,
           "SendObservations": services_pb2.Observation, "GetActions": services_pb2.Empty}  # fmt: skip


class Runs:
    """Runs a function with arguments when it is unpickled."""

    def __init__(self, *call) -> None:
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("call", [
    (os.system, "touch taken"), (open, "taken", "w"), (eval, "open('taken', 'w')"), (os.mkdir, "taken"),
    (np.save, "taken", 0), (getattr, "x", "upper"), (pickle.loads, pickle.dumps(1)),
])  # fmt: skip
def test_pickles_run_no_code(tmp_path, monkeypatch, call, protocol):
    """Catches a server that runs code of whoever reaches it: a pickle names any function and its arguments."""
    monkeypatch.chdir(tmp_path)
    observation = {"front": np.zeros((2, 2, 3), np.uint8), "task": Runs(*call)}
    for content in (Runs(*call), TimedObservation(0.0, 0, observation, True), np.array([Runs(*call)], dtype=object)):
        data = io.BytesIO()
        pickle.Pickler(data, protocol).dump(content)
        with pytest.raises(RequestError, match="not read: a pickle can run any code"):
            read_pickle(data.getvalue(), TimedObservation)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("protocol", range(pickle.DEFAULT_PROTOCOL, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_lerobots_client_are_read(protocol):
    """Catches an observation that a robot of LeRobot sends and that is refused: floats, numpy's numbers, pictures of
    all kinds of bytes, text, nested values; and a client's instructions."""
    draw = np.random.default_rng(0)
    raw = {"a.pos": 0.5, "b.pos": np.float32(1), "c.pos": np.float64(2), "d": np.int64(3), "task": "reach", "e": None,
           "front": draw.integers(0, 255, (4, 5, 3), np.uint8), "depth": draw.integers(0, 9, (4, 5, 1), np.uint16),
           "view": draw.random((6, 4))[::2, ::-1], "more": {"x": [1, (2, "y")], "z": True}}  # fmt: skip
    read = read_pickle(pickle.dumps(TimedObservation(1.5, 7, raw, True), protocol), TimedObservation)
    assert (read.timestamp, read.timestep, read.must_go) == (1.5, 7, True)
    assert all(np.array_equal(read.observation[key], raw[key]) for key in raw)
    features = {
        "observation.state": {"dtype": "float32", "shape": (1,), "names": ["a.pos"], "info": {"is_depth_map": True}}
    }
    specs = RemotePolicyConfig("pi0", "you/cubes", features, 50, "cuda", {"a": "b"})
    assert read_pickle(pickle.dumps(specs, protocol), RemotePolicyConfig) == specs


@pytest.mark.parametrize(
    "data", [b"", b"not a pickle", pickle.dumps([1]), pickle.dumps(None), b"\x80\x05.", b"\x80\x04K\x01"]
)
def test_damaged_pickles(data):
    """Catches damage that is no error at the client with its reason, but a traceback of another kind."""
    with pytest.raises(RequestError, match=r"damaged|holds a"):
        read_pickle(data, TimedObservation)


def test_size_of_an_observation():
    """Catches a client that fills the server's memory with one observation without an end."""
    parts = [services_pb2.Observation(data=b"x" * 10) for _ in range(3)]
    assert len(list(limited(iter(parts), 30))) == 3
    with pytest.raises(RequestError, match="more than 29 bytes"):
        list(limited(iter(parts), 29))


@pytest.mark.parametrize("method", METHODS)
def test_clients_that_trickle(tmp_path, monkeypatch, method):
    """Catches a server whose threads are all taken by requests that begin and never arrive, whichever method they
    are for: a robot's own requests would wait for ever."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serve, "CLIENTS", 8)
    monkeypatch.setattr(serve, "ARRIVING", 4)
    port = free_port()
    running, policy_server = serve.start(serve.Options(port=port, obs_queue_timeout=0.05))
    over, slow = threading.Event(), []

    def trickle():
        while method == "SendObservations" and not over.is_set():
            yield services_pb2.Observation(transfer_state=services_pb2.TRANSFER_BEGIN, data=b"x")
            over.wait(0.1)
        over.wait(PATIENCE)

    try:
        for _ in range(12):
            channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)])
            call = channel.stream_unary(f"/transport.AsyncInference/{method}", METHODS[method].SerializeToString)
            slow.append((channel, call.future(trickle())))
        until = time.monotonic() + PATIENCE
        while sum(call.done() for _, call in slow) < 12 - 4:  # on a busy machine they may begin after the robot's own
            assert time.monotonic() < until
            time.sleep(0.02)
        stub = services_pb2_grpc.AsyncInferenceStub(grpc.insecure_channel(f"127.0.0.1:{port}"))
        for _ in range(3):
            stub.Ready(services_pb2.Empty(), timeout=PATIENCE)
            stub.GetActions(services_pb2.Empty(), timeout=PATIENCE)
        assert policy_server.running
    finally:
        over.set()
        for channel, call in slow:
            call.cancel()
            channel.close()
        policy_server.stop()
        running.stop(grace=None).wait()


def test_unix_socket(tmp_path, monkeypatch):
    """Catches a socket that others than its owner can open, that LeRobot's client cannot use, or that a second server
    takes away from the first."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pi0.sock"
    mask = os.umask(0)
    try:
        running, policy_server = serve.start(serve.Options(socket=str(path)))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert os.umask(0) == 0  # it is as it was
    finally:
        os.umask(mask)
    try:
        stub = services_pb2_grpc.AsyncInferenceStub(grpc.insecure_channel(f"unix:{path}"))  # as LeRobot's client does
        stub.Ready(services_pb2.Empty(), timeout=PATIENCE)
        with pytest.raises(ToolError, match=r"another server has it.*--socket"):
            serve.start(serve.Options(socket=str(path)))
        stub.Ready(services_pb2.Empty(), timeout=PATIENCE)
    finally:
        policy_server.stop()
        running.stop(grace=None).wait()
    with pytest.raises(ToolError, match="its folder is not there"):
        serve.start(serve.Options(socket=str(tmp_path / "nowhere" / "pi0.sock")))
    with socket.socket(socket.AF_UNIX) as left:  # as a server that was killed leaves it
        left.bind(str(path))
    started, _ = serve.start(serve.Options(socket="pi0.sock"))
    started.stop(grace=None).wait()
