"""Optimizers and schedules that LeRobot knows by name after `take_over`: AdamW with averages (EMA) or 8-bit moments,
and openpi's learning rate schedule.

A run's `train_config.json` holds these names, and `--resume` builds the optimizer and the schedule from them. Every
LeRobot command imports this module when it starts; bitsandbytes is imported only to build an 8-bit optimizer.
"""

import math
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .ema import Ema, Trained, sharding
from .muon import MuonAdamW


def _arguments(config: AdamWConfig) -> dict[str, Any]:
    """What an optimizer takes of a config: LeRobot's loop clips gradients itself."""
    return {name: x for name, x in asdict(config).items() if name != "grad_clip_norm"}


def _of_the_policy(config: AdamWConfig, params: Any) -> Trained:
    """The parameters, if they are what the policy says that it trains.

    Raises:
        ValueError: LeRobot passes all parameters, because the run sets its optimizer itself.
    """
    if not isinstance(params, Trained):
        raise ValueError(
            f"optimizer.type={config.type} is built for what the policy trains: leave --use_policy_training_preset at "
            "true, and choose it by --policy.ema_decay, --policy.optimizer_muon or --policy.optimizer_8bit"
        )
    return params


@dataclass
class AveragedAdamWConfig(AdamWConfig):
    """AdamW whose state carries the averages of the weights (`ema_decay`)."""

    def build(self, params: Any) -> Optimizer:
        """Build it for the parameters and averages that `PI0Policy.get_optim_params` returned.

        Raises:
            ValueError: the policy keeps no averages, but the run that is resumed does.
        """
        if not isinstance(_of_the_policy(self, params), Ema):
            raise ValueError(
                f"this run averages its weights (optimizer.type={self.type}), but ema_decay is not set: a run keeps "
                "its ema_decay until it ends"
            )
        optimizer = super().build(params)
        params.attach(optimizer)
        return optimizer


@dataclass
class AdamW8bitConfig(AdamWConfig):
    """AdamW of bitsandbytes, whose moments take one byte each (`optimizer_8bit`)."""

    def build(self, params: Any) -> Optimizer:
        """Build it, and import bitsandbytes for it.

        Raises:
            ImportError: bitsandbytes is not installed.
            ValueError: the weights are sharded over processes, and a checkpoint would hold the moments of only one.
        """
        if kind := sharding():
            raise ValueError(
                f"optimizer_8bit does not go together with {kind}, whose checkpoints would not hold its states: set "
                "--policy.optimizer_8bit=false"
            )
        try:
            from .bitsandbytes_adamw import AdamW8bit
        except ImportError as error:
            raise ImportError(
                f"optimizer_8bit needs bitsandbytes: pip install 'lerobot_policy_pi0[bitsandbytes]' ({error})"
            ) from error
        return AdamW8bit(params, **_arguments(self))


@dataclass
class MuonConfig(AdamWConfig):
    """Muon for the matrices of the layers, AdamW for all other weights (`optimizer_muon`)."""

    def build(self, params: Any) -> Optimizer:
        """Build it for the parameters that `PI0Policy.get_optim_params` returned.

        Raises:
            ValueError: the weights are sharded over processes, and a matrix is nowhere whole.
        """
        if kind := sharding():
            raise ValueError(f"optimizer_muon does not go together with {kind}: set --policy.optimizer_muon=false")
        return MuonAdamW(*_of_the_policy(self, params).parted(), **_arguments(self))


@dataclass
class AveragedMuonConfig(AveragedAdamWConfig, MuonConfig):
    """Muon and AdamW; the state carries the averages of the weights."""


@dataclass
class AveragedAdamW8bitConfig(AveragedAdamWConfig, AdamW8bitConfig):
    """AdamW with 8-bit moments; its state carries the averages of the weights in float32."""


def use_fused_kernel(optimizer: Optimizer, on: str = "cuda") -> None:
    """Let AdamW use its fused kernel for weights on CUDA, unless the user chose another one.

    torch's default there allocates temporary tensors as large as the weights.

    Args:
        on: the type of the device.
    """
    for group in optimizer.param_groups:
        parameters = group["params"]
        chosen = group.get("fused", True) is not None or group.get("foreach") is not None
        if chosen or not all(p.device.type == on and p.is_floating_point() for p in parameters):
            continue
        group["fused"] = True
        for p in parameters:  # in a resumed run: the fused kernel counts steps on the device
            state = optimizer.state.get(p, {})
            if "step" in state:
                state["step"] = state["step"].to(p.device, torch.float32)


def kind_of(optimizer: Optimizer) -> str | None:
    """The option with which this optimizer was built: optimizer_8bit, optimizer_muon, or None."""
    if isinstance(optimizer, MuonAdamW):
        return "optimizer_muon"
    module = sys.modules.get(f"{__package__}.bitsandbytes_adamw")  # an import would need bitsandbytes
    return "optimizer_8bit" if module is not None and isinstance(optimizer, module.AdamW8bit) else None


@dataclass
class WarmupCosineConfig(CosineDecayWithWarmupSchedulerConfig):
    """openpi's schedule: linear from peak / (warm-up + 1) to the peak, then half a cosine until `num_decay_steps`.

    LeRobot's schedule with the same options is shortened to the length of the run, and its cosine begins at step 0.
    Source: openpi `training/optimizer.py: CosineDecaySchedule`, which is optax's warm-up and cosine.
    """

    def build(self, optimizer: Optimizer, num_training_steps: int) -> LambdaLR:
        warmup, end, last = self.num_warmup_steps or 0, self.num_decay_steps, self.decay_lr / self.peak_lr

        def factor(step: int) -> float:
            if step < warmup:
                return 1 / (warmup + 1) + step / (warmup + 1)
            progress = min((step - warmup) / max(end - warmup, 1), 1.0)
            return last + (1 - last) * (1 + math.cos(math.pi * progress)) / 2

        return LambdaLR(optimizer, factor)


OPTIMIZERS = {
    "pi0_averaged_adamw": AveragedAdamWConfig,
    "pi0_adamw_8bit": AdamW8bitConfig,
    "pi0_averaged_adamw_8bit": AveragedAdamW8bitConfig,
    "pi0_muon": MuonConfig,
    "pi0_averaged_muon": AveragedMuonConfig,
}
SCHEDULES = {"pi0_warmup_cosine": WarmupCosineConfig}
"""Optimizers and schedules of the plugin by their names in train_config.json; `take_over` registers them."""
