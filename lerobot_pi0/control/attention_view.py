"""What the actions look at, live in the Rerun window that `lerobot-rollout --display_data=true` opens.

LeRobot logs each camera's picture at an entity of its own, `observation.CAMERA`, and shows what lies below that entity
in the same view. So the heat is logged below it, and lies over the picture. The words get a text view beside LeRobot's.
"""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..configuration_pi0 import PI0Config
from ..inputs.steps import TOKENIZER_STEP
from ..network.pi0 import PI0, Observation
from .attention import Parts, heats, parts, recorded, words_of

logger = logging.getLogger(__name__)

COLOUR = (255, 0, 200)
"""Of heat: no cube, arm or table has it."""

OPAQUE = 0.65
"""Of the strongest patch."""


def tint(heat_HW: np.ndarray, most: float) -> np.ndarray:
    """Heat as a layer over a picture, uint8 RGBA (H, W, 4): nothing at 0, `COLOUR` at `most`."""
    layer = np.empty((*heat_HW.shape, 4), np.uint8)
    layer[..., :3] = COLOUR
    layer[..., 3] = (255 * OPAQUE * np.clip(heat_HW / max(most, 1e-12), 0, 1)).round()
    return layer


def lines(found: list[tuple[str, float]]) -> str:
    """The words of a prompt, one a line, after their parts of the attention that all of them get."""
    whole = max(sum(weight for _, weight in found), 1e-12)
    return "\n".join(f"{weight / whole:.0%}  {word}".replace("\n", "↵") for word, weight in found)


class AttentionView:
    """Logs each chunk's attention into the Rerun recording of this process, if there is one."""

    def __init__(self, config: PI0Config) -> None:
        self.config = config
        self._warned = False
        self._blueprint: Any = None  # LeRobot's, to which ours was added

    @contextmanager
    def shown(self, model: PI0, obs: Observation, batch: Mapping[str, Any]) -> Iterator[None]:
        """Show where the actions of the chunk look that is sampled within this block, from this observation.

        Args:
            batch: of which the observation was made; its first observation is shown.
        """
        rerun = sys.modules.get("rerun")
        if rerun is None or rerun.get_global_data_recording() is None:
            if not self._warned:
                self._warned = True
                logger.warning("show_attention=true shows nothing without lerobot-rollout --display_data=true")
            yield
            return
        with recorded(model) as seen:
            yield
        found = Parts(*(x[:1].cpu() for x in parts(seen.weights(), obs, model)))
        hot = heats(found, batch, self.config)
        most = max(float(heat.max()) for heat in hot.values())
        for key, heat in hot.items():
            place = f"observation.{key.removeprefix('observation.images.')}/attention"
            rerun.log(place, rerun.Image(tint(heat.numpy(), most), draw_order=1.0), static=True)
        rerun.log("attention", rerun.TextDocument(self._text(found, obs, batch, hot)), static=True)
        self._add_text_view(rerun)

    @staticmethod
    def _text(found: Parts, obs: Observation, batch: Mapping[str, Any], cameras: Mapping[str, Any]) -> str:
        """Shares of the parts of the input; and the words, if it is known which step made their tokens."""
        shares = found.shares([key.removeprefix("observation.images.") for key in cameras])
        text = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        if TOKENIZER_STEP not in batch:
            return text
        return f"{text}\n\n{lines(words_of(batch[TOKENIZER_STEP].input_tokenizer, obs, found))}"

    def _add_text_view(self, rerun: Any) -> None:
        """Show the text beside LeRobot's views, once it has arranged them, which it does after its first frame."""
        from lerobot.utils.rerun_visualization import log_rerun_data

        theirs = getattr(log_rerun_data, "blueprint", None)
        if theirs is None or theirs is self._blueprint:
            return
        self._blueprint = theirs
        text = rerun.blueprint.TextDocumentView(origin="attention", name="attention")
        grid = rerun.blueprint.Grid(*theirs.root_container.contents, text)
        rerun.send_blueprint(rerun.blueprint.Blueprint(grid))
