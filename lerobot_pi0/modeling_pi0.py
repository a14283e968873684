"""PI0Policy: LeRobot's contract around the network. No math here.

Axes: B batch, K flow samples, T steps of a chunk, A action dims.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import ModelCard
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor, nn
from torch.optim import Optimizer

from .checkpoints.checkpoint import Checkpoint
from .checkpoints.errors import CheckpointConfigError
from .checkpoints.model_card import make_card
from .checkpoints.names import VLM
from .checkpoints.origin import Origin
from .configuration_pi0 import PLUGIN_CONFIG_NAME, PLUGIN_FIELDS, PI0Config, dim_name
from .control import bounds, guidance
from .control.calls import Calls
from .inputs.observation import IS_PAD, ObservationMaker
from .inputs.prompt import PromptStep
from .inputs.relative import Anchor, check_relative_statistics
from .kernels import rounding
from .network import flow
from .network.pi0 import PI0, Observation
from .processor_pi0 import check_statistics
from .training import augment, lora
from .training.eight_bit import is_8bit
from .training.ema import Ema, check_averaging, sharding
from .training.watch import HeldOut, Watch

logger = logging.getLogger(__name__)

HELD_OUT_SAMPLES = 4
"""K of held-out losses, whatever training's is: they are to compare."""


class PI0Policy(PreTrainedPolicy):
    """π₀ as LeRobot trains, evaluates and runs it.

    Built from a config it starts from random weights, or with the VLM of `vlm_path`; `from_pretrained` loads a
    checkpoint or raises.
    """

    config_class = PI0Config  # type: ignore[assignment]
    name = "pi0"  # type: ignore[assignment]

    def __init__(
        self,
        config: PI0Config,
        dataset_stats: dict[str, dict[str, Any]] | None = None,
        dataset_meta: Any = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            config: options; features are taken from it.
            dataset_stats, dataset_meta: what `make_policy` passes when there is a dataset. Statistics are
                then checked, and trained weights are held in float32.
        """
        vlm = getattr(config, "vlm_path", None)  # a config of another class is refused below, by name
        if getattr(config, "vlm_quantization", None):
            raise ValueError(
                "vlm_quantization rounds the VLM of a checkpoint when it is loaded, and there is none: give "
                "--policy.path or --policy.pretrained_path, or leave it out"
            )
        self._build(config, dataset_stats, dataset_meta, saved={"start": vlm}, pretrained=vlm is not None)
        self._initialise(name for name, _ in self.named_parameters() if vlm is None or not name.startswith(VLM))
        if vlm is not None:
            Checkpoint.open(vlm).read_vlm(self, config)
        self._finish()

    def _build(
        self,
        config: PI0Config,
        dataset_stats: dict[str, dict[str, Any]] | None,
        dataset_meta: Any,
        saved: dict[str, Any],
        pretrained: bool,
        statistics: Callable[[], bounds.Statistics | None] = lambda: None,
    ) -> None:
        """Everything but the weights: the network is on the `meta` device, in its final dtypes."""
        if not isinstance(config, PI0Config):
            raise TypeError(f"config is a {type(config).__name__}, expected lerobot_pi0.PI0Config")
        super().__init__(config)
        config.validate_features()
        trains = dataset_stats is not None or dataset_meta is not None
        if trains:
            PromptStep.asked = config.clean_prompts
        self._expert_only_asked = config.train_expert_only is True  # and not because the VLM is pretrained
        try:
            config.settle(saved, vlm_is_pretrained=pretrained)
        except ValueError as error:  # each was judged alone before
            if saved.keys().isdisjoint(PLUGIN_FIELDS):
                raise
            raise CheckpointConfigError(
                f"options of the run and of the checkpoint ({PLUGIN_CONFIG_NAME}) do not go together: {error}"
            ) from error
        stats = dataset_stats if dataset_stats is not None else getattr(dataset_meta, "stats", None)
        if trains:
            check_statistics(config, stats)
            check_relative_statistics(config, stats or {}, dataset_meta)
        self._bounds = bounds.make_bounds(config, statistics if stats is None else lambda: stats)
        with torch.device("meta"):
            self.model = PI0(config.architecture(), config.image_size)
        self._freeze()
        storage = getattr(torch, config.dtype)
        for p in self.parameters():
            p.data = p.data.to(torch.float32 if trains and p.requires_grad else storage)
        if config.vlm_quantization:
            self._quantize(trains)
        self._observe = ObservationMaker(config)
        self._calls = Calls(config.compile_mode if config.compile_model else None)
        self._watch, self._held_out = Watch(self.parameters, self._check_optimizer), HeldOut()
        self._ema: Ema | None = None
        self._sizes: dict[str, tuple[int, int]] | None = None  # `part_sizes` of training, which may spread the weights
        self._warned_of_delay = self._warned_of_update = False
        self._seed = torch.initial_seed()
        config.updates = saved.get("updates", 0)
        self.origin = Origin(saved.get("start"))

    def _initialise(self, names: Iterable[str]) -> None:
        """Random numbers for these parameters; the others, which are on the `meta` device, stay there."""
        parameters, device = dict(self.named_parameters()), torch.device(self.config.device)
        made = {name: torch.empty_like(parameters[name], device=device) for name in names}
        if made:
            self.load_state_dict(made, strict=False, assign=True)
            self.model.initialise()

    def _finish(self) -> None:
        """What can only be done once the weights are there."""
        self.model.reset_buffers(torch.device(self.config.device))
        if self.config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self._note_mixed_precision()
        self.reset()
        self.eval()

    def _freeze(self) -> None:
        frozen: list[nn.Module] = []
        if self.config.train_expert_only:
            frozen.append(self.model.paligemma)
        elif self.config.freeze_vision_encoder:
            frozen.append(self.model.vision)
        for module in frozen:
            module.requires_grad_(False)
        for p in self.model.unread_parameters():
            p.requires_grad_(False)

    def _quantize(self, trains: bool) -> None:
        """Prepare the VLM for weights that are rounded as they are read.

        Raises:
            ValueError: the device cannot, the VLM is to be trained, or a whole checkpoint is to be written: it would
                hold rounded weights under the names of the real ones.
        """
        rounding.check(self.config.vlm_quantization, torch.device(self.config.device))
        needed = [name for name in ("train_expert_only", "save_expert_only") if not getattr(self.config, name)]
        if trains and needed:
            raise ValueError(
                "vlm_quantization trains the expert over a VLM that is rounded in memory: set "
                + " and ".join(f"--policy.{name}=true" for name in needed)
            )
        if trains and (kind := sharding()):
            raise ValueError(f"vlm_quantization does not go together with {kind}: leave it out, or train under DDP")
        rounding.prepare(self.model, self.config.vlm_quantization)
        names = list(rounding.layers(self))  # they have no numbers to send round; peft puts a prefix before them
        self._ddp_params_and_buffers_to_ignore = [*names, *(f"base_model.model.{name}" for name in names)]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        strict: bool = True,
        dataset_stats: dict[str, dict[str, Any]] | None = None,
        dataset_meta: Any = None,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **kwargs: Any,
    ) -> "PI0Policy":
        """Load a checkpoint from a folder or the Hub.

        Args:
            config: options to use in place of the checkpoint's.
            strict: False takes a checkpoint with missing or surplus tensors, and says which are random.

        Raises:
            CheckpointError: the checkpoint is not there, broken, or not π₀'s.
        """
        checkpoint = Checkpoint.open(
            pretrained_name_or_path, force_download=force_download, token=token, cache_dir=cache_dir,
            local_files_only=local_files_only, revision=revision,
        )  # fmt: skip
        config = checkpoint.config() if config is None else config
        saved = checkpoint.settle(config)
        policy = cls.__new__(cls)
        statistics = partial(checkpoint.statistics, config)  # read only if a bound needs them
        policy._build(config, dataset_stats, dataset_meta, saved, True, statistics)  # type: ignore[arg-type]
        missing = checkpoint.check(dict(policy.named_parameters()), strict, policy.config, rounding.layers(policy))
        policy._initialise(missing)
        digests = checkpoint.read(policy, torch.device(policy.config.device), policy.config.save_expert_only)
        policy.origin = Origin.of(checkpoint.source, saved, digests)
        policy._finish()
        return policy

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a checkpoint: the old one or the new one survives a crash, never a mixture.

        Raises:
            ValueError: `save_expert_only`, but no weight comes from a checkpoint, none is frozen, or `save_directory`
                is that checkpoint. Without it: the VLM is rounded, and its weights are not here to be written.
        """
        self.origin.save(save_directory, self.config, self, self._deployed_state(state_dict))

    def _deployed_state(self, gathered: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """All weights; of those that are averaged, the average."""
        self._catch_up()
        if self._ema is None:
            return self.state_dict() if gathered is None else gathered
        if gathered is not None:
            raise ValueError("ema_decay does not go together with weights that are gathered from several processes")
        return self.state_dict() | self._ema.deployed_state(self.named_parameters())

    def push_model_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """LeRobot's push; of `save_expert_only` over a folder, which nobody else has, it pushes all weights."""
        with self.origin.complete_for_others(self.config):
            super().push_model_to_hub(*args, **kwargs)

    def _note_mixed_precision(self) -> None:
        """Weights of two dtypes need autocast; weights of one do without its overhead."""
        self._mixed = self.config.dtype == "bfloat16" and any(p.dtype == torch.float32 for p in self.parameters())

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        device = torch.device(self.config.device).type
        return torch.autocast(device, torch.bfloat16) if self._mixed else contextlib.nullcontext()

    def train(self, mode: bool = True) -> "PI0Policy":
        """Switch to training and its weights, or to what is deployed; LeRobot calls this at every step."""
        self._catch_up()
        if mode != self.training and self._ema is not None:
            self._ema.deploy(not mode)
        if mode and not self.training:
            self._set_dtypes()
            self._note_mixed_precision()
            self._held_out.report(self._joints)
            self._tell_what_is_trained()
        return super().train(mode)  # whatever the mode was: adapters are hung in with one of their own

    def _set_dtypes(self) -> None:
        """Trained weights in float32. What an adapter has frozen after it was loaded in float32: as at inference."""
        storage = getattr(torch, self.config.dtype)
        for p in self.parameters():
            wanted = torch.float32 if p.requires_grad else storage
            if p.is_floating_point() and p.dtype != wanted and (p.requires_grad or p.dtype == torch.float32):
                p.data = p.data.to(wanted)

    def _tell_what_is_trained(self) -> None:
        if self._sizes is None:
            self._sizes = self.part_sizes()
            parts = [f"{name} {own / 1e6:.2f} of {n / 1e6:.2f} M" for name, (n, own) in self._sizes.items()]
            logger.info("trained: %s", ", ".join(parts))

    def get_optim_params(self) -> list[nn.Parameter]:  # type: ignore[override]
        """The parameters that are trained, and no others.

        Raises:
            ValueError: there are none, they are to be averaged where that cannot be kept, or the checkpoints that are
                asked for could not be written.
        """
        for p in self.model.unread_parameters():  # adapters may be hung there
            p.requires_grad_(False)
        trained = [p for p in self.parameters() if p.requires_grad]
        if self.config.vlm_quantization and any(p.requires_grad for p in self.model.paligemma.parameters()):
            raise ValueError(
                "a part of the VLM would be trained (--peft.target_modules?), but it is rounded: leave "
                "vlm_quantization out, or train the expert alone"
            )
        if not trained:
            raise ValueError(
                "nothing would be trained: the targets of the adapter (--peft.target_modules) are layers whose output "
                "π₀ never reads (queries, attention output and MLP of the VLM's last layer)"
            )
        if self.config.save_expert_only:
            self.origin.left_to_base(self)
        self.origin.check_push(self.config)
        self._tell_what_is_trained()
        if not self.config.ema_decay:
            return trained
        check_averaging(self.config.use_peft)
        if self._ema is None or [*map(id, self._ema)] != [*map(id, trained)]:
            self._ema = Ema(trained, self.config.ema_decay)
        return self._ema

    def supports_rtc(self) -> bool:
        """Chunks that continue the one being executed: `predict_action_chunk` with `prev_chunk_left_over`."""
        return True

    def init_rtc_processor(self) -> None:
        """LeRobot calls this once it has set `config.rtc_config`: complain before a robot moves.

        Raises:
            ValueError: a horizon that leaves nothing to guide, or an unknown schedule.
        """
        rtc = self.config.rtc_config
        if rtc is None or not rtc.enabled:
            return
        if rtc.execution_horizon < 1:
            raise ValueError(
                f"execution_horizon={rtc.execution_horizon} leaves no action to continue: set "
                "--inference.rtc.execution_horizon to more than the delay, counted in actions"
            )
        guidance.prefix_weights(rtc.prefix_attention_schedule.value, 0, torch.ones(1, 1), 1)
        logger.info("real-time chunking: rtc_guidance=%s", self.config.guidance)

    def reset(self) -> None:
        """Forget the chunk that is being executed: with it goes all that one call leaves to the next."""
        self._queue: deque[Tensor] = deque()
        self._anchor = Anchor()

    @property
    def _device(self) -> torch.device:
        return self.model.action_in_proj.weight.device

    def forward(
        self,
        batch: dict[str, Any],
        reduction: Literal["mean", "none"] = "mean",
        noise: Tensor | None = None,
        time: Tensor | None = None,
        delay: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The flow-matching loss of a preprocessed batch.

        Args:
            reduction: "mean" gives a scalar, "none" a loss per sample, (B,).
            noise: ε to use in place of random draws, (B, K, T, max_action_dim). Under `eval()` K is
                `HELD_OUT_SAMPLES` for those, and t has LeRobot's distribution.
            time: t to use in place of random draws, (B, K).
            delay: how many actions are known, in place of random draws, (B, K); read if `rtc_training_max_delay`.

        Returns:
            The loss, and numbers to log.

        Raises:
            ObservationError: the batch is not what the policy was made for.
            ValueError: an unknown reduction, or draws of other shapes.
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction={reduction!r} is not one of mean, none")
        losses_BKTA = self.losses(batch, noise, time, delay)
        per_sample = losses_BKTA.mean(dim=(1, 2, 3))
        loss = per_sample.mean()
        numbers = torch.cat([loss[None], losses_BKTA.mean(dim=(0, 1, 2))]).tolist()  # one wait for the device
        self._watch.check_loss(numbers[0], per_sample, batch)
        info = dict(zip(["loss", *(f"loss_{joint}" for joint in self._joints)], numbers, strict=True))
        if not (self.training or torch.is_grad_enabled()):
            info["chunk_error"] = self._chunk_error(batch)
        return (loss if reduction == "mean" else per_sample), info

    def _chunk_error(self, batch: dict[str, Any]) -> float:
        """Mean squared error of chunks sampled from fixed noise: the loss says little of what a robot would do."""
        actions = self._observe.actions(batch, self._device)
        noise, *_ = self._draw(batch, actions.shape[1:], self._device)
        with torch.inference_mode(False), torch.no_grad():
            chunk = self._sample(self._observe(batch, self._device), noise[:, 0])
        valid = self._observe.valid(batch, self._device) if IS_PAD in batch else actions.new_ones(actions.shape[:2])
        return self._held_out.add(chunk, actions[..., : self._action_dims], valid)

    def losses(
        self,
        batch: dict[str, Any],
        noise: Tensor | None = None,
        time: Tensor | None = None,
        delay: Tensor | None = None,
    ) -> Tensor:
        """Squared errors of the velocity, float32 (B, K, T, dims of the robot's actions).

        With `rtc_training_max_delay` the first `delay` actions are known (arXiv 2512.05964): they enter as they are, at
        t = 0, and their errors are zero; the others' are scaled so that the mean over T is theirs.
        """
        self._catch_up()
        cfg, device = self.config, self._device
        change = (lambda x, keys: self._augment(batch, x, keys)) if self.training and cfg.augment_images else None
        obs = self._observe(batch, device, change)
        actions = self._observe.actions(batch, device)[:, None]
        if noise is None or time is None or (delay is None and cfg.rtc_training_max_delay):
            given = zip((noise, time, delay), self._draw(batch, actions.shape[2:], device), strict=True)
            noise, time, delay = (new if old is None else old for old, new in given)
        _check_draws(actions, noise, time, delay)
        errors = self.errors(obs, actions, noise, time, delay)
        masked = cfg.mask_padded_actions if self.training else IS_PAD in batch
        if masked:
            valid = self._observe.valid(batch, device)[:, None, :, None].float()
            errors = errors * valid  # zeros, so that every other step weighs the same in all batches of training
            if not self.training:  # the mean over T is that of the steps that there are
                errors = errors / valid.mean(dim=2, keepdim=True).clamp(min=1 / cfg.chunk_size)
        return errors

    def errors(
        self, obs: Observation, actions_B1TA: Tensor, noise: Tensor, time: Tensor, delay: Tensor | None = None
    ) -> Tensor:
        """`losses` of given draws, before padded actions are masked. Nothing in here depends on a value."""
        time, free = time[..., None], torch.ones(1, device=time.device)
        if self.config.rtc_training_max_delay and delay is not None:
            free = (torch.arange(self.config.chunk_size, device=time.device) >= delay[..., None]).float()
            time = time * free
        x_t, target = flow.interpolate(actions_B1TA, noise, time[..., None])
        self._calls.begin()
        with self._precision():
            context = self._calls.context(self.model, obs, with_state=False)
            velocity = self._calls.velocity(self.model, x_t, time, self.model.embed_time(time), context)
        errors = (velocity - target)[..., : self._action_dims].square()
        return errors * (free / free.mean(dim=-1, keepdim=True))[..., None]

    def _augment(self, batch: dict[str, Any], images_BNCHW: Tensor, cameras: list[str]) -> Tensor:
        """Images of these cameras, each changed at random: a function of seed, update, sample and camera."""
        if "index" in batch:
            index, every = _index(batch), list(self.config.image_features)
            uniform = augment.draw(self._seed, self.config.updates, index, len(every))
            uniform = uniform[..., [every.index(key) for key in cameras]].to(images_BNCHW.device)
        else:
            uniform = torch.rand(6, *images_BNCHW.shape[:2], device=images_BNCHW.device)
        return augment.apply(images_BNCHW, augment.change_of(uniform, ["wrist" in key for key in cameras]))

    def _draw(self, batch: dict[str, Any], shape_TA: Sequence[int], device: torch.device) -> list[Tensor]:
        """Noise, times and delays of a batch: a function of seed, update and sample. In evaluation of the sample alone,
        K and the distribution of times are fixed and no action is known, so that losses of runs with other options
        compare. A batch without LeRobot's `index` is drawn from torch's own generator."""
        cfg = self.config
        samples, most, distribution = HELD_OUT_SAMPLES, 0, flow.BetaTime()
        if self.training:
            samples, most = cfg.flow_samples, cfg.rtc_training_max_delay
            distribution = flow.BetaTime(
                cfg.time_sampling_beta_alpha,
                cfg.time_sampling_beta_beta,
                cfg.time_sampling_scale,
                cfg.time_sampling_offset,
            )
        shape_KTA = (samples, *shape_TA)
        if "index" not in batch:
            shape = (len(batch[ACTION]), *shape_KTA)
            noise, time = flow.sample_noise(shape, device), distribution.sample(shape[:2], device)
            return [noise, time, flow.sample_delay(shape[:2], most, device)]
        seed, update = (self._seed, cfg.updates) if self.training else (0, -1)
        drawn = flow.repeatable_draws(seed, update, _index(batch), shape_KTA, distribution, most)
        return [x.to(device) for x in drawn]

    def update(self) -> None:
        """To be called after each optimizer's step, as LeRobot does: the next draws, the next average."""
        self._watch.stepped = False
        self.config.updates += 1
        if self._ema is not None:
            self._ema.update()

    def _check_optimizer(self, optimizer: Optimizer) -> None:
        """
        Raises:
            ValueError: options ask for another optimizer: the run brings its own, or is resumed with that which it has.
        """
        remedy = (
            "leave --use_policy_training_preset at true; a run that is resumed keeps its optimizer, so leave the "
            "option as it was, or begin a new run from its checkpoint (--policy.path)"
        )
        if self.config.ema_decay and (self._ema is None or not self._ema.averages):
            raise ValueError(f"ema_decay needs the policy's own optimizer, which carries the averages: {remedy}")
        if bool(self.config.optimizer_8bit) != is_8bit(optimizer):
            kind = type(optimizer).__name__
            raise ValueError(f"optimizer_8bit={self.config.optimizer_8bit}, but the optimizer is {kind}: {remedy}")

    def _catch_up(self) -> None:
        """Do what a loop of one's own left undone: without `update`, draws would repeat and the average stand still."""
        if self._watch.stepped:
            if not self._warned_of_update:
                self._warned_of_update = True
                logger.warning("policy.update() was not called after the optimizer's step, and is called now")
            self.update()

    @property
    def _action_dims(self) -> int:
        return self.config.output_features[ACTION].shape[0]

    @property
    def _joints(self) -> list[str]:
        return [dim_name(self.config, ACTION, i) for i in range(self._action_dims)]

    @torch.compiler.disable  # lerobot-rollout compiles this method from outside; what gains by it is compiled inside
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
        **kwargs: Any,
    ) -> Tensor:
        """A chunk of (normalised) actions, float32 (B, T, dims of the robot's actions).

        Args:
            noise: where the integration starts, (B, T, max_action_dim); random by default.
            inference_delay: actions that the robot will have executed by the time the chunk is there.
            prev_chunk_left_over: what the robot has still to execute, as this method returned it: (steps, dims) or
                (B, steps, dims). Read while `config.rtc_config` is enabled.
            execution_horizon: in place of `config.rtc_config`'s.

        Raises:
            ObservationError: the batch is not what the policy was made for.
            ValueError: noise or left-over actions of another shape.
            FloatingPointError: the network's output is not finite.
        """
        cfg, device = self.config, self._device
        obs = self._observe(batch, device)
        shape = (len(obs.state_BA), cfg.chunk_size, cfg.max_action_dim)
        noise = flow.sample_noise(shape, device) if noise is None else noise
        if noise.shape != shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, expected {shape}")
        guide = self._guide(prev_chunk_left_over, inference_delay or 0, execution_horizon, noise[:, None])
        actions = self._sample(obs, noise, guide)
        return actions if self._bounds is None else self._bounds.chunk(actions, batch[OBS_STATE].to(device))

    def _sample(self, obs: Observation, noise: Tensor, guide: guidance.Guide | None = None) -> Tensor:
        """The network's chunk, before the robot's bounds; otherwise as `predict_action_chunk`."""
        cfg = self.config
        solver = {"solver": cfg.solver, "steps": cfg.num_inference_steps, "tolerance": cfg.solver_tolerance}
        with self._precision():
            chunk = self._calls.chunk(self.model, obs, noise[:, None], guide, dims=self._action_dims, **solver)
        actions = chunk[:, 0, :, : self._action_dims]
        if not actions.isfinite().all():
            raise FloatingPointError(
                "π₀ produced actions that are not finite, so none is returned: check the weights and that the "
                "statistics of the preprocessor are those of training"
            )
        return actions

    def _guide(
        self, left_over: Tensor | None, delay: int, horizon: int | None, noise_BKTA: Tensor
    ) -> guidance.Guide | None:
        cfg, rtc = self.config, self.config.rtc_config
        if rtc is None or not rtc.enabled:
            return None
        if left_over is not None and left_over.numel() and left_over.shape[-1] < self._action_dims:
            raise ValueError(
                f"prev_chunk_left_over has {left_over.shape[-1]} dims and the robot {self._action_dims}: those that "
                "are missing would be drawn to the mean"
            )
        if cfg.guidance == "trained" and delay > cfg.rtc_training_max_delay:
            self._warn_of_delay(delay)
            delay = cfg.rtc_training_max_delay
        return guidance.make_guide(
            cfg.guidance,
            left_over,
            delay,
            rtc.execution_horizon if horizon is None else horizon,
            noise_BKTA,
            rtc.prefix_attention_schedule.value,
            rtc.max_guidance_weight,
        )

    def _warn_of_delay(self, delay: int) -> None:
        if not self._warned_of_delay:
            self._warned_of_delay = True
            logger.warning(
                "a chunk comes %d actions late, the policy was trained for %d: seams may jerk. Train with a larger "
                "rtc_training_max_delay, or give --policy.rtc_guidance=identity",
                delay,
                self.config.rtc_training_max_delay,
            )

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """The next action of each environment, (B, dims); a new chunk every `n_action_steps` calls.

        Raises:
            RuntimeError: the number of environments changed in the middle of a chunk.
        """
        if not self._queue:
            chunk = self.predict_action_chunk(batch, **kwargs)
            self._queue.extend(chunk[:, : self.config.n_action_steps].unbind(dim=1))
            self._anchor.set(batch)
        origin = self._anchor.restore(batch)
        if OBS_STATE in batch and len(batch[OBS_STATE]) != len(self._queue[0]):
            raise RuntimeError(
                f"{len(batch[OBS_STATE])} observations for a chunk that was made for {len(self._queue[0])}: call "
                "reset() between episodes"
            )
        action = self._queue.popleft()
        if self._bounds is None:
            return action
        return self._bounds.step(action, batch[OBS_STATE].to(action.device), origin.to(action.device))

    def part_sizes(self) -> dict[str, tuple[int, int]]:
        """Per part of the network: how many parameters it has, and how many of them are trained."""
        parts = {"vision tower": self.model.vision, "VLM": self.model.vlm, "action expert": self.model.expert}
        sizes = {name: _count(part.parameters()) for name, part in parts.items()}
        total, trained = _count(self.parameters())
        rest = (total - sum(n for n, _ in sizes.values()), trained - sum(own for _, own in sizes.values()))
        return sizes | {"projections": rest}

    def generate_model_card(  # type: ignore[override]
        self,
        dataset_repo_id: str | None,
        model_type: str | None = None,
        license: str | None = None,
        tags: list[str] | None = None,
        cfg: Any = None,
        dataset_meta: Any = None,
    ) -> ModelCard:
        """The card that LeRobot pushes with the weights; needs no network."""
        sizes, start = self._sizes or self.part_sizes(), self.origin.start
        return make_card(self.config, sizes, start, dataset_repo_id, cfg, dataset_meta)

    def _get_default_peft_targets(self) -> dict[str, Any]:
        """openpi's recipe (`lora.py`); of a VLM that is to stay frozen, nothing.

        Raises:
            ValueError: it would adapt the VLM, which is rounded.
        """
        if self.config.vlm_quantization and not self._expert_only_asked:
            raise ValueError(
                "LoRA would adapt the VLM, which is rounded (vlm_quantization): give --policy.train_expert_only=true "
                "for LoRA in the expert alone, or leave vlm_quantization out"
            )
        return lora.targets(self.model.vlm.cfg.depth, with_vlm=not self._expert_only_asked)

    def _build_peft_config(self, cli_overrides: dict[str, Any]) -> Any:
        return super()._build_peft_config(lora.with_ranks(cli_overrides))


def _index(batch: dict[str, Any]) -> list[int]:
    """The number that LeRobot gave each sample in its dataset.

    Raises:
        ValueError: not one for each sample.
    """
    index = torch.as_tensor(batch["index"]).reshape(-1).tolist()
    if len(index) != len(batch[ACTION]):
        raise ValueError(f"batch['index'] has {len(index)} numbers for {len(batch[ACTION])} samples")
    return index


def _check_draws(actions_B1TA: Tensor, noise: Tensor, time: Tensor, delay: Tensor | None) -> None:
    """
    Raises:
        ValueError: draws of other shapes, which would be broadcast in silence.
    """
    batch, _, *step = actions_B1TA.shape
    each = (batch, *noise.shape[1:2])
    if noise.shape != (*each, *step) or time.shape != each or (delay is not None and delay.shape != each):
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}, time {tuple(time.shape)}, delay "
            f"{None if delay is None else tuple(delay.shape)}; expected (B, K, T, A) = ({batch}, K, {step[0]}, "
            f"{step[1]}) for noise and (B, K) for the others"
        )


def _count(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Numbers in all of them, and in those that are trained."""
    sizes = [(p.numel(), p.numel() * p.requires_grad) for p in parameters]
    return sum(n for n, _ in sizes), sum(own for _, own in sizes)
