"""What rounding cached contexts costs a trained policy: the error of its loss, its gradients and its chunks.

    python benchmarks/cached_error.py --policy=DIR --dataset=DIR      # what make demo trained, and its held-out data

The contexts are those that the policy's VLM computes for the frames of the dataset. They are rounded in three ways: to
bfloat16, to 8 bits as the cache does (a scale for each channel, which all tokens of a frame share), and to 8 bits with
a scale for each token. Losses, gradients of the expert and chunks of all three are compared with those of the same
contexts in float32, from equal noise and times. Everything else is float32.

Axes: B batch, S tokens of the prefix, D head dim, K flow samples, T steps of a chunk, A action dims.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from control import ARM, Driver
from lerobot.datasets import LeRobotDataset
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.utils.constants import OBS_STATE
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lerobot_pi0 import PI0Policy
from lerobot_pi0.network import flow, solvers
from lerobot_pi0.network.attention import KVCache
from lerobot_pi0.network.pi0 import Observation
from lerobot_pi0.training.context_store import LARGEST, Manifest, made_from, pack, unpack

BATCH, SAMPLES = 8, 4
Prefix = list[KVCache]


def to_bfloat16(prefix: Prefix, obs: Observation, policy: PI0Policy) -> Prefix:
    """Contexts as a bfloat16 policy stores them."""
    return [KVCache(*(x.bfloat16().float() for x in layer)) for layer in prefix]


def by_channel(prefix: Prefix, obs: Observation, policy: PI0Policy) -> Prefix:
    """Contexts as `lerobot-pi0 cache --bits=8` writes them and training reads them."""
    tokens, prompt = prefix[0].keys_BSD.shape[1], obs.tokens_BL.shape[1]
    manifest = Manifest(
        **made_from(policy.config), vlm_digest="", cameras=[], bits=8, image_tokens=tokens - prompt, frames=1, every=1,
        prompt_tokens=prompt, batch_size=1, dataset="", dataset_frames=1, checkpoint="",
    )  # fmt: skip
    mask = torch.cat([obs.token_mask_BL.new_ones(len(obs.tokens_BL), tokens - prompt), obs.token_mask_BL], dim=1)
    return unpack(torch.from_numpy(pack(prefix, mask, manifest)), manifest, tokens)


def by_token(prefix: Prefix, obs: Observation, policy: PI0Policy) -> Prefix:
    """Contexts in 8 bits, in which the channels of a token share a scale."""

    def rounded(x_BSD: Tensor) -> Tensor:
        scale = x_BSD.abs().amax(dim=2, keepdim=True) / LARGEST
        return (x_BSD / scale).round() * scale

    return [KVCache(*map(rounded, layer)) for layer in prefix]


WAYS: dict[str, Callable[[Prefix, Observation, PI0Policy], Prefix]] = {
    "bfloat16": to_bfloat16, "8 bits, a scale for each channel": by_channel, "8 bits, a scale for each token": by_token
}  # fmt: skip


def learn(policy: PI0Policy, obs: Observation, draws: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Losses of the samples (B,), and the gradient of their mean as one vector."""
    policy.zero_grad()
    losses = policy.objective.errors(policy.model, obs, *draws).mean(dim=(1, 2, 3))
    losses.mean().backward()
    return losses.detach(), torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@torch.no_grad()
def chunk(policy: PI0Policy, obs: Observation, noise_BTA: Tensor) -> Tensor:
    """A chunk by Euler steps."""
    x, steps, context = noise_BTA[:, None], policy.config.num_inference_steps, policy.model.context(obs)
    for t in solvers.fixed_times("euler", steps, x.device):
        x = x - policy.model.velocity(x, policy.model.embed_time(t), context) / steps
    return x[:, 0]


def answers(driver: Driver, obs: Observation, draws: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """All that is compared, for the contexts in `obs`."""
    losses, gradient = learn(driver.policy, obs, draws)
    actions = chunk(driver.policy, obs, draws[1][:, 0])
    degrees = torch.as_tensor(driver.post(actions.flatten(0, 1)))[:, ARM]
    mask_BS = driver.policy.model.encode_prefix(obs)[1]  # padding is not read
    keys, values = (torch.stack([layer[i] for layer in obs.prefix])[:, mask_BS] for i in (0, 1))
    return {
        "keys": keys, "values": values, "losses": losses, "gradient": gradient, "chunk": actions, "degrees": degrees
    }  # fmt: skip


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Errors of one batch, relative but for those in degrees."""
    row = {
        name: ((found[name] - exact[name]).norm() / exact[name].norm()).item()
        for name in ("keys", "values", "gradient", "chunk")
    }
    row["gradient norm"] = abs(found["gradient"].norm() / exact["gradient"].norm() - 1).item()
    row["loss"] = abs(found["losses"].mean() / exact["losses"].mean() - 1).item()
    apart = (found["degrees"] - exact["degrees"]).abs()
    return row | {"degrees": apart.square().mean().sqrt().item(), "most degrees": apart.max().item()}


def measure(driver: Driver, root: Path, frames: int) -> dict[str, list[dict[str, float]]]:
    """Errors of each batch, by the way of rounding."""
    policy = driver.policy.eval()
    policy.model.paligemma.requires_grad_(False)
    plain = LeRobotDataset("local/held_out", root=root)
    chunks = resolve_delta_timestamps(policy.config, plain.meta)
    dataset = LeRobotDataset("local/held_out", root=root, delta_timestamps=chunks)
    chosen = np.linspace(0, len(dataset) - 1, frames).round().astype(int).tolist()
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # of the times
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for batch in DataLoader(Subset(dataset, chosen), BATCH):
        batch = driver.pre(batch)
        obs, actions = policy.observe(batch, torch.device("cpu")), policy.observe.actions(batch, torch.device("cpu"))
        shape = (len(batch[OBS_STATE]), SAMPLES)
        noise = flow.sample_noise((*shape, *actions.shape[1:]), torch.device("cpu"), draw)
        draws = actions[:, None], noise, flow.BetaTime().sample(shape, torch.device("cpu"))
        with torch.no_grad():
            prefix = list(policy.model.encode_prefix(obs)[0])
        exact = answers(driver, obs._replace(prefix=prefix), draws)
        for name, rounded in WAYS.items():
            found = answers(driver, obs._replace(prefix=rounded(prefix, obs, policy)), draws)
            rows[name].append(errors(found, exact))
    return rows


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Means over batches, and the largest where an outlier would matter."""
    lines = ["| contexts | keys | values | loss | gradient | its norm | chunk | chunk, degrees |", "|" + "---|" * 8]
    for name, own in rows.items():
        mean = {key: float(np.mean([row[key] for row in own])) for key in own[0]}
        most = {key: max(row[key] for row in own) for key in own[0]}
        relative = [
            f"{mean[key]:.3%}" + (f" (≤ {most[key]:.3%})" if key in ("loss", "gradient", "chunk") else "")
            for key in ("keys", "values", "loss", "gradient", "gradient norm", "chunk")
        ]
        lines.append(f"| {name} | {' | '.join(relative)} | {mean['degrees']:.3f} (≤ {most['most degrees']:.2f}) |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, required=True, help="folder of a policy that make demo trained")
    parser.add_argument("--dataset", type=Path, required=True, help="folder of demonstrations that it has not seen")
    parser.add_argument("--frames", type=int, default=200, help="frames, spread over the dataset (default: 200)")
    options = parser.parse_args()
    print(table(measure(Driver(options.policy, scenes=0), options.dataset, options.frames)))


if __name__ == "__main__":
    main()
