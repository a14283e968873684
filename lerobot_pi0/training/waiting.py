"""Data loader: how long the steps of a run wait for it, beside the time that they take."""

import logging
import time
from collections.abc import Callable
from statistics import median

logger = logging.getLogger(__name__)

STEPS = 50
"""Steps that are looked at together; their medians leave out the pauses for checkpoints and evaluation."""


class Waiting:
    """Warns once if a run waits for data longer than it computes.

    Args:
        clock: time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began: float | None = None
        self._ended: float | None = None
        self._waits: list[float] = []
        self._steps: list[float] = []
        self._said = False

    def begin(self) -> None:
        """A batch has come."""
        self._began = self._clock()
        if self._ended is not None:
            self._waits.append(self._began - self._ended)
            self._ended = None

    def end(self) -> None:
        """The step with this batch is done."""
        if self._said or self._began is None:
            return
        self._ended = self._clock()
        self._steps.append(self._ended - self._began)
        self._began = None
        if len(self._steps) == STEPS:
            self._judge()
            self._waits, self._steps = [], []

    def _judge(self) -> None:
        wait, step = median(self._waits), median(self._steps)
        if wait <= step:
            return
        self._said = True
        logger.warning(
            "training waits for data: %.0f ms before each step of %.0f ms. More --num_workers; and if pictures are "
            "stored as images, LeRobot's reader decodes all of a chunk to get its actions: make videos of them "
            "(lerobot-edit-dataset --operation.type=convert_image_to_video). `lerobot-pi0 check` says if this dataset "
            "is one of those",
            1e3 * wait,
            1e3 * step,
        )
