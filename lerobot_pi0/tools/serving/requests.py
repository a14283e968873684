"""Requests of LeRobot's robot client: how they arrive over gRPC, what pickles may hold, and how errors go back."""

import io
import itertools
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from lerobot.transport import services_pb2

from ...checkpoints.errors import CheckpointError

logger = logging.getLogger(__name__)

ARRAYS = ("numpy._core", "numpy.core")  # before and after numpy 2
PICKLED = {
    ("lerobot.async_inference.helpers", "RemotePolicyConfig"),
    ("lerobot.async_inference.helpers", "TimedObservation"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *((f"{core}.multiarray", name) for core in ARRAYS for name in ("_reconstruct", "scalar")),
    *((f"{core}.numeric", "_frombuffer") for core in ARRAYS),
}
"""All that LeRobot's client sends beside numbers, text, lists and dictionaries, by module and name."""

MOST_BYTES = 2**28
"""Size of the largest observation: 40 pictures of 1080 x 1920 pixels."""

MOST_MESSAGE = 2000
"""Characters of an error at the client: gRPC sends it in a header, whose size is limited."""


class RequestError(ValueError):
    """A request that cannot be served; the message says why and what to do, and is shown at the client."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PICKLED:
            raise RequestError(
                f"the request holds {module}.{name}, which LeRobot's client does not send, so it is not read: a pickle "
                "can run any code. Observations are numbers, text and numpy arrays"
            )
        return super().find_class(module, name)


def read_pickle(data: bytes, kind: type) -> Any:
    """Read a pickle that can run no code: it may name `PICKLED` alone.

    Raises:
        RequestError: it is damaged, or holds anything else than `kind`.
    """
    try:
        content = _Unpickler(io.BytesIO(data)).load()
    except RequestError:
        raise
    except Exception as error:  # damaged pickles raise errors of all kinds
        raise RequestError(f"the request is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(content, kind):
        raise RequestError(f"the request holds a {type(content).__name__}, expected a {kind.__name__}")
    return content


def limited(messages: Iterator[Any], most: int = MOST_BYTES) -> Iterator[Any]:
    """The messages of a stream, up to so many bytes of `data`.

    Raises:
        RequestError: there are more.
    """
    size = 0
    for message in messages:
        size += len(message.data)
        if size > most:
            raise RequestError(f"the observation has more than {most} bytes: send smaller pictures")
        yield message


class Arrivals:
    """Requests that have begun and not yet arrived. Where there are too many of them, the oldest is cancelled.

    A request occupies a thread while it arrives. Clients that send a byte now and then, or have lost their network,
    would take all threads; a client that is well needs milliseconds, and is never the oldest.
    """

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._numbers = itertools.count()
        self._arriving: dict[int, Any] = {}  # oldest first

    @contextmanager
    def of(self, context: Any) -> Iterator[None]:
        """While a request arrives."""
        oldest = None
        with self._lock:
            self._arriving[number := next(self._numbers)] = context
            if len(self._arriving) > self._most:
                oldest = self._arriving.pop(next(iter(self._arriving)))
        if oldest is not None:
            logger.warning("a request of %s has not arrived and is cancelled: too many others wait", oldest.peer())
            oldest.cancel()
        try:
            yield
        finally:
            with self._lock:
                self._arriving.pop(number, None)


def make_handler(servicer: Any, arrivals: Arrivals) -> grpc.GenericRpcHandler:
    """gRPC's handler for LeRobot's service. What a method of the servicer raises is an error at the client.

    All methods take streams here, the three with one message too: gRPC reads a single message before it calls the
    method, and nothing could be done about one that does not arrive. On the wire there is no difference.
    """
    messages = {
        "Ready": (services_pb2.Empty, services_pb2.Empty),
        "SendPolicyInstructions": (services_pb2.PolicySetup, services_pb2.Empty),
        "SendObservations": (None, services_pb2.Empty),
        "GetActions": (services_pb2.Empty, services_pb2.Actions),
    }
    methods = {}
    for name, (request, response) in messages.items():
        method = _guarded(getattr(servicer, name), arrivals, streams=request is None)
        methods[name] = grpc.stream_unary_rpc_method_handler(
            method, (request or services_pb2.Observation).FromString, response.SerializeToString
        )
    return grpc.method_handlers_generic_handler("transport.AsyncInference", methods)


def _guarded(method: Callable[..., Any], arrivals: Arrivals, streams: bool) -> Callable[..., Any]:
    def answer(messages: Iterator[Any], context: Any) -> Any:
        try:
            with arrivals.of(context):
                if streams:
                    return method(messages, context)
                request = next(messages, None)
            if request is None:
                raise RequestError("the request is empty")
            return method(request, context)
        except grpc.RpcError:  # it was cancelled, or its client is gone: nobody waits for an answer
            return None
        except (ValueError, CheckpointError) as error:
            logger.error("%s: %s", type(error).__name__, error)
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{type(error).__name__}: {error}"[:MOST_MESSAGE])
        except Exception as error:
            logger.exception("a request failed")
            context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}"[:MOST_MESSAGE])

    return answer
