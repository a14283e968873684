"""What `lerobot-pi0 check` asks, one function per question; a new question is a line in `CHECKS`."""

from collections.abc import Callable, Iterable

from .bookkeeping import episodes_statistics, places
from .cameras import cameras, pictures_of_training
from .contexts import contexts
from .demonstrations import drift, idle, jumps, lengths, limits
from .episodes import episodes, prompts
from .files import files
from .joints import joints
from .pictures import images
from .statistics import outliers, statistics
from .subject import Finding, Subject
from .training import memory, one_batch, reading, stream, unread, weights
from .units import motion, units

CHECKS: tuple[Callable[[Subject], Iterable[Finding]], ...] = (
    files, places, cameras, pictures_of_training, images, joints, units, motion, statistics, episodes_statistics,
    outliers, prompts, episodes, lengths, idle, jumps, limits, drift, one_batch, reading, stream, unread,
    weights, contexts, memory,
)  # fmt: skip
"""In the order of the report."""

NEED_FRAMES = frozenset(CHECKS) - {
    files, cameras, pictures_of_training, joints, reading, unread, weights, contexts, memory,
}  # fmt: skip
"""What cannot be asked where no frame can be read."""
