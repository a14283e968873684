"""The optimizer with states of 8 bits (`optimizer_8bit`), as LeRobot chooses and resumes it; bitsandbytes makes it."""

import sys
from dataclasses import asdict, dataclass
from typing import Any

from lerobot.optim import AdamWConfig
from torch.optim import Optimizer

from .ema import AveragedAdamWConfig, sharding


def is_8bit(optimizer: Optimizer) -> bool:
    """Whether it is what `AdamW8bitConfig` builds."""
    module = sys.modules.get(f"{__package__}.adamw_8bit")  # not imported for the question: it needs bitsandbytes
    return module is not None and isinstance(optimizer, module.AdamW8bit)


@dataclass
class AdamW8bitConfig(AdamWConfig):
    """AdamW whose moments take a byte each."""

    def build(self, params: Any) -> Optimizer:
        """
        Raises:
            ImportError: bitsandbytes is not there.
            ValueError: the weights are spread over processes, which would save the states of one.
        """
        if kind := sharding():
            raise ValueError(
                f"optimizer_8bit does not go together with {kind}, whose checkpoints would not hold its states: set "
                "--policy.optimizer_8bit=false"
            )
        try:
            from .adamw_8bit import AdamW8bit
        except ImportError as error:
            raise ImportError(
                f"optimizer_8bit needs bitsandbytes: pip install 'lerobot_policy_pi0[bitsandbytes]' ({error})"
            ) from error
        options = asdict(self)
        del options["grad_clip_norm"]
        return AdamW8bit(params, **options)


@dataclass
class AveragedAdamW8bitConfig(AveragedAdamWConfig, AdamW8bitConfig):
    """Its moments take a byte each, and its state carries the averages, in float32."""
