"""What `lerobot-pi0 check` asks, one function per question; a new question is a line in `CHECKS`."""

from collections.abc import Callable, Iterable

from .cameras import cameras, pictures_of_training
from .episodes import episodes, prompts
from .joints import joints
from .pictures import images
from .statistics import outliers, statistics
from .subject import Finding, Subject
from .training import memory, one_batch, weights
from .units import motion, units

CHECKS: tuple[Callable[[Subject], Iterable[Finding]], ...] = (
    cameras, pictures_of_training, images, joints, units, motion, statistics, outliers, prompts, episodes, one_batch,
    weights, memory,
)  # fmt: skip
"""In the order of the report."""
