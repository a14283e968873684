"""Methods outside of the policy contract that LeRobot's commands, examples and tests call on its own π₀."""

import difflib
from collections.abc import Iterable
from typing import Any

from lerobot.policies.rtc.modeling_rtc import RTCProcessor

from ..network.pi0 import PI0
from .player import Player

CHUNK_ARGUMENTS = {"noise", "num_steps", "inference_delay", "prev_chunk_left_over", "execution_horizon"}
"""Keyword arguments of `predict_action_chunk`: all that LeRobot 0.6 passes. None is ignored."""


def refuse_unknown(given: Iterable[str]) -> None:
    """Raise TypeError for the first of these keywords; the message suggests the one that was probably meant."""
    for name in given:
        near = difflib.get_close_matches(name, CHUNK_ARGUMENTS, n=1, cutoff=0.4)
        meant = f": did you mean {near[0]}?" if near else "."
        raise TypeError(f"a chunk has no argument {name!r}{meant} It takes {', '.join(sorted(CHUNK_ARGUMENTS))}")


class LeRobotNames:
    """Methods of PI0Policy that LeRobot looks for by name."""

    config: Any
    model: PI0
    _player: Player

    def supports_rtc(self) -> bool:
        """True: with `prev_chunk_left_over`, `predict_action_chunk` continues the chunk that is being executed."""
        return True

    @property
    def rtc_processor(self) -> RTCProcessor | None:
        """LeRobot's options of real-time chunking and, with `rtc_config.debug`, the data of the last chunks."""
        return self._player.rtc_processor

    def _rtc_enabled(self) -> bool:
        rtc = self.config.rtc_config
        return rtc is not None and rtc.enabled

    def init_rtc_processor(self) -> None:
        """Check `config.rtc_config`, which LeRobot has just set, before a robot moves.

        Raises:
            ValueError: a horizon below 1, an unknown schedule, or LeRobot's mode `trained` for a policy that was not
                trained for it.
        """
        self._player.prepare_guidance()
        self.model.rtc_processor = self.rtc_processor  # type: ignore[assignment]  # as in LeRobot

    def drop_queued_actions(self) -> None:
        """Forget the actions that are not executed yet: the next one comes from a new chunk."""
        self._player.reset()
