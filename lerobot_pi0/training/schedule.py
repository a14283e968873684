"""openpi's learning-rate schedule (`training/optimizer.py: CosineDecaySchedule`, optax's warm-up and cosine)."""

import math
from dataclasses import dataclass

from lerobot.optim import CosineDecayWithWarmupSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass
class WarmupCosineConfig(CosineDecayWithWarmupSchedulerConfig):
    """Linear from peak / (warm-up + 1) to the peak, then half a cosine that ends at `num_decay_steps`.

    LeRobot's schedule of the same options shrinks to the length of the run, and its cosine begins at step 0.
    """

    def build(self, optimizer: Optimizer, num_training_steps: int) -> LambdaLR:
        warmup, end, last = self.num_warmup_steps or 0, self.num_decay_steps, self.decay_lr / self.peak_lr

        def factor(step: int) -> float:
            if step < warmup:
                return 1 / (warmup + 1) + step / (warmup + 1)
            progress = min((step - warmup) / max(end - warmup, 1), 1.0)
            return last + (1 - last) * (1 + math.cos(math.pi * progress)) / 2

        return LambdaLR(optimizer, factor)
