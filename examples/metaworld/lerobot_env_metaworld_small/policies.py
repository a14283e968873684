"""Which policies are trained, with which options of `lerobot-train`."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .constants import STATE

PRESET = "tiny"  # π₀'s size
REPO = "local/metaworld"
LOG_EVERY = 50  # training steps
LEROBOTS_BATCH = 8  # lerobot-train's default


@dataclass(frozen=True)
class Training:
    """A run of `lerobot-train`, policy apart.

    Attributes:
        dataset: folder of the demonstrations.
        run: folder of the checkpoints.
        image_size: height and width of the pictures in the dataset.
        steps, batch_size, seed: as `lerobot-train` has them.
        saves: how many checkpoints are written, the last one included.
        chunk: actions of a chunk.
        executed: actions of a chunk that are executed before the policy looks again.
        tokenizer: folder of a tokenizer of the tasks' sentences, for policies that read them.
    """

    dataset: Path
    run: Path
    image_size: int
    steps: int
    batch_size: int
    seed: int
    saves: int
    chunk: int
    executed: int
    tokenizer: Path

    def options(self) -> dict[str, Any]:
        """Options that do not depend on the policy."""
        return {
            "dataset.repo_id": REPO,
            "dataset.root": self.dataset,
            # Not --dataset.streaming: LeRobot's stream shuffles 1000 frames at a time, which are a dozen episodes here.
            "num_workers": 1,
            "batch_size": self.batch_size,
            "steps": self.steps,
            "save_freq": -(-self.steps // self.saves),
            "log_freq": min(LOG_EVERY, self.steps),
            "seed": self.seed,
            "wandb.enable": "false",
            "output_dir": self.run,
            "policy.device": "cpu",
            "policy.push_to_hub": "false",
            "policy.n_action_steps": self.executed,
        }

    def inputs(self) -> str:
        """What LeRobot's environment shows: without `observation.environment_state`, which it does not."""
        image = {"type": "VISUAL", "shape": [3, self.image_size, self.image_size]}
        return json.dumps({"observation.image": image, "observation.state": {"type": "STATE", "shape": [len(STATE)]}})


def dtype() -> str:
    """The dtype in which this CPU trains a small network faster: bfloat16 if it has instructions for its products."""
    from lerobot_pi0.kernels.cpu_linear import BFLOAT16_IS_SLOW  # imports torch: only where something is trained

    return "float32" if BFLOAT16_IS_SLOW else "bfloat16"


def _chosen(value: float) -> float:
    """The value with another last bit: the recipe replaces LeRobot's defaults, as if nobody had chosen them."""
    return math.nextafter(value, math.inf)


def pi0(training: Training, learning_rate: float) -> dict[str, Any]:
    """π₀, the small preset from random weights. It reads picture, state and sentence."""
    return training.options() | {
        "policy.type": "pi0",
        "policy.recipe": "small",
        "policy.dtype": dtype(),
        "policy.paligemma_variant": PRESET,
        "policy.action_expert_variant": PRESET,
        "policy.text_tokenizer_name": training.tokenizer,
        "policy.image_resolution": f"[{training.image_size}, {training.image_size}]",
        "policy.chunk_size": training.chunk,
        "policy.optimizer_lr": _chosen(learning_rate),
        "policy.scheduler_warmup_steps": min(100, training.steps),
        "policy.scheduler_decay_steps": training.steps,
        "policy.scheduler_decay_lr": _chosen(learning_rate / 100),
        # At first times near the noise, where only pictures and words tell the action; then LeRobot's, which make
        # chunks smooth.
        "policy.time_sampling_warmup_steps": 2 * training.steps // 3,
    }


def act(training: Training) -> dict[str, Any]:
    """LeRobot's ACT at its own size. It cannot be told the task: it has no input for a sentence, and the environment
    has no other sign of the task than the picture.

    Its ResNet starts from random weights too, and its chunk is as long as π₀'s: its default of 100 steps is longer
    than most episodes. The batch is LeRobot's default, because in equal time it makes few steps.
    """
    return training.options() | {
        "policy.type": "act",
        "batch_size": LEROBOTS_BATCH,
        "policy.input_features": training.inputs(),
        "policy.chunk_size": training.chunk,
        "policy.pretrained_backbone_weights": "null",
        "policy.optimizer_lr": 1e-4,
        "policy.optimizer_lr_backbone": 1e-4,
    }


def diffusion(training: Training) -> dict[str, Any]:
    """LeRobot's Diffusion Policy, which cannot be told the task either. Its ResNet starts from random weights."""
    return training.options() | {
        "policy.type": "diffusion",
        "batch_size": LEROBOTS_BATCH,
        "policy.input_features": training.inputs(),
        "policy.horizon": 8 * ((training.chunk + 7) // 8),  # its U-Net halves the horizon three times
        "policy.n_action_steps": training.executed,
        "policy.pretrained_backbone_weights": "null",
        "policy.use_group_norm": "true",  # without trained weights, as its paper has it
        "policy.down_dims": "[128, 256, 512]",
    }
