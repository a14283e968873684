"""PI0Policy: LeRobot's contract, and nothing else.

What a method does is done by one of its collaborators: `Objective` makes losses, `Run` keeps what belongs to a training
run, `Player` samples and executes chunks. The network is handed to them with each call.

Axes: B batch, K flow samples, T steps of a chunk, A action dims.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn

from . import kernels
from .checkpoints.checkpoint import Checkpoint
from .checkpoints.configs import check_without_checkpoint, resolve
from .checkpoints.names import VLM
from .checkpoints.origin import Origin
from .checkpoints.publishing import Publishing, remember_for_card, whole_state
from .checkpoints.source import HUB_OPTIONS
from .configuration_pi0 import PI0Config
from .control import bounds
from .control.lerobot_names import CHUNK_ARGUMENTS, LeRobotNames, refuse_unknown
from .control.player import Player
from .control.sampling import Sampler
from .inputs.features import narrow_padded
from .inputs.normalisation import Normalisation, digest_of
from .inputs.samples import leave_out_depth
from .inputs.statistics import check_dataset
from .kernels import absent
from .network import init
from .network.pi0 import PI0
from .training import context_cache, lora
from .training.environment_state import EnvironmentState
from .training.objective import Objective
from .training.run import Run


class PI0Policy(LeRobotNames, Publishing, PreTrainedPolicy):
    """π₀ as LeRobot trains, evaluates and runs it; `from_pretrained` loads a checkpoint or raises."""

    config_class = PI0Config  # type: ignore[assignment]
    name = "pi0"  # type: ignore[assignment]
    _fsdp_wrap_modules = ["Layer", "SiglipEncoderLayer"]  # what LeRobot after 0.6.1 shards by

    def __init__(
        self,
        config: PI0Config,
        dataset_stats: dict[str, dict[str, Any]] | None = None,
        dataset_meta: Any = None,
        **kwargs: Any,
    ) -> None:
        """Build a policy with random weights, or with the VLM of `vlm_path`.

        Args:
            config: options; features are taken from it.
            dataset_stats, dataset_meta: what `make_policy` passes when there is a dataset. Statistics are
                then checked, and trained weights are held in float32.

        Raises:
            CheckpointError: `vlm_path` holds no PaliGemma of the preset's size.
            ValueError: options, features or statistics do not go together.
        """
        vlm = getattr(config, "vlm_path", None)  # a config of another class is refused below, by name
        check_without_checkpoint(config)
        self._build(config, dataset_stats, dataset_meta, {"start": vlm}, vlm is not None)
        self._initialise(name for name, _ in self.named_parameters() if vlm is None or not name.startswith(VLM))
        self.objective.prepare(self.model)
        if vlm is not None:
            Checkpoint.open(vlm).read_vlm(self, config)
        self.finish()

    @classmethod
    def empty(
        cls,
        config: PI0Config,
        dataset_stats: dict[str, dict[str, Any]] | None = None,
        dataset_meta: Any = None,
        saved: dict[str, Any] | None = None,
        pretrained: bool = False,
        statistics: Callable[[], Normalisation | None] = lambda: None,
    ) -> "PI0Policy":
        """A policy whose weights are on the `meta` device, in their final dtypes: fill them in, then call `finish`.

        Args:
            config, dataset_stats, dataset_meta: as for `PI0Policy()`.
            saved: what the checkpoint's `lerobot_pi0.json` says.
            pretrained: whether the VLM will get trained weights, which decides what is frozen by default.
            statistics: reads what the checkpoint's processors do; called if an option needs it and no dataset is given.

        Raises:
            ValueError: options, features or statistics do not go together.
        """
        policy = cls.__new__(cls)
        policy._build(config, dataset_stats, dataset_meta, saved or {}, pretrained, statistics)
        return policy.eval()

    def _build(
        self,
        config: PI0Config,
        dataset_stats: dict[str, dict[str, Any]] | None,
        dataset_meta: Any,
        saved: dict[str, Any],
        pretrained: bool,
        statistics: Callable[[], Normalisation | None] = lambda: None,
    ) -> None:
        if not isinstance(config, PI0Config):
            raise TypeError(f"config is a {type(config).__name__}, expected lerobot_pi0.PI0Config")
        super().__init__(config)
        self.observe = context_cache.observations(config)
        leave_out_depth(config)
        config.validate_features()
        trains = dataset_stats is not None or dataset_meta is not None
        self._expert_only_asked = config.train_expert_only is True  # by the user, and not because the VLM is pretrained
        resolve(config, saved, pretrained)
        stats = dataset_stats if dataset_stats is not None else getattr(dataset_meta, "stats", None)
        known = statistics if stats is None else lambda: Normalisation.of(config, stats)
        self.observe.padded = narrow_padded(config, lambda: getattr(known(), "statistics", None))
        if trains:
            check_dataset(config, stats, dataset_meta)
        limits = bounds.make_bounds(config, known)
        with torch.device("meta"):
            self.model = PI0(config.architecture(), config.image_size)
        kernels.install(self.model)
        self._run = Run(config)
        self._run.prepare(self.model, trains)
        absent.hide_from_ddp(self)
        sampler = Sampler(config.compile_mode if config.compile_model else None, config.cuda_graphs)
        places = EnvironmentState.of(config, stats) if trains else None
        self.objective = Objective(config, self.observe, sampler, self._run.autocast, places)
        self._player = Player(config, self.observe, sampler, self._run.autocast, limits)
        self.init_rtc_processor()
        config.updates = saved.get("updates", 0)
        self.origin = Origin(saved.get("start"), statistics=digest_of(stats))

    def _initialise(self, names: Iterable[str]) -> None:
        """Random numbers for these parameters; the others, which are on the `meta` device, stay there."""
        parameters, device = dict(self.named_parameters()), torch.device(self.config.device)
        if made := {name: torch.empty_like(parameters[name], device=device) for name in names}:
            self.load_state_dict(made, strict=False, assign=True)
            init.initialise(self.model)

    def finish(self) -> "PI0Policy":
        """Make a policy of `empty` ready for use, once its weights are there; returns it in evaluation mode."""
        if self.config.gradient_checkpointing:
            for stack in (self.model.vision, self.model.vlm, self.model.expert):
                stack.gradient_checkpointing = True  # keeps the input of each layer, and computes the rest again
        self._run.choose_autocast(self)
        kernels.advise(self.model)
        kernels.join(self.model)
        kernels.compile_layers(self.model, self.config.compile_mode if self.config.compile_model else None)
        return self.eval()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        strict: bool = True,
        dataset_stats: dict[str, dict[str, Any]] | None = None,
        dataset_meta: Any = None,
        **kwargs: Any,
    ) -> "PI0Policy":
        """Load a checkpoint from a folder or the Hub.

        Args:
            config: in place of the checkpoint's.
            strict: False takes a checkpoint with missing or surplus tensors, and says which are random.
            kwargs: `revision`, `token` and the other `HUB_OPTIONS`; what else LeRobot passes is not read.

        Raises:
            CheckpointError: the checkpoint is not there, broken, or not π₀'s.
        """
        checkpoint = Checkpoint.open(pretrained_name_or_path, **{k: kwargs[k] for k in HUB_OPTIONS if k in kwargs})
        config = checkpoint.config() if config is None else config
        saved = checkpoint.settle(config, dataset_meta, dataset_stats is not None or dataset_meta is not None)
        statistics = partial(checkpoint.normalisation, config)  # read only if a bound needs them
        policy = cls.empty(config, dataset_stats, dataset_meta, saved, True, statistics)  # type: ignore[arg-type]
        parameters, numberless = dict(policy.named_parameters()), absent.without_numbers(policy)
        policy._initialise(checkpoint.check(parameters, strict, policy.config, numberless))
        digests = checkpoint.read(policy, torch.device(policy.config.device), policy.config.save_expert_only)
        context_cache.check(policy.observe, digests)
        policy.origin = Origin.of(checkpoint.source, saved, digests, policy.origin.statistics)
        return policy.finish()

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a checkpoint: the old one or the new one survives a crash, never a mixture.

        Raises:
            ValueError: `save_expert_only`, but no weight comes from a checkpoint, none is frozen, or `save_directory`
                is that checkpoint. Without it: the VLM is rounded, and its weights are not here to be written.
        """
        state, writes = whole_state(self, state_dict)
        if writes:
            self.origin.save(save_directory, self.config, self, self._run.deployed_state(self, state))

    def train(self, mode: bool = True) -> "PI0Policy":
        """Switch to training and its weights, or to evaluation and the averages; LeRobot calls this at every step."""
        self._run.catch_up()
        if mode != self.training:
            self._run.deploy(not mode)
        if mode and not self.training:
            self._run.set_dtypes(self)
            self.objective.report_chunk_errors()
            self._run.log_trained(self.model)
        return super().train(mode)  # in every case, as adapters that were attached have a mode of their own

    def get_optim_params(self) -> list[nn.Parameter]:  # type: ignore[override]
        """The parameters that are trained, and no others; with their averages if `ema_decay` is set.

        Raises:
            ValueError: there are none, they are to be averaged where that cannot be kept, or the checkpoints that are
                asked for could not be written.
        """
        trained = self._run.trained_parameters(self.model)
        self.origin.check_run(self.config, self)
        self._run.log_trained(self.model)
        remember_for_card(self.config, self._run.part_sizes(self.model), self.origin.start)
        return self._run.averaged(trained)

    def reset(self) -> None:
        """Forget the chunk that is being executed; to be called between episodes."""
        self._player.reset()
        if not self.training:
            self._player.warm_up(self.model)

    def forward(
        self,
        batch: dict[str, Any],
        reduction: Literal["mean", "none"] = "mean",
        noise: Tensor | None = None,
        time: Tensor | None = None,
        delay: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The flow-matching loss of a preprocessed batch, and numbers to log.

        Args:
            reduction: "mean" gives a scalar, "none" a loss per sample, (B,).
            noise: ε to use in place of random draws, (B, K, T, max_action_dim). Under `eval()` K is
                `training.objective.HELD_OUT_SAMPLES`, and t has LeRobot's distribution.
            time: t to use in place of random draws, (B, K).
            delay: how many actions are known, in place of random draws, (B, K); read if `rtc_training_max_delay`.

        Raises:
            ObservationError: the batch is not what the policy was made for.
            ValueError: an unknown reduction, or draws of other shapes.
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction={reduction!r} is not one of mean, none")
        loss, per_sample, info = self.objective.summary(*self._losses(batch, noise, time, delay))
        self._run.guards.check_loss(self, info["loss"], per_sample, batch)
        if not (self.training or torch.is_grad_enabled()):
            info["chunk_error"] = self.objective.chunk_error(self.model, batch, self._player.sample)
        return (loss if reduction == "mean" else per_sample), info

    def losses(
        self,
        batch: dict[str, Any],
        noise: Tensor | None = None,
        time: Tensor | None = None,
        delay: Tensor | None = None,
    ) -> Tensor:
        """Squared errors of the velocity, float32 (B, K, T, dims of the robot's actions); see `Objective.losses`."""
        return self._losses(batch, noise, time, delay)[0]

    def _losses(self, batch: dict[str, Any], *draws: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self._run.catch_up()
        if self.training:
            self._run.waiting.begin()
        return self.objective.losses(self.model, batch, *draws)

    def update(self) -> None:
        """Count a step of the optimizer: to be called after each, as LeRobot does, for new draws and averages."""
        self._run.update()

    @torch.compiler.disable  # lerobot-rollout compiles this method from outside; `compile_model` is enough
    @torch.inference_mode(False)  # tensors of inference mode cannot be differentiated, which guidance does
    @torch.no_grad()
    def predict_action_chunk(
        self,
        batch: dict[str, Any],
        noise: Tensor | None = None,
        *,
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        execution_horizon: int | None = None,
        num_steps: int | None = None,
        **unknown: Any,
    ) -> Tensor:
        """A chunk of (normalised) actions, float32 (B, T, dims of the robot's actions).

        Args:
            noise: `noise_temperature` times this is where the integration starts, (B, T, max_action_dim); standard
                normal by default.
            inference_delay: actions that the robot will have executed by the time the chunk is there.
            prev_chunk_left_over: what the robot has still to execute, as this method returned it: (steps, dims) or
                (B, steps, dims). Read while `config.rtc_config` is enabled.
            execution_horizon: in place of `config.rtc_config`'s.
            num_steps: of the solver, in place of `config.num_inference_steps`.

        Raises:
            ObservationError: the batch is not what the policy was made for.
            TypeError: an argument that there is not; names the nearest.
            ValueError: noise or left-over actions of another shape.
            FloatingPointError: the network's output is not finite.
        """
        refuse_unknown(unknown)
        how = noise, inference_delay, prev_chunk_left_over, execution_horizon, num_steps
        return self._player.chunk(self.model, batch, *how)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """The next action of each environment, (B, dims); a new chunk every `n_action_steps` calls.

        Raises:
            RuntimeError: the number of environments changed in the middle of a chunk.
        """
        if kwargs:
            refuse_unknown(kwargs.keys() - CHUNK_ARGUMENTS)
        player = self._player
        if player.needs_chunk():
            player.start(self.predict_action_chunk(batch, **kwargs), batch)
        return player.next_action(batch)

    def _get_default_peft_targets(self) -> dict[str, Any]:
        """What LoRA adapts: openpi's recipe, without the VLM if `train_expert_only` was asked for."""
        rounded = self.config.vlm_quantization is not None
        return lora.targets(self.model.vlm.cfg.depth, with_vlm=not self._expert_only_asked, vlm_is_rounded=rounded)

    def _build_peft_config(self, cli_overrides: dict[str, Any]) -> Any:
        return super()._build_peft_config(lora.with_ranks(cli_overrides))
