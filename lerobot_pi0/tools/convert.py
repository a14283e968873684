"""`lerobot-pi0 convert`: a checkpoint of openpi becomes a complete LeRobot checkpoint.

    lerobot-pi0 convert --source=checkpoints/pi0_libero/my_run/29999 --output=pi0_libero
    lerobot-pi0 convert --source=pi0_aloha/9999 --asset_id=trossen --cameras=[cam_high,cam_left_wrist,cam_right_wrist]

Weights, config and both processors are written; the result loads with this plugin and with LeRobot's own π₀.
The source is a folder of openpi's JAX training or releases (`params/`, `assets/`) or of its PyTorch training
(`model.safetensors`, `assets/`). What differs between the two worlds, and what becomes of it:

- openpi normalises with (x - mean) / (std + 1e-6), LeRobot with 1e-8: the preprocessor written here carries 1e-6.
  Back, openpi computes x·(std + 1e-6) + mean and LeRobot x·std + mean: 1e-6 of an action's unit, which is left.
- openpi antialiases pictures when it shrinks them, LeRobot does not: the checkpoint says image_resize=openpi, which
  this plugin obeys and LeRobot's own π₀ does not know.
- openpi cleans a prompt (strip, "_" and newlines to spaces) and appends a newline; LeRobot's π₀ only appends. Give
  prompts as clean text.
- openpi's robot adapters (such as the flipped joints of its ALOHA) and delta actions are code in openpi's config, and
  not in the checkpoint. Delta actions are LeRobot's relative actions: see `use_relative_actions`.
"""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import CONFIG_NAME
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.processor import NormalizerProcessorStep
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from torch import Tensor
from tqdm import tqdm

from ..checkpoints.errors import CorruptCheckpointError, MismatchedCheckpointError
from ..checkpoints.matching import check_tensors
from ..checkpoints.names import EMBEDDING, published_state
from ..checkpoints.source import read_json
from ..checkpoints.writing import save
from ..configuration_pi0 import BYTE_TOKENIZER, PLUGIN_CONFIG_NAME, PI0Config
from ..network.sizes import EXPERT_PRESETS, PALIGEMMA_PRESETS
from . import ToolError
from .openpi import OpenpiCheckpoint, open_source
from .show import network_parameters

logger = logging.getLogger(__name__)

OPENPI_EPSILON = 1e-6
OPENPI_CHUNK = 50


@dataclass
class Options:
    """Convert a checkpoint of openpi (JAX or PyTorch) into a LeRobot checkpoint."""

    # Folder of openpi's checkpoint: it holds `params` (JAX) or `model.safetensors` (PyTorch), and `assets`.
    source: Path
    # Folder to write; by default the source's name with `_lerobot` appended, in the current folder.
    output: Path | None = None
    # Write into a folder that is not empty.
    overwrite: bool = False
    # Which of the source's assets/…/norm_stats.json to take, where there are several.
    asset_id: str | None = None
    # A norm_stats.json that lies elsewhere.
    norm_stats: Path | None = None
    # Names of the cameras in openpi's order, such as [front,wrist]; leave out those that your robot does not have.
    cameras: list[str] = field(default_factory=lambda: ["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"])
    # Dims of the robot's state; by default those of the statistics, without padding.
    state_dim: int | None = None
    # Dims of the robot's actions; by default those of the statistics, without padding.
    action_dim: int | None = None
    # Steps of a chunk (openpi: action_horizon); by default config.json's, or 50. A JAX checkpoint does not say.
    chunk_size: int | None = None
    # Steps of a chunk that are executed before the next is computed; by default all.
    n_action_steps: int | None = None
    # The run used openpi's DeltaActions: actions are relative to the state.
    use_relative_actions: bool = False
    # Joints whose actions are absolute even so, by a part of their name.
    relative_exclude_joints: list[str] = field(default_factory=lambda: ["gripper"])
    # Names of the action's dims in order; needed to find the joints above.
    action_feature_names: list[str] | None = None
    # Tokenizer of the prompt: a Hub id, a folder, or `bytes`.
    text_tokenizer_name: str | None = None
    # bfloat16 or float32; by default what most of the source is, and float32 where LoRA is merged.
    dtype: str | None = None
    # alpha / rank of attention's LoRA (JAX), which is not stored: 1 in openpi's own variants.
    lora_scaling: float = 1.0


def run(options: Options) -> Path:
    """Convert, and return the folder that was written.

    Raises:
        CheckpointError: the source is not there, broken, or not π₀'s.
        ToolError: the options do not go together, or more have to be given.
    """
    source = open_source(options.source, options.lora_scaling)
    output = options.output or Path(f"{source.root.resolve().name}_lerobot")
    if output.is_dir() and any(output.iterdir()) and not options.overwrite:
        raise ToolError(f"{output} is not empty: choose another --output, or give --overwrite=true")
    stats = read_norm_stats(find_norm_stats(source.root, options), options, source.size("state_proj.weight", 1))
    config = make_config(source, options, stats)
    state = read_state(source, config)

    output.mkdir(parents=True, exist_ok=True)
    write_processors(config, stats, output)
    configs = config.to_files()
    configs[CONFIG_NAME]["device"] = None  # the machine that loads it chooses
    configs[PLUGIN_CONFIG_NAME]["start"] = f"openpi's {source.root.resolve().name}"
    save(output, configs, published_state(state))
    logger.info("wrote %s: run it with --policy.path=%s", output, output)
    return output


