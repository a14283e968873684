"""What caching contexts would cost and save: bytes of a frame, arithmetic of a sample, and when it pays.

The arithmetic is that of products with weights and of attention, two operations for a multiplication and an addition.

Axes: S tokens of the prefix, T tokens of state and actions.
"""

from collections.abc import Mapping
from typing import Any

from ..configuration_pi0 import PI0Config
from ..network.sizes import GemmaSize
from ..training.context_store import context_shape, record_bytes
from .memory import Load


def about(config: PI0Config, load: Load, batch: int, frames: int | None) -> dict[str, Any]:
    """Bytes and operations, and from which step on a run with this batch is cheaper with a cache of all frames.

    Args:
        frames: of the dataset, if there is one.
    """
    shape = context_shape(config, len(load.images), load.prompt)
    frame = record_bytes(shape, config.dtype, bits=None)
    prefix, expert = operations(config, load)
    return {
        "bytes of a frame": frame,
        "bytes of a frame in 8 bits": record_bytes(shape, config.dtype, bits=8),
        "bytes read by a step": batch * frame,
        "frames": frames,
        "pays from step": None if frames is None else -(-frames // batch),
        "operations of the VLM for a frame": prefix,
        "operations of the expert in a step for a sample": expert,
    }


def operations(config: PI0Config, load: Load) -> tuple[int, int]:
    """Those of the VLM for one frame, and of the expert's forward and backward pass for one sample."""
    arch = config.architecture()
    vision, vlm, expert = arch.vlm.vision, arch.vlm.gemma, arch.expert
    *_, tokens_S, head_dim = context_shape(config, len(load.images), load.prompt)
    patches = context_shape(config, cameras=1, prompt=0)[2]
    weights = 4 * vision.width**2 + 2 * vision.width * vision.mlp_dim
    pictures = len(load.images) * patches * vision.depth * (2 * weights + 4 * vision.width * patches)
    last = tokens_S * 4 * vlm.width * head_dim  # of the last layer only keys and values
    prefix = pictures + (vlm.depth - 1) * _layer(vlm, tokens_S, tokens_S) + last
    tokens_T = 1 + config.chunk_size * (config.flow_samples or 1)
    step = 3 * expert.depth * _layer(expert, tokens_T, tokens_S + 1 + config.chunk_size)
    return prefix, step


def _layer(size: GemmaSize, tokens: int, keys: int) -> int:
    """A layer's operations for some tokens that see so many keys."""
    weights = 2 * size.width * size.head_dim * (size.heads + 1) + 3 * size.width * size.mlp_dim
    return tokens * (2 * weights + 4 * size.heads * size.head_dim * keys)


def as_lines(found: Mapping[str, Any]) -> list[str]:
    """The same in words."""
    frame, rounded, step = (found[f"bytes {x}"] / 1e6 for x in ("of a frame", "of a frame in 8 bits", "read by a step"))
    vlm, expert = (found[f"operations of the {x}"] / 1e12 for x in ("VLM for a frame", "expert in a step for a sample"))
    lines = [
        f"cached contexts: {frame:.2f} MB a frame ({rounded:.2f} in 8 bits); a step reads {step:.0f} MB, so that at 5 "
        f"steps a second the disk, or the memory that caches it, has to give {5 * step / 1e3:.2f} GB/s",
        f"a sample takes {vlm + expert:.2f} TFLOP with the VLM and {expert:.2f} without",
    ]
    if found["frames"]:
        gb, least = found["frames"] * frame / 1e3, found["frames"] * rounded / 1e3
        lines.append(
            f"all {found['frames']} frames are {gb:.0f} GB ({least:.0f} in 8 bits), and caching them costs the VLM as "
            f"much as {found['pays from step']} steps: it pays for longer runs, and with --every=5 for a fifth of that"
        )
    else:
        lines.append("caching costs the VLM as much as one epoch over the cached frames: it pays for longer runs")
    return lines
