"""Comparison of a checkpoint's tensors with a network's parameters, by names, shapes and kinds, before any is read."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from .errors import MismatchedCheckpointError, WrongPolicyError
from .reading import Stored
from .tensor_bytes import DTYPES

logger = logging.getLogger(__name__)

SHAPING = ("paligemma_variant", "action_expert_variant", "max_state_dim", "max_action_dim", "image_resolution")
"""Options on which shapes of weights depend."""


def general_advice() -> str:
    """What to look at where weights do not fit and nothing more is known."""
    return f"Check {', '.join(SHAPING)}"


def check_tensors(
    place: str | Path,
    wanted: Mapping[str, Tensor],
    found: Mapping[str, Stored],
    strict: bool = True,
    advice: Callable[[], str] = general_advice,
) -> list[str]:
    """Compare what a network needs with what a checkpoint has.

    Args:
        place: the checkpoint's name, for messages.
        strict: False forgives, with a warning, what is missing or unexpected.
        advice: the remedy for shapes that differ; called only when they do.

    Returns:
        Names of the parameters that are missing.

    Raises:
        CheckpointError: they are not this network's.
    """
    if not (differences := describe_differences(wanted, found)):
        return []
    report = f"the weights of {place} do not fit the network. {differences}"
    surplus = [stored.name for name, stored in found.items() if name not in wanted]
    if any("time_mlp_in" in name and "action_" not in name for name in surplus):
        raise WrongPolicyError(f"{report}. These are weights of π₀.₅: use --policy.type=pi05")
    if not any("gemma_expert" in name for name in found):
        raise WrongPolicyError(f"{report}. There is no action expert: these are weights of a VLM, or of π₀-FAST")
    if strict or not all(_fits(s, wanted[name]) for name, s in found.items() if name in wanted):
        raise MismatchedCheckpointError(
            f"{report}. {advice()}; strict=False takes what fits and leaves the rest random"
        )
    logger.warning("%s. strict=False: the missing ones are random", report)
    return [name for name in wanted if name not in found]


def describe_differences(wanted: Mapping[str, Tensor], found: Mapping[str, Stored]) -> str:
    """What is missing, unexpected, or of another shape or kind; empty if nothing is."""
    misfits = [
        f"{s.name} is {s.dtype} {s.shape}, expected {tuple(wanted[name].shape)} of a floating-point type"
        for name, s in found.items()
        if name in wanted and not _fits(s, wanted[name])
    ]
    lines = []
    for title, names in (
        ("missing", [name for name in wanted if name not in found]),
        ("unexpected", [stored.name for name, stored in found.items() if name not in wanted]),
        ("misfits", misfits),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            lines.append(f"{len(names)} {title}: {', '.join(names[:5])}{more}")
    return "; ".join(lines)


def _fits(stored: Stored, wanted: Tensor) -> bool:
    return stored.shape == tuple(wanted.shape) and stored.dtype in DTYPES
