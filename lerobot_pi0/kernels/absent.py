"""A VLM that is not in memory: what is trained on cached contexts (`context_cache`) never calls it.

Its parameters keep their names and shapes, and stay on the `meta` device: nothing moves them, nothing fills them, and a
checkpoint leaves them to its base.
"""

from typing import Any

from torch import nn

from ..network.pi0 import PI0
from . import rounding


class Absent(nn.ModuleDict):
    """Vision tower, projector and language model without numbers."""

    def _apply(self, fn: Any, recurse: bool = True) -> "Absent":
        """What `to()` does to each tensor: nothing, as there is none to move."""
        return self


def leave_out(model: PI0) -> None:
    """Freeze the VLM of a network on the `meta` device, and leave it there for good."""
    model.paligemma.requires_grad_(False)
    model.paligemma.__class__ = Absent
    model.vision.register_forward_pre_hook(_refuse)  # every context begins with it


def _refuse(module: nn.Module, args: Any) -> None:
    raise RuntimeError(
        "the VLM is not in memory (context_cache), so this policy can be trained on cached contexts and cannot act: "
        "load its checkpoint without context_cache, as lerobot-rollout and lerobot-eval do"
    )


def names(module: nn.Module) -> set[str]:
    """Names of the parameters of a VLM that is left out."""
    parts = [(prefix, part) for prefix, part in module.named_modules() if isinstance(part, Absent)]
    return {name for prefix, part in parts for name, _ in part.named_parameters(prefix)}


def without_numbers(module: nn.Module) -> set[str]:
    """Names of all parameters that have no numbers: of a VLM that is left out, or rounded."""
    return names(module) | rounding.layers(module).keys()


def hide_from_ddp(module: nn.Module) -> None:
    """Let DDP pass these parameters over, as it cannot send what has no numbers; peft puts a prefix before names."""
    if found := [prefix + name for name in sorted(without_numbers(module)) for prefix in ("", "base_model.model.")]:
        module._ddp_params_and_buffers_to_ignore = found  # type: ignore[assignment]
