"""`lerobot-pi0 plan`: how much GPU memory training needs, by mode and batch size, and which card is large enough.

    lerobot-pi0 plan --policy.type=pi0 --policy.dtype=bfloat16 --batch_size=8 --cameras=2
    lerobot-pi0 plan --policy.path=lerobot/pi0_base --dataset.repo_id=you/cubes
    lerobot-pi0 plan --policy.path=you/pi0_cubes --policy.gradient_checkpointing=true --modes='[everything]' --json

A training step runs through the real network on tensors that have shapes and no numbers, so it needs neither weights
nor a GPU. The peak is the most memory that torch's tensors use at any moment of a step. It does not include scratch
space of kernels, what the allocator rounds up or leaves empty, and CUDA itself: `--reserve_gb` of each card is left for
these.
"""

import copy
import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.configs.default import PeftConfig
from lerobot.optim import OptimizerConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from tqdm import tqdm

from ..configuration_pi0 import PI0Config
from ..inputs.features import colour_cameras
from ..inputs.steps import TokenizerError, load_tokenizer
from . import ToolError, cached_plan, plan_report
from .data import DatasetOptions, need_pi0, open_meta
from .memory import Count, Counter, Load, count, largest_batch
from .plan_report import GIB

logger = logging.getLogger(__name__)

RESERVE_GB = 1.0
DIMS = 6
"""Dims of state and actions, where the policy has no robot yet. They cost no memory: both are padded anyway."""

CACHED = {
    "train_expert_only": True, "save_expert_only": True, "context_cache": "contexts", "augment_images": False,
    "augment_shift": 0, "vlm_quantization": None,
}  # fmt: skip
MODES: dict[str, tuple[dict[str, Any], bool]] = {
    "frozen VLM": ({"train_expert_only": True}, False),
    "frozen vision tower": ({"train_expert_only": False, "freeze_vision_encoder": True}, False),
    "everything": ({"train_expert_only": False, "freeze_vision_encoder": False}, False),
    "LoRA": ({"train_expert_only": None, "freeze_vision_encoder": False, "ema_decay": 0}, True),
    "LoRA, frozen VLM": ({"train_expert_only": True, "ema_decay": 0}, True),
    "cached contexts": (CACHED, False),
    "LoRA, cached contexts": (CACHED | {"ema_decay": 0}, True),
}
"""Options of the policy, and whether there is an adapter (docs/training.md): then weights are not averaged."""


@dataclass
class Options:
    """Count the memory of a training step."""

    # The policy: --policy.path=CHECKPOINT, or --policy.type=pi0 and the options that training will get.
    policy: PreTrainedConfig | None = None
    # Modes of training: frozen VLM, frozen vision tower, everything, LoRA, "LoRA, frozen VLM", cached contexts, or
    # "LoRA, cached contexts"; by default all, with vlm_quantization those in which the VLM is frozen, and with
    # context_cache those on cached contexts.
    modes: list[str] | None = None
    # Samples per step on one GPU.
    batch_size: int = 8
    # A dataset: its cameras, their image sizes and its longest prompt, in place of the policy's own.
    dataset: DatasetOptions | None = None
    # Number of cameras; by default the dataset's, else the policy's own, or 2 if it has none yet.
    cameras: int | None = None
    # Height and width of their images, as recorded.
    image_size: tuple[int, int] = (480, 640)
    # Tokens of the longest prompt; by default the dataset's, or the policy's tokenizer_max_length.
    prompt_tokens: int | None = None
    # Adapters, as lerobot-train takes them.
    peft: PeftConfig = field(default_factory=PeftConfig)
    # An optimizer that replaces the policy's own, as lerobot-train takes it.
    optimizer: OptimizerConfig | None = None
    # Memory of the cards, in GiB.
    cards_gb: list[float] = field(default_factory=lambda: [8, 12, 16, 24, 48, 80])
    # Memory of a card to leave for CUDA, kernels and gaps between tensors, in GiB. A guess, not measured.
    reserve_gb: float = RESERVE_GB
    # Write a page of HTML too: the name of its file.
    html: Path | None = None
    # Print JSON.
    json: bool = False


