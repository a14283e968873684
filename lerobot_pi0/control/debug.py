"""LeRobot's `RTCProcessor`: options of real-time chunking, its mode, and debug data of a chunk (`rtc_config.debug`).

`examples/rtc/eval_dataset.py` of LeRobot draws these data. The guidance itself is in `guidance.py`.
"""

import inspect
from collections.abc import Callable
from typing import Any

from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from torch import Tensor

from ..configuration_pi0 import PI0Config

Record = Callable[..., None]
"""Called with a time and, as keyword arguments, with the tensors that were computed at that time."""


def make_processor(config: RTCConfig | None) -> RTCProcessor | None:
    """LeRobot's processor of these options; None without options."""
    if config is None:
        return None
    # LeRobot after 0.6.1 has this mode, and accepts it only for policies that say that they support it.
    trained = getattr(config, "mode", None) == "trained"
    known = "trained_mode_supported" in inspect.signature(RTCProcessor).parameters
    return RTCProcessor(config, **({"trained_mode_supported": True} if trained and known else {}))


def check_trained_mode(config: PI0Config, horizon: int) -> None:
    """Refuse LeRobot's mode `trained` for a policy that is guided in another way, or with an unsuitable horizon."""
    delay = config.rtc_training_max_delay or 0
    if config.guidance != "trained" or not delay:
        raise ValueError(
            f"--inference.rtc.mode=trained, but rtc_guidance={config.guidance} and rtc_training_max_delay={delay}: the "
            "mode needs a policy that was trained with rtc_training_max_delay. Without this mode, chunks are guided by "
            "rtc_guidance"
        )
    if not delay <= horizon <= config.chunk_size - delay:
        raise ValueError(
            f"--inference.rtc.execution_horizon={horizon} has to be from rtc_training_max_delay={delay} to "
            f"chunk_size - rtc_training_max_delay = {config.chunk_size - delay} with --inference.rtc.mode=trained"
        )


def recorder(processor: RTCProcessor | None, steps: int, delay: int, horizon: int | None) -> Record | None:
    """A function that writes tensors into the debug data, under LeRobot's names and in its shapes; None without debug.

    Args:
        steps: number of the solver's steps. `x_t` is recorded after an Euler step of that length, as LeRobot does.
        delay, horizon: the arguments with which the chunk was requested, in actions.
    """
    if processor is None or not processor.is_debug_enabled():
        return None
    asked: dict[str, Any] = {"inference_delay": delay, "execution_horizon": horizon}

    def record(time: Tensor, **found: Tensor) -> None:
        found = {name: value[:, 0] if value.ndim == 4 else value for name, value in found.items()}
        if "v_t" in found:
            found["x_t"] = found["x_t"] - found["v_t"] / steps
        processor.track(time=float(time.flatten()[0]), **found, **({} if "v_t" in found else asked))

    return record
