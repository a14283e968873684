"""CPU time of a training step of the small preset with `recipe=small`, in float32 and in bfloat16, on one core.

    python benchmarks/small_step.py

One camera of 128 pixels, chunks of 20 actions and batches of 16, as in MetaWorld's example; data is not read. In
both, Muon multiplies in bfloat16 where the CPU does so fast.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import draccus
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_IMAGE, OBS_STATE
from measure import alternate, median_ratio
from presets import make_batch

from lerobot_pi0 import PI0Config, PI0Policy

DIMS, PLACES, SIDE, CHUNK = 4, 39, 128, 20
SENTENCES = (22, 31, 44)  # lengths of MetaWorld's sentences in bytes


@dataclass
class SmallStepConfig:
    """Time training steps of the small preset."""

    # Observations per step.
    batch_size: int = 16
    # Timed runs of each dtype, beside each other.
    pairs: int = 5
    # Steps of a run.
    steps: int = 10


def make_policy(dtype: str) -> PI0Policy:
    """A policy for one camera, with the second loss of a simulator's data."""
    numbers = {OBS_STATE: DIMS, OBS_ENV_STATE: PLACES, ACTION: DIMS}
    config = PI0Config(
        paligemma_variant="tiny",
        action_expert_variant="tiny",
        recipe="small",
        dtype=dtype,
        device="cpu",
        image_resolution=(SIDE, SIDE),
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        max_state_dim=DIMS,
        max_action_dim=DIMS + PLACES,
    )
    config.input_features = {
        OBS_IMAGE: PolicyFeature(FeatureType.VISUAL, (3, SIDE, SIDE)),
        OBS_STATE: PolicyFeature(FeatureType.STATE, (DIMS,)),
        OBS_ENV_STATE: PolicyFeature(FeatureType.ENV, (PLACES,)),
    }
    config.output_features = {ACTION: PolicyFeature(FeatureType.ACTION, (DIMS,))}
    torch.manual_seed(0)
    return PI0Policy(config, {key: {"mean": torch.zeros(n), "std": torch.ones(n)} for key, n in numbers.items()})


def timer(config: SmallStepConfig, dtype: str) -> Callable[[], float]:
    """A function that makes steps and returns the seconds of CPU time of one."""
    policy = make_policy(dtype).train()
    batch = make_batch(
        batch_size=config.batch_size,
        cameras=(OBS_IMAGE,),
        prompt=SENTENCES,
        dims=DIMS,
        size=SIDE,
        chunk=CHUNK,
        length=max(SENTENCES),
    )
    batch |= {OBS_ENV_STATE: torch.randn(config.batch_size, PLACES), "index": torch.arange(config.batch_size)}
    preset = policy.config.get_optimizer_preset()
    optimizer = preset.build(policy.get_optim_params())

    def run() -> float:
        started = time.thread_time()
        for _ in range(config.steps):
            policy(batch)[0].backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), preset.grad_clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            policy.update()
        return (time.thread_time() - started) / config.steps

    return run


@draccus.wrap()
def main(config: SmallStepConfig) -> None:
    """Print a line for each dtype, and how many times faster bfloat16 is."""
    torch.set_num_threads(1)
    times = alternate({dtype: timer(config, dtype) for dtype in ("float32", "bfloat16")}, config.pairs)
    for dtype, taken in times.items():
        print(f"{dtype:10} {1e3 * statistics.median(taken):6.1f} ms of CPU time a step")
    print(f"bfloat16 is {median_ratio(*times.values()):.2f} times as fast")


if __name__ == "__main__":
    main()
