"""Check of `lerobot-pi0 plan`: the memory that it counts, and the memory that a training step takes on the CPU.

    python benchmarks/plan.py                  # eight configurations of a medium network, minutes
    python benchmarks/plan.py --size full      # four at full size: 14 GiB

The measured number is the peak of resident memory during the second training step (the first creates the optimizer's
states), minus the resident memory before the policy was built. Before that, a smaller policy takes a step, so that all
libraries are loaded. Each tensor has its own pages (`measure.give_back_at_once`): otherwise the heap keeps freed
memory, and how much depends on the order of sizes. `--heap` measures without this change.
"""

import argparse
import atexit
import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest import mock

import measure
import torch
from cached_steps import write_contexts
from lerobot.configs.default import PeftConfig
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from presets import CAMERAS, SIZES, presets
from subjects import Ours, RandomWeights, batch_for, with_weights

from lerobot_pi0 import PI0Policy
from lerobot_pi0.kernels import rounding
from lerobot_pi0.network import init
from lerobot_pi0.tools.memory import Counter, Load

GIB = 2**30


@dataclass(frozen=True)
class Configuration:
    """One line of the table."""

    name: str
    batch: int
    cameras: int = 2
    dtype: str = "bfloat16"
    frozen: bool | None = False
    lora: bool = False
    cached: bool = False
    options: dict = field(default_factory=dict)


CHECKPOINTING = {"gradient_checkpointing": True}
MEDIUM = [
    Configuration("frozen VLM", 4, frozen=True),
    Configuration("frozen VLM, K = 8, float32", 2, 1, "float32", True, options={"flow_samples": 8}),
    Configuration("frozen vision tower", 2, 1, options={"freeze_vision_encoder": True}),
    Configuration("everything, float32", 2, 1, "float32"),
    Configuration("everything, checkpointing", 4, options=CHECKPOINTING),
    Configuration("LoRA", 2, frozen=None, lora=True),
    Configuration("LoRA, frozen VLM in int8", 16, frozen=True, lora=True, options={"vlm_quantization": "int8"}),
    Configuration("cached contexts", 8, frozen=True, cached=True),
]
FULL = [
    Configuration("frozen VLM, batch 1", 1, frozen=True),
    Configuration("frozen VLM, batch 8", 8, frozen=True),
    Configuration("cached contexts", 8, frozen=True, cached=True),
    Configuration("cached contexts, 8 bits", 8, frozen=True, cached=True, options={"optimizer_8bit": True}),
]
CONFIGURATIONS = {"small": MEDIUM, "medium": MEDIUM, "full": FULL}


@dataclass
class Result:
    """Counted and measured bytes."""

    counted: int
    measured: int
    pages: int = 0  # resident pages of the contexts' file, which the system can reclaim: not in `measured`

    @property
    def deviation(self) -> float:
        """How much the count is above the measurement, as a fraction of the measurement."""
        return self.counted / self.measured - 1


def make_config(line: Configuration, size: str):
    base = {"pretrained_path": "base"} if line.lora else {}  # without it LeRobot refuses adapters
    base |= {"context_cache": "contexts", "save_expert_only": True} if line.cached else {}
    return Ours.config(SIZES[size], line.dtype, line.frozen, **line.options, **base)


def adapter(line: Configuration) -> dict | None:
    return asdict(PeftConfig()) if line.lora else None


def counted(line: Configuration, size: str) -> int:
    """The peak of `lerobot-pi0 plan`, for the CPU's optimizer."""
    side = SIZES[size].vlm.vision.image_size
    with presets(SIZES[size]):
        counter = Counter(make_config(line, size), adapter(line), as_on_gpu=False)
        return counter.count(line.batch, Load(((side, side),) * line.cameras, 48)).peak


def trainer(line: Configuration, size: str) -> Callable[[], None]:
    """A function that does one training step of a policy with weights, as lerobot-train does."""
    config = make_config(line, size)
    kind, config.vlm_quantization = config.vlm_quantization, None  # there is no checkpoint to round
    with presets(SIZES[size]), mock.patch.object(init, "initialise"):
        policy = PI0Policy.empty(config, pretrained=True) if line.cached else PI0Policy(config)
    if kind:
        rounding.prepare(policy.model, kind)
    if line.lora:
        policy.wrap_with_peft(peft_cli_overrides=adapter(line))
    with_weights(policy, RandomWeights(), training=True)
    policy.config.save_expert_only = False  # there is no checkpoint as its base
    preset = policy.config.get_optimizer_preset()
    optimizer = preset.build(policy.get_optim_params())
    batch = batch_for(SIZES[size], line.cameras, batch_size=line.batch)
    if line.cached:
        batch = read_contexts(policy, line, size, batch)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=line.dtype == "bfloat16"):
            loss, _ = policy.forward(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), preset.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        policy.update()

    return step


def read_contexts(policy: PI0Policy, line: Configuration, size: str, batch: dict) -> dict:
    """Make a cache of the batch's frames, from which the policy then reads; its file's pages are counted separately."""
    for key in (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK):
        batch[key] = batch[key][:1].expand(line.batch, -1).clone()
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with presets(SIZES[size]):
        contexts = write_contexts(folder, policy.config, line.cameras, batch, line.batch, None)
    policy.observe.contexts = contexts
    pixel = dict.fromkeys(CAMERAS[: line.cameras], torch.zeros(line.batch, 3, 1, 1))
    return batch | pixel | {"index": torch.arange(line.batch)}


def compare(line: Configuration, size: str, heap: bool) -> Result:
    """Count and measure the peak; to be called in a process of its own."""
    logging.disable(logging.WARNING)
    expected = counted(line, size)
    trainer(line, "small")()
    if not heap:
        measure.give_back_at_once()
    before, pages = measure.resident_bytes(), measure.file_bytes()
    step = trainer(line, size)
    step()
    measure.restart_peak()
    step()
    pages = measure.file_bytes() - pages if line.cached else 0
    return Result(expected, measure.resident_bytes(most=True) - before - pages, pages)


def main(arguments: list[str] | None = None) -> dict[str, Result]:
    """Measure, print the table, and return the results by configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="medium", help="size of the network (default: medium)")
    parser.add_argument("--only", default="", help="configurations whose name holds this")
    parser.add_argument("--heap", action="store_true", help="leave the C library's allocator as it is")
    parser.add_argument("--json", type=Path, default=None, help="also write every number to this file")
    options = parser.parse_args(arguments)
    results = {}
    for line in CONFIGURATIONS[options.size]:
        if options.only in line.name:
            r = results[line.name] = measure.in_own_process(compare, line, options.size, options.heap)
            print(
                f"{line.name:28} batch {line.batch}, {line.cameras} cameras, {line.dtype:9} counted "
                f"{r.counted / GIB:7.3f} GiB, measured {r.measured / GIB:7.3f} GiB, {r.deviation:+.1%}"
                + (f", {r.pages / GIB:.3f} GiB of file pages apart" if r.pages else ""),
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({name: asdict(r) for name, r in results.items()}, indent=2))
    return results


if __name__ == "__main__":
    main()
