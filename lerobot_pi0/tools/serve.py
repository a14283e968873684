"""`lerobot-pi0 serve`: LeRobot's asynchronous policy server, in which "pi0" means this plugin.

    lerobot-pi0 serve --port=8080
    lerobot-pi0 serve --socket=/run/user/1000/pi0.sock --policy.vlm_quantization=int8

The robot's side is LeRobot's (`python -m lerobot.async_inference.robot_client`); it names the checkpoint, which the
server then loads. The robot gets the actions that lerobot-rollout would send it.

Whoever can connect is trusted: they can load any checkpoint that this machine can read or download, and can send
observations in place of the robot. 127.0.0.1 is open to all users of this machine; a Unix socket (--socket) is open to
you alone. Nothing is encrypted: between machines use an SSH tunnel.
"""

import ipaddress
import logging
import os
import socket
import threading
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import ToolError

logger = logging.getLogger(__name__)


@dataclass
class Options:
    """Serve π₀ to robots on other machines."""

    # Address to listen on. Whoever reaches it can load checkpoints and take the robot's place: trusted networks only.
    host: str = "127.0.0.1"
    # Port to listen on.
    port: int = 8080
    # Unix socket to listen on in place of a port, open to you alone; the client's --server_address=unix:PATH.
    socket: str | None = None
    # Actions per second of the robot.
    fps: int = 30
    # Shortest time that an answer takes, in seconds; 0 answers as soon as there is a chunk.
    inference_latency: float = 0.0
    # Seconds that a request for actions waits for an observation.
    obs_queue_timeout: float = 2.0
    # The robot's cameras by the policy's names, as in lerobot-rollout. None takes the checkpoint's: that of training.
    rename_map: dict[str, str] | None = None
    # Options of the policy in place of the checkpoint's, as in lerobot-rollout: --policy.vlm_quantization=int8, …
    policy: list[str] = field(default_factory=list)


CLIENTS = 64
"""Requests that are answered at a time."""
ARRIVING = 16
"""Of these, how many may still be arriving; then the oldest gives way."""
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

        from .serving.requests import Arrivals, make_handler
        from .serving.server import RolloutServer
    except ImportError as error:
        raise ToolError(f"serving needs gRPC: pip install 'lerobot_policy_pi0[serve]' ({error})") from error
    if options.socket is None and not is_loopback(options.host):
        logger.warning(
            "listening on %s: whoever reaches port %d can load any checkpoint here and take the robot's place. "
            "Use a network that you trust with that, or an SSH tunnel to 127.0.0.1 (ssh -L %d:127.0.0.1:%d …)",
            *(options.host, options.port, options.port, options.port),
        )
    lerobots = {
        name: getattr(options, name) for name in ("host", "port", "fps", "inference_latency", "obs_queue_timeout")
    }
    try:
        policy_server = RolloutServer(PolicyServerConfig(**lerobots), options.rename_map, options.policy)
    except (ValueError, ZeroDivisionError) as error:
        raise ToolError(f"{error}") from error
    # without reuse of ports: a second server would start in silence, and share the first one's requests
    alive = [("grpc.keepalive_time_ms", MISSED_AFTER_MS), ("grpc.keepalive_timeout_ms", MISSED_AFTER_MS)]
    server = grpc.server(futures.ThreadPoolExecutor(CLIENTS), options=[("grpc.so_reuseport", 0), *alive])
    server.add_generic_rpc_handlers((make_handler(policy_server, Arrivals(ARRIVING)),))
    address = _listen(server, options)
    server.start()
    logger.info("serving π₀ on %s; ctrl-C stops", address)
    return server, policy_server


def _listen(server: Any, options: Options) -> str:
    """Bind the server to a socket or a port; returns the address."""
    if options.socket is not None:
        return _listen_on_socket(server, Path(options.socket).absolute())
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
    return f"{options.host}:{bound}"


def _listen_on_socket(server: Any, path: Path) -> str:
    """Bind the server to a Unix socket that its owner alone can open. gRPC would replace one that is in use."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
            taken = True
        except OSError:
            taken = False
    mask = os.umask(0o177)
    try:
        bound = 0 if taken else server.add_insecure_port(f"unix:{path}")
    except RuntimeError:
        bound = 0
    finally:
        os.umask(mask)
    if bound == 0:
        raise ToolError(
            f"cannot listen on {path}: another server has it, its folder is not there or not yours, or it is longer "
            "than the 107 characters of a socket's name. Choose another with --socket"
        )
    return f"unix:{path}"


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