def find_norm_stats(root: Path, options: Options) -> Path:
    """The file of statistics.

    Raises:
        ToolError: there is none, or more than one and no choice.
    """
    if options.norm_stats is not None:
        file = options.norm_stats / "norm_stats.json" if options.norm_stats.is_dir() else options.norm_stats
        if not file.is_file():
            raise ToolError(f"there is no {file}")
        return file
    assets = {str(x.parent.relative_to(root / "assets")): x for x in (root / "assets").rglob("norm_stats.json")}
    if options.asset_id in assets:
        return assets[options.asset_id]
    if len(assets) == 1 and options.asset_id is None:
        return next(iter(assets.values()))
    if assets:
        raise ToolError(f"choose one of the source's statistics: --asset_id={' | '.join(sorted(assets))}")
    raise ToolError(
        f"{root} has no assets/…/norm_stats.json: without the statistics of training, actions have another scale. Name "
        "the file, --norm_stats=…/norm_stats.json (openpi's compute_norm_stats.py writes it to assets/CONFIG/REPO_ID)"
    )


def read_norm_stats(file: Path, options: Options, padded: int | None) -> dict[str, dict[str, Tensor]]:
    """openpi's statistics of state and actions as LeRobot has them.

    Args:
        padded: dims of the network's state and actions. Statistics of that many dims may have been computed after
            padding, and then end in dims of mean 0 and deviation 0 or 1, which are no joints.

    Raises:
        CorruptCheckpointError: the file is not one of openpi's.
        ToolError: the robot has more dims than the statistics.
    """
    content = read_json(file)
    content = content.get("norm_stats", content)
    stats = {}
    for theirs, ours, dims in (("state", OBS_STATE, options.state_dim), ("actions", ACTION, options.action_dim)):
        try:
            found = {k: torch.tensor(v, dtype=torch.float64) for k, v in content[theirs].items() if v is not None}
            mean, std = found["mean"], found["std"]
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CorruptCheckpointError(f"{file} holds no mean and std of {theirs!r}: is it openpi's?") from error
        if mean.ndim != 1 or any(x.shape != mean.shape or not x.isfinite().all() for x in found.values()):
            raise CorruptCheckpointError(f"{file}: the statistics of {theirs!r} are no finite vectors of one length")
        if dims is None:
            dims = _without_padding(mean, std) if len(mean) == padded else len(mean)
            if dims < len(mean):
                logger.warning(
                    "the last %d of %d dims of %r do not vary and are taken for padding; --%s_dim says otherwise",
                    len(mean) - dims, len(mean), theirs, theirs.removesuffix("s"),
                )  # fmt: skip
        if dims > len(mean):
            raise ToolError(f"{theirs} has {dims} dims, its statistics in {file} only {len(mean)}")
        stats[ours] = {name: x[:dims].float() for name, x in found.items()}
    return stats


def _without_padding(mean: Tensor, std: Tensor) -> int:
    """Dims up to the last that varies."""
    real = ~((mean == 0) & ((std == 0) | (std == 1)))
    return int(real.nonzero().max()) + 1 if real.any() else len(mean)


def make_config(source: OpenpiCheckpoint, options: Options, stats: dict[str, dict[str, Tensor]]) -> PI0Config:
    """The policy's config: shapes from the weights, dims from the statistics, the rest from the options.

    Raises:
        MismatchedCheckpointError: the weights are of no preset's size.
        ToolError: options that do not go together.
    """
    vlm, expert = _variants(source)
    cameras = [key if key.startswith(OBS_IMAGES) else f"{OBS_IMAGES}.{key}" for key in options.cameras]
    side = PALIGEMMA_PRESETS[vlm].vision.image_size
    if options.use_relative_actions and options.relative_exclude_joints and not options.action_feature_names:
        raise ToolError(
            "use_relative_actions without --action_feature_names: which dims are "
            f"{', '.join(options.relative_exclude_joints)} is unknown. Name the dims, or --relative_exclude_joints=[]"
        )
    chunk = _chunk_size(source, options)
    vectors = {key: PolicyFeature(kind, (len(stats[key]["mean"]),)) for key, kind in KINDS.items()}
    try:
        config = PI0Config(
            input_features={key: PolicyFeature(FeatureType.VISUAL, (3, side, side)) for key in cameras}
            | {OBS_STATE: vectors[OBS_STATE]},
            output_features={ACTION: vectors[ACTION]},
            paligemma_variant=vlm,
            action_expert_variant=expert,
            max_state_dim=source.size("state_proj.weight", 1) or 32,
            max_action_dim=source.size("action_in_proj.weight", 1) or 32,
            chunk_size=chunk,
            n_action_steps=options.n_action_steps or chunk,
            dtype=options.dtype or _dtype(source),
            text_tokenizer_name=options.text_tokenizer_name,
            image_resize="openpi",
            use_relative_actions=options.use_relative_actions,
            relative_exclude_joints=options.relative_exclude_joints,
            action_feature_names=options.action_feature_names,
            device="cpu",
        )
    except ValueError as error:
        raise ToolError(str(error)) from error
    config.resolve({}, vlm_is_pretrained=True)
    return config


