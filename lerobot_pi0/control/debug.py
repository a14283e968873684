"""LeRobot's `RTCProcessor`: the options of real-time chunking, and debug data of a chunk (`rtc_config.debug`).

`examples/rtc/eval_dataset.py` of LeRobot draws these data. The guidance itself is `guidance.py`'s.
"""

from collections.abc import Callable
from typing import Any

from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from torch import Tensor

Record = Callable[..., None]
"""Called with the time and, by name, with what was computed at that time."""


def make_processor(config: RTCConfig | None) -> RTCProcessor | None:
    """LeRobot's processor of these options; None without options."""
    if config is None:
        return None
    # LeRobot after 0.6.1 has this mode, and takes it from policies alone that say that they can do it.
    trained = getattr(config, "mode", None) == "trained"
    return RTCProcessor(config, **({"trained_mode_supported": True} if trained else {}))


def recorder(processor: RTCProcessor | None, steps: int, delay: int, horizon: int | None) -> Record | None:
    """Writes what a solver computes into the debug data, under LeRobot's names and in its shapes; None if it is off.

    Args:
        steps: of the solver. `x_t` is where Euler's step of that length leads, as in LeRobot's data.
        delay, horizon: what the chunk was asked for with, in actions.
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
