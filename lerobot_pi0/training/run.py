"""A training run of a policy: which weights are trained, in which dtypes, how they are averaged and guarded."""

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..configuration_pi0 import PI0Config
from ..kernels import absent, rounding
from ..network.pi0 import PI0
from .ema import Ema, Trained, sharding
from .guards import Guards
from .optimizers import kind_of, use_fused_kernel
from .waiting import Waiting

logger = logging.getLogger(__name__)

PartSizes = dict[str, tuple[int, int]]
"""Per part of the network: how many parameters it has, and how many of them are trained."""


class Run:
    """The state of training between steps. The network is an argument of each call; it is never stored.

    Methods that only need parameters take the policy, because sharding (FSDP) may move parameters from the network to
    the module around it.
    """

    def __init__(self, config: PI0Config) -> None:
        self.config = config
        self._ema: Ema | None = None
        self.guards = Guards(self._check_optimizer)
        self.waiting = Waiting()
        self._sizes: PartSizes | None = None  # counted before training, which may shard the weights
        self._autocasts = self._warned_of_update = False

    def prepare(self, model: PI0, trains: bool) -> None:
        """Freeze what the options freeze, and choose dtypes; the weights may be on the `meta` device.

        Args:
            trains: whether trained weights are held in float32, whatever `dtype` says.

        Raises:
            ValueError: `vlm_quantization` does not go together with the device or with other options.
        """
        cfg = self.config
        if cfg.train_expert_only:
            model.paligemma.requires_grad_(False)
        elif cfg.freeze_vision_encoder:
            model.vision.requires_grad_(False)
        _freeze_unread(model)
        storage = getattr(torch, cfg.dtype)
        for p in model.parameters():
            p.data = p.data.to(torch.float32 if trains and p.requires_grad else storage)
        if cfg.context_cache:
            absent.leave_out(model)
        if cfg.vlm_quantization:
            rounding.check(cfg.vlm_quantization, torch.device(cfg.device))
            if trains:
                self._check_rounded_training()
            rounding.prepare(model, cfg.vlm_quantization)

    def _check_rounded_training(self) -> None:
        """Refuse to train a rounded VLM, and to save it under the names of the real one."""
        needed = [name for name in ("train_expert_only", "save_expert_only") if not getattr(self.config, name)]
        if needed:
            raise ValueError(
                "vlm_quantization trains the expert over a VLM that is rounded in memory: set "
                + " and ".join(f"--policy.{name}=true" for name in needed)
            )
        if kind := sharding():
            raise ValueError(f"vlm_quantization does not go together with {kind}: leave it out, or train under DDP")

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the network is called, as `choose_autocast` decided."""
        device = torch.device(self.config.device).type
        return torch.autocast(device, torch.bfloat16) if self._autocasts else nullcontext()

    def choose_autocast(self, policy: nn.Module) -> None:
        """Use autocast where weights have two dtypes; with a single dtype it would only cost time."""
        self._autocasts = self.config.dtype == "bfloat16" and any(p.dtype == torch.float32 for p in policy.parameters())

    def set_dtypes(self, policy: nn.Module) -> None:
        """Before training: trained weights to float32, and float32 weights that an adapter froze back to `dtype`."""
        storage = getattr(torch, self.config.dtype)
        for p in policy.parameters():
            wanted = torch.float32 if p.requires_grad else storage
            if p.is_floating_point() and p.dtype != wanted and (p.requires_grad or p.dtype == torch.float32):
                p.data = p.data.to(wanted)
        self.choose_autocast(policy)

    def trained_parameters(self, model: PI0) -> Trained:
        """The parameters that are trained, and which of them are matrices of layers.

        Raises:
            ValueError: nothing would be trained, or a part of a rounded VLM would be.
        """
        _freeze_unread(model)  # again, because adapters may be attached there
        is_whole = not absent.without_numbers(model)
        if not is_whole and any(p.requires_grad for p in model.paligemma.parameters()):
            raise ValueError(
                "a part of the VLM would be trained (--peft.target_modules?), but it is rounded, or not in memory: "
                "leave vlm_quantization and context_cache out, or train the expert alone"
            )
        layers = {id(p) for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2}
        trained = Trained((p for p in model.parameters() if p.requires_grad), layers)
        if not trained:
            raise ValueError(
                "nothing would be trained: the adapter's targets (--peft.target_modules) are only layers on which π₀'s "
                "actions do not depend (queries, attention output and MLP of the VLM's last layer). Add other layers"
            )
        return trained

    def averaged(self, trained: Trained) -> Trained:
        """The same parameters, with their averages if `ema_decay` is set.

        Raises:
            ValueError: there are adapters or sharded weights, whose averages would be lost when the run is resumed.
        """
        if not self.config.ema_decay:
            return trained
        if obstacle := "adapters" if self.config.use_peft else sharding():
            raise ValueError(
                f"ema_decay does not go together with {obstacle}: there the policy does not write the checkpoint, and "
                "the average would be lost. Set --policy.ema_decay=0"
            )
        if self._ema is None or {*map(id, self._ema)} != {*map(id, trained)}:
            self._ema = Ema(trained, self.config.ema_decay, trained.matrices)
        return self._ema

    def deploy(self, deployed: bool) -> None:
        """Put the averages into the network, or the trained weights back."""
        if self._ema is not None:
            self._ema.deploy(deployed)

    def deployed_state(self, policy: nn.Module, gathered: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The state dict to save, with the averages in place of the averaged weights.

        Args:
            gathered: a state dict that was gathered from several processes (FSDP), in place of the policy's own.

        Raises:
            ValueError: there are averages and gathered weights.
        """
        self.catch_up()
        if self._ema is None:
            return policy.state_dict() if gathered is None else gathered
        if gathered is not None:
            raise ValueError(
                "ema_decay does not go together with weights that are gathered from several processes: set "
                "--policy.ema_decay=0"
            )
        return policy.state_dict() | self._ema.deployed_state(policy.named_parameters())

    def update(self) -> None:
        """After a step of the optimizer: count it, so that the next draws are new, and update the averages."""
        self.guards.stepped = False
        self.waiting.end()
        self.config.updates += 1
        if self._ema is not None:
            self._ema.update()

    def catch_up(self) -> None:
        """Call `update` if the training loop did not; otherwise draws would repeat and averages would not change."""
        if self.guards.stepped:
            if not self._warned_of_update:
                self._warned_of_update = True
                logger.warning("policy.update() was not called after the optimizer's step, and is called now")
            self.update()

    def _check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that the options do not ask for: the run sets another one, or is resumed."""
        remedy = (
            "leave --use_policy_training_preset at true; a run that is resumed keeps its optimizer, so leave the "
            "option as it was, or begin a new run from its checkpoint (--policy.path)"
        )
        if self.config.ema_decay and (self._ema is None or not self._ema.averages):
            raise ValueError(f"ema_decay needs the policy's own optimizer, which carries the averages: {remedy}")
        for option in ("optimizer_8bit", "optimizer_muon"):
            if bool(asked := getattr(self.config, option)) != (kind_of(optimizer) == option):
                raise ValueError(f"{option}={asked}, but the optimizer is {type(optimizer).__name__}: {remedy}")
        use_fused_kernel(optimizer)

    def part_sizes(self, model: PI0) -> PartSizes:
        """`part_sizes` as counted before training began."""
        return self._sizes or part_sizes(model)

    def log_trained(self, model: PI0) -> None:
        """Log once how much of each part of the network is trained."""
        if self._sizes is None:
            self._sizes = part_sizes(model)
            parts = [f"{name} {own / 1e6:.2f} of {n / 1e6:.2f} M" for name, (n, own) in self._sizes.items()]
            logger.info("trained: %s", ", ".join(parts))


def part_sizes(model: PI0) -> PartSizes:
    """Per part of the network: how many parameters it has, and how many of them are trained."""
    parts = {"vision tower": model.vision, "VLM": model.vlm, "action expert": model.expert}
    sizes = {name: _count(part.parameters()) for name, part in parts.items()}
    total, trained = _count(model.parameters())
    rest = (total - sum(n for n, _ in sizes.values()), trained - sum(own for _, own in sizes.values()))
    return sizes | {"projections": rest}


def _count(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    sizes = [(p.numel(), p.numel() * p.requires_grad) for p in parameters]
    return sum(n for n, _ in sizes), sum(own for _, own in sizes)


def _freeze_unread(model: PI0) -> None:
    """Freeze `PI0.unread_parameters`, which get no gradient."""
    for p in model.unread_parameters():
        p.requires_grad_(False)