KINDS = {OBS_STATE: FeatureType.STATE, ACTION: FeatureType.ACTION}


def _variants(source: OpenpiCheckpoint) -> tuple[str, str]:
    """Names of the presets whose widths the weights have. An unknown width is refused later, by `check_tensors`."""
    names = []
    sizes = (
        ("paligemma_variant", {name: p.gemma.width for name, p in PALIGEMMA_PRESETS.items()}, EMBEDDING),
        (
            "action_expert_variant",
            {name: p.width for name, p in EXPERT_PRESETS.items()},
            "model.action_out_proj.weight",
        ),
    )
    for title, widths, name in sizes:
        stored = source.found.get(name)
        width = stored.shape[-1] if stored is not None and stored.shape else None
        fitting = [name for name in widths if width in (None, widths[name])]
        if not fitting:
            known = ", ".join(f"{name} {w}" for name, w in widths.items())
            raise MismatchedCheckpointError(f"{source.root}: no {title} is {width} wide. There are {known}")
        default = getattr(PI0Config, title)
        names.append(default if default in fitting else fitting[0])
    return names[0], names[1]


def _chunk_size(source: OpenpiCheckpoint, options: Options) -> int:
    if options.chunk_size is not None:
        return options.chunk_size
    file = source.root / CONFIG_NAME
    horizon = read_json(file).get("action_horizon") if file.is_file() else None
    if horizon is not None:
        return int(horizon)
    logger.warning(
        "the checkpoint does not say how long a chunk is: %d is openpi's default. If the run's config says otherwise "
        "(action_horizon; 10 for DROID), give --chunk_size",
        OPENPI_CHUNK,
    )
    return OPENPI_CHUNK


def _dtype(source: OpenpiCheckpoint) -> str:
    """What most of the source's numbers are; float32 where LoRA is merged, lest rounding undo what was learned."""
    numbers = {"BF16": 0, "other": 0}
    for stored in source.found.values():
        numbers[stored.dtype if stored.dtype == "BF16" else "other"] += torch.Size(stored.shape).numel()
    return "bfloat16" if numbers["BF16"] > numbers["other"] and not source.has_lora else "float32"


def read_state(source: OpenpiCheckpoint, config: PI0Config) -> dict[str, Tensor]:
    """The network's tensors by name, each converted as it is read.

    Raises:
        CheckpointError: names or shapes are not the network's, or a tensor is broken.
    """
    check_tensors(source.root, network_parameters(config), source.found)
    numbers = sum(torch.Size(stored.shape).numel() for stored in source.found.values())
    state = {}
    with tqdm(total=numbers, desc="parameters", unit="", unit_scale=True, leave=False) as bar:
        for name, x in source.tensors(getattr(torch, config.dtype)):
            state[name] = x
            bar.update(x.numel())
    logger.info(
        "read %d tensors (%.2f B parameters) of %s%s, to be written as %s",
        len(state),
        sum(x.numel() for x in state.values()) / 1e9,
        source.root,
        ", LoRA merged" if source.has_lora else "",
        config.dtype,
    )
    return state


def write_processors(config: PI0Config, stats: dict[str, dict[str, Tensor]], output: Path) -> None:
    """Both pipelines, with openpi's statistics and its epsilon.

    A tokenizer that cannot be had here is written by name alone: the machine that runs the policy needs it.
    """
    from ..inputs.steps import PI0TokenizerStep, TokenizerError
    from ..processor_pi0 import make_pi0_pre_post_processors

    pipelines: tuple[Any, Any]
    try:
        pipelines = make_pi0_pre_post_processors(config, stats)
    except TokenizerError as error:
        logger.warning("%s. Only its name is written", error)
        pipelines = make_pi0_pre_post_processors(replace(config, text_tokenizer_name=BYTE_TOKENIZER), stats)
        by_name = PI0TokenizerStep(config.tokenizer, max_length=config.tokenizer_max_length or 0, carry=False)
        steps = pipelines[0].steps
        pipelines[0].steps = [by_name if isinstance(step, PI0TokenizerStep) else step for step in steps]
    for step in pipelines[0].steps:
        if isinstance(step, NormalizerProcessorStep):
            step.eps = OPENPI_EPSILON
    for pipeline in pipelines:
        pipeline.save_pretrained(output)