def run(options: Options) -> None:
    """Print how much memory each mode needs.

    Raises:
        CheckpointError, ToolError: there is no such policy or mode, or nothing would be trained.
    """
    config = need_pi0(options.policy)
    modes = options.modes
    if modes is None:
        modes = default_modes(config)
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise ToolError(f"--modes: {', '.join(unknown)}: there are {'; '.join(MODES)}")
    if options.batch_size < 1:
        raise ToolError(f"--batch_size={options.batch_size} has to be at least 1")
    load = make_load(config, options.cameras, options.image_size, options.prompt_tokens)
    if options.dataset is not None:
        recorded = recorded_load(config, options.dataset)
        load = Load(load.images if options.cameras else recorded.images, options.prompt_tokens or recorded.prompt)
    frames = None if options.dataset is None else open_meta(options.dataset, whole=False).total_frames
    rows = {mode: plan(options, config, mode, load) for mode in tqdm(modes, desc="modes", leave=False)}
    content = {
        "policy": f"{config.paligemma_variant} + {config.action_expert_variant}",
        "dtype": config.dtype,
        "vlm_quantization": config.vlm_quantization,
        "batch_size": options.batch_size,
        "cameras": [list(size) for size in load.images],
        "prompt_tokens": load.prompt,
        "flow_samples": config.flow_samples or 1,
        "gradient_checkpointing": config.gradient_checkpointing,
        "reserve_gb": options.reserve_gb,
        "modes": rows,
        "contexts": cached_plan.about(config, load, options.batch_size, frames),
    }
    if options.html is not None:
        plan_report.page(content).write(options.html)
    print(json.dumps(content, indent=2) if options.json else plan_report.as_text(content))


def default_modes(config: PI0Config) -> list[str]:
    """The modes that go together with the policy's options."""
    if config.context_cache:
        return [mode for mode, (changes, _) in MODES.items() if "context_cache" in changes]
    return [mode for mode, (changes, _) in MODES.items() if changes["train_expert_only"] or not config.vlm_quantization]


def make_load(config: PI0Config, cameras: int | None, size: tuple[int, int], prompt: int | None) -> Load:
    """The cameras and tokens of a sample; the policy's own cameras have the sizes of its config."""
    known = [(x.shape[-2], x.shape[-1]) for x in config.image_features.values()] if config.input_features else []
    images = known if cameras is None and known else [size] * (2 if cameras is None else cameras)
    return Load(tuple(images), prompt or config.tokenizer_max_length or 1)


def recorded_load(config: PI0Config, dataset: DatasetOptions) -> Load:
    """The cameras and the longest prompt of a dataset.

    Raises:
        ToolError: it cannot be read.
    """
    meta = open_meta(dataset, whole=False)
    try:
        tokenizer = load_tokenizer(config.tokenizer)
    except TokenizerError as error:
        logger.warning("the dataset's prompts are not counted, the policy's tokenizer_max_length is taken: %s", error)
        tokenizer = None
    if not len(meta.tasks):
        logger.warning("the dataset's prompts cannot be read, the policy's tokenizer_max_length is taken")
    cameras = colour_cameras(meta)
    if not cameras:
        raise ToolError(f"the dataset {dataset.repo_id} has no camera, and π₀ needs at least one")
    return dataset_load(config, [meta.features[key]["shape"] for key in cameras], list(meta.tasks.index), tokenizer)


def dataset_load(config: PI0Config, shapes: list[tuple[int, ...]], tasks: list[str], tokenizer: Any) -> Load:
    """The cameras of a sample, and the tokens of the longest of some prompts."""
    longest = config.tokenizer_max_length or 1
    if tokenizer is not None and tasks:
        longest = min(longest, max(len(tokenizer(f"{task}\n")["input_ids"]) for task in tasks))
    return Load(tuple((x[0], x[1]) for x in (sorted(shape)[-2:] for shape in shapes)), longest)  # channels are fewer


def plan(options: Options, config: PI0Config, mode: str, load: Load) -> dict[str, Any]:
    """The memory of one mode, in bytes, and the largest batch for each card.

    Raises:
        ToolError: nothing would be trained, or what is asked for does not go together.
    """
    changes, adapted = MODES[mode]
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    counts, trained = counted(config, load, options.batch_size, options.peft if adapted else None, options.optimizer)
    found: Count = counts[options.batch_size]
    cards = {f"{card:g}": largest_batch(counts, (card - options.reserve_gb) * GIB) for card in options.cards_gb}
    parts = {name: x for name, x in found._asdict().items() if name != "peaks"}
    return {"trained": trained, **parts, "peak": found.peak, "peak in": found.at, "largest batch": cards}


def counted(
    config: PI0Config,
    load: Load,
    batch: int,
    peft: PeftConfig | None = None,
    optimizer: OptimizerConfig | None = None,
) -> tuple[dict[int, Count], int]:
    """Counts by batch size, and how many numbers are trained. Changes `config`.

    Raises:
        ToolError: nothing would be trained, or what is asked for does not go together.
    """
    visual = {f"{OBS_IMAGES}.{i}": PolicyFeature(FeatureType.VISUAL, (3, *size)) for i, size in enumerate(load.images)}
    config.input_features = {**visual, OBS_STATE: PolicyFeature(FeatureType.STATE, (DIMS,))}
    config.output_features = config.output_features or {ACTION: PolicyFeature(FeatureType.ACTION, (DIMS,))}
    if peft is not None and config.pretrained_path is None:
        config.pretrained_path = "a checkpoint"  # type: ignore[assignment]  # LeRobot refuses an adapter without one
    try:
        counter = Counter(config, None if peft is None else asdict(peft), optimizer)
        return count(counter, load, batch), counter.trained()
    except (ImportError, ValueError) as error:
        raise ToolError(str(error)) from error
