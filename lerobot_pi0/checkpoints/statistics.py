"""Statistics that a checkpoint's preprocessor normalises with."""

from typing import Any

from lerobot.utils.constants import POLICY_PREPROCESSOR_DEFAULT_NAME
from safetensors.torch import load_file
from torch import Tensor

from . import checkpoint


def read_statistics(source: Any, **hub: Any) -> dict[str, dict[str, Tensor]]:
    """Per feature and statistic ("mean", "std", "min", …) its numbers; empty if the preprocessor holds none.

    Raises:
        CheckpointError: a file is not there or broken.
    """
    file = checkpoint.hub_or_local(source, f"{POLICY_PREPROCESSOR_DEFAULT_NAME}.json", **hub)
    steps = checkpoint.read_json(file).get("steps", []) if file is not None else []
    names = [step.get("state_file") for step in steps if step.get("registry_name") == "normalizer_processor"]
    file = checkpoint.hub_or_local(source, names[0], **hub) if names and names[0] else None
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in (load_file(file) if file is not None else {}).items():
        key, _, statistic = name.rpartition(".")
        found.setdefault(key, {})[statistic] = value
    return found
