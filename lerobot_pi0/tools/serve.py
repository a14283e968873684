"""`lerobot-pi0 serve`: LeRobot's asynchronous policy server, in which "pi0" means this plugin.

LeRobot's own command for it never imports plugins and would run the built-in. The robot's side is LeRobot's
(`python -m lerobot.async_inference.robot_client`); it names the checkpoint, which the server then loads.
"""

import ipaddress
import logging
import threading
from concurrent import futures
from dataclasses import dataclass
from typing import Any

from . import ToolError

logger = logging.getLogger(__name__)


@dataclass
class Options:
    """Options of `lerobot-pi0 serve`."""

    # Address to listen on. Whoever reaches it can run code here (requests are pickles): trusted networks only.
    host: str = "127.0.0.1"
    # Port to listen on.
    port: int = 8080
    # Actions per second of the robot.
    fps: int = 30
    # Shortest time that an answer takes, in seconds; 0 answers as soon as there is a chunk.
    inference_latency: float = 0.0
    # Seconds that a request for actions waits for an observation.
    obs_queue_timeout: float = 2.0


CLIENTS = 64
"""Requests that are answered at a time; a robot that has gone silent occupies one until it is missed."""
MISSED_AFTER_MS = 10_000


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def start(options: Options) -> tuple[Any, Any]:
    """A server that answers, and the policy server in it.

    Raises:
        ToolError: gRPC is not installed, an option is out of range, or the address cannot be listened on.
    """
    try:
        import grpc
        from lerobot.async_inference.configs import PolicyServerConfig
        from lerobot.async_inference.policy_server import PolicyServer
        from lerobot.transport import services_pb2_grpc
    except ImportError as error:
        raise ToolError(f"serving needs gRPC: pip install 'lerobot_policy_pi0[serve]' ({error})") from error
    if not is_loopback(options.host):
        logger.warning(
            "listening on %s: whoever reaches port %d can run any code on this machine, as requests are pickles. "
            "Use a network that you trust with that, or an SSH tunnel to 127.0.0.1 (ssh -L %d:127.0.0.1:%d …)",
            *(options.host, options.port, options.port, options.port),
        )
    try:
        policy_server = PolicyServer(PolicyServerConfig(**vars(options)))
    except (ValueError, ZeroDivisionError) as error:
        raise ToolError(f"{error}") from error
    # without reuse of ports: a second server would start in silence, and share the first one's requests
    alive = [("grpc.keepalive_time_ms", MISSED_AFTER_MS), ("grpc.keepalive_timeout_ms", MISSED_AFTER_MS)]
    server = grpc.server(futures.ThreadPoolExecutor(CLIENTS), options=[("grpc.so_reuseport", 0), *alive])
    services_pb2_grpc.add_AsyncInferenceServicer_to_server(policy_server, server)
    host = f"[{options.host}]" if options.host.count(":") > 1 and "[" not in options.host else options.host  # IPv6
    try:
        bound = server.add_insecure_port(f"{host}:{options.port}")
    except RuntimeError:
        bound = 0
    if bound == 0:
        raise ToolError(
            f"cannot listen on {options.host}:{options.port}: the port is taken, or the address is not this machine's. "
            "Choose another with --port or --host"
        )
    server.start()
    logger.info("serving π₀ on %s:%d; ctrl-C stops", options.host, bound)
    return server, policy_server


def run(options: Options) -> None:
    """Serve until interrupted.

    Raises:
        ToolError: see `start`.
    """
    server, policy_server = start(options)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        policy_server.stop()
        server.stop(grace=2).wait()
