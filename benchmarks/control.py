"""Benchmark of control on the demo's task: real-time chunking with delays, solvers, replanning, a rounded VLM.

    python benchmarks/control.py --policy=DIR --what=rtc --trained=DIR     # real-time chunking with injected delays
    python benchmarks/control.py --policy=DIR --what=solvers               # error, success and time by evaluations
    python benchmarks/control.py --policy=DIR --what=replanning            # n_action_steps
    python benchmarks/control.py --policy=DIR --what=rounding              # vlm_quantization: error and success

A policy that `make demo` trained acts in the simulator, which waits for it. A delay is a number of control steps during
which the arm executes the old chunk. `sync` stands still during the delay, `none` switches to the new chunk without
guidance, the others guide it. `lerobot` is LeRobot's own RTCProcessor around this network.

Success comes from the simulator's state, with Wilson's 95 % interval over scenes. The jump at a seam is the distance,
in degrees, between the first action of a new chunk and the old chunk's action that it replaces (mean over joints and
seams). Jerk is the root mean square third difference of commanded joint angles.
Axes: B scenes, T steps of a chunk, A joints.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from lerobot.envs.utils import preprocess_observation
from lerobot.policies import make_pre_post_processors
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.rtc.modeling_rtc import RTCProcessor
from lerobot.utils.constants import OBS_STATE
from lerobot_env_virtual_so100.constants import CAMERAS, FPS, JOINTS, episode_steps
from lerobot_env_virtual_so100.env import VirtualSO100GymEnv
from lerobot_env_virtual_so100.experts import make_expert
from lerobot_env_virtual_so100.score import summary
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lerobot_pi0 import PI0Policy
from lerobot_pi0.checkpoints.checkpoint import Checkpoint
from lerobot_pi0.kernels import rounding
from lerobot_pi0.network import flow, solvers

DELAYS = (0, 2, 4, 8, 12)
GUIDES = ("sync", "none", "lerobot", "identity", "vjp", "trained")
SOLVERS = [("euler", n) for n in (1, 2, 3, 5, 10, 20)] + [(s, n) for s in ("midpoint", "heun") for n in (1, 2, 3, 5)]
SOLVERS += [("adaptive", n) for n in (3, 6, 10)]
ROUNDED = {"float32": {"dtype": "float32"}, "bfloat16": {"dtype": "bfloat16"}}
ROUNDED |= {kind: {"dtype": "bfloat16", "vlm_quantization": kind} for kind in rounding.LAYERS}
ARM = slice(0, len(JOINTS) - 1)  # the gripper has no degrees
FREE_AFTER = 10  # a chunk is guided until this many actions after the delay

Chunk = Callable[..., Tensor]


@dataclass
class Driver:
    """A policy with its processors, and the scenes it acts in."""

    folder: Path
    scenes: int
    seed: int = 1000
    batch: int = 25
    options: dict[str, Any] = field(default_factory=dict)
    task: str = "reach"
    policy: PI0Policy = field(init=False)

    def __post_init__(self) -> None:
        config = Checkpoint.open(self.folder).config()
        for name, value in self.options.items():
            setattr(config, name, value)
        self.policy = PI0Policy.from_pretrained(self.folder, config=config)
        self.pre, self.post = make_pre_post_processors(self.policy.config, pretrained_path=str(self.folder))

    def groups(self) -> Iterator[tuple[list[VirtualSO100GymEnv], list[dict]]]:
        """Environments at the start of their scenes, `batch` at a time, and their first observations."""
        seeds = range(self.seed, self.seed + self.scenes)
        for first in range(0, self.scenes, self.batch):
            group = seeds[first : first + self.batch]
            envs = [VirtualSO100GymEnv(self.task) for _ in group]
            yield envs, [env.reset(seed=seed)[0] for env, seed in zip(envs, group, strict=True)]

    def observe(self, envs: list[VirtualSO100GymEnv], seen: list[dict]) -> dict[str, Any]:
        """The batch that lerobot-eval would give to the policy."""
        pixels = {name: np.stack([one["pixels"][name] for one in seen]) for name in CAMERAS}
        together = {"pixels": pixels, "agent_pos": np.stack([one["agent_pos"] for one in seen])}
        return self.pre(preprocess_observation(together) | {"task": [env.task_description for env in envs]})


@dataclass
class Track:
    """Record of one group of scenes: commanded actions per tick, jumps at seams, and how the scenes ended."""

    actions: list[np.ndarray] = field(default_factory=list)
    jumps: list[np.ndarray] = field(default_factory=list)
    infos: list[dict] = field(default_factory=list)

    @property
    def jerk(self) -> np.ndarray:
        """Root mean square third difference of each scene, degrees / tick³ (B,)."""
        third = np.diff(np.stack(self.actions)[..., ARM], n=3, axis=0)
        return np.sqrt((third**2).mean(axis=(0, 2)))


def lerobots(policy: PI0Policy, batch: dict, noise: Tensor, left: Tensor | None, delay: int, horizon: int) -> Tensor:
    """A chunk by LeRobot's RTCProcessor around this network's velocity."""
    processor = RTCProcessor(RTCConfig(execution_horizon=horizon))
    with torch.no_grad():
        context = policy.model.context(policy.observe(batch, noise.device))
        x, steps = noise, policy.config.num_inference_steps
        for t in solvers.fixed_times("euler", steps, noise.device):
            embedding = policy.model.embed_time(t)

            def velocity(x: Tensor, embedding: Tensor = embedding) -> Tensor:
                return policy.model.velocity(x[:, None], embedding, context)[:, 0]

            x = x - processor.denoise_step(x, left, delay, t.item(), velocity, horizon) / steps
    return x[..., : len(JOINTS)]


def chunk_of(driver: Driver, guide: str) -> Chunk:
    """A function (batch, left over, delay) -> normalised chunk (B, T, A), with its own generator of noise."""
    policy, generator = driver.policy, torch.Generator().manual_seed(0)
    cfg = policy.config
    guided = guide in ("identity", "vjp", "trained")
    cfg.rtc_guidance, cfg.rtc_config = (guide, RTCConfig(enabled=True)) if guided else (None, None)

    def chunk(batch: dict, left: Tensor | None, delay: int) -> Tensor:
        shape = (len(batch[OBS_STATE]), cfg.chunk_size, cfg.max_action_dim)
        noise = flow.sample_noise(shape, torch.device("cpu"), generator)
        horizon = delay + FREE_AFTER
        if guide == "lerobot":
            return lerobots(policy, batch, noise, None if left is None else left[:, :horizon], delay, horizon)
        how = {"prev_chunk_left_over": left, "inference_delay": delay, "execution_horizon": horizon}
        return policy.predict_action_chunk(batch, noise=noise, **(how if guided else {}))

    return chunk


def drive(driver: Driver, envs: list, seen: list[dict], chunk: Chunk, delay: int, every: int, sync: bool) -> Track:
    """Run one group of scenes to the end of its episodes.

    Args:
        seen: the first observations of the environments.
        delay: control steps between an observation and its chunk.
        every: least number of actions between two requests of a chunk.
        sync: whether the arm stands still while a chunk is computed.
    """
    track = Track()
    plan: Tensor | None = None  # normalised, (B, T, A)
    told = np.stack([env.simulation.arm.state for env in envs])
    at = asked = 0
    coming: tuple[int, Tensor] | None = None
    for tick in range(episode_steps(driver.task, FPS)):
        if coming is None and (plan is None or tick - asked >= every + (delay if sync else 0)):
            left = None if plan is None or sync else plan[:, at:]
            coming, asked = (tick + delay, chunk(driver.observe(envs, seen), left, delay)), tick
        if coming is not None and coming[0] == tick:
            before = told if sync or plan is None else actions_of(driver, plan, at)
            first, plan = plan is None, coming[1]
            at, coming = 0 if sync or first else delay, None
            if not first:
                track.jumps.append(np.abs(actions_of(driver, plan, at) - before)[:, ARM].mean(axis=1))
        if plan is not None and not (sync and coming is not None):
            told = actions_of(driver, plan, at)
            at += 1
        track.actions.append(told)
        last = [env.step(action) for env, action in zip(envs, told, strict=True)]
        seen = [observation for observation, *_ in last]
    track.infos = [info for *_, info in last]
    return track


def actions_of(driver: Driver, plan: Tensor, at: int) -> np.ndarray:
    """The action at one step of a chunk in the robot's units, (B, A)."""
    return np.asarray(driver.post(plan[:, min(at, plan.shape[1] - 1)]), dtype=np.float64)


def measure(driver: Driver, guide: str, delay: int, every: int) -> dict:
    """Run all scenes. Returns success with its interval, and jump and jerk with standard errors over scenes."""
    chunk = chunk_of(driver, guide)
    tracks = [drive(driver, *group, chunk, delay, every, guide == "sync") for group in driver.groups()]
    row = summary([info for track in tracks for info in track.infos])
    jumps = np.concatenate([np.stack(track.jumps).mean(axis=0) if track.jumps else [] for track in tracks])
    jerks = np.concatenate([track.jerk for track in tracks])
    row |= {"guide": guide, "delay": delay, "every": every}
    for name, values in (("jump", jumps), ("jerk", jerks)):
        row[name] = float(values.mean()) if len(values) else None
        row[f"{name}_se"] = float(values.std() / np.sqrt(len(values))) if len(values) else None
    return row


def measure_rtc(driver: Driver, trained: Driver | None, every: int, guides: list[str]) -> list[dict]:
    """Each way of real-time chunking at each delay."""
    rows = []
    for delay in DELAYS:
        for guide in guides:
            own = trained if guide == "trained" else driver
            if own is not None:
                rows.append(measure(own, guide, delay, every))
                print(line(rows[-1]), flush=True)
    return rows


def measure_expert(driver: Driver) -> dict:
    """The scripted expert in the same scenes: the jerk that the demonstrations themselves have."""
    tracks = []
    for seed in range(driver.seed, driver.seed + driver.scenes):
        env, track = VirtualSO100GymEnv("reach", pixels=False), Track()
        env.reset(seed=seed)
        expert = make_expert("reach", env.simulation, FPS)
        expert.reset(env.instructed)
        for _ in range(episode_steps("reach", FPS)):
            track.actions.append(expert.act()[None])
            info = env.step(track.actions[-1][0])[-1]
        track.infos.append(info)
        tracks.append(track)
    row = summary([info for track in tracks for info in track.infos])
    jerks = np.concatenate([track.jerk for track in tracks])
    jerk = {"jerk": float(jerks.mean()), "jerk_se": float(jerks.std() / np.sqrt(len(jerks)))}
    return row | jerk | {"guide": "expert", "delay": 0, "every": 1, "jump": None}


def measure_replanning(driver: Driver) -> list[dict]:
    """Success by the number of actions that are executed of each chunk, without delay; and the expert's row."""
    rows = [measure_expert(driver)]
    print(line(rows[0]), flush=True)
    for every in (1, 2, 4, 6, 10, 14, 28):
        rows.append(measure(driver, "none", 0, every))
        print(line(rows[-1]), flush=True)
    return rows


def measure_solvers(driver: Driver, every: int, batches: int = 4) -> list[dict]:
    """By solver: distance of chunks to a 200-step reference from equal noise, success, and seconds per chunk."""
    policy, cfg = driver.policy, driver.policy.config
    observed = [driver.observe(*group) for group in driver.groups()][:batches]
    generator = torch.Generator().manual_seed(1)
    shape = (driver.batch, cfg.chunk_size, cfg.max_action_dim)
    noise = [flow.sample_noise(shape, torch.device("cpu"), generator)[: len(o[OBS_STATE])] for o in observed]

    def chunks(solver: str, steps: int) -> tuple[Tensor, float]:
        cfg.solver, cfg.num_inference_steps = solver, steps
        started = time.perf_counter()
        found = [policy.predict_action_chunk(o, noise=n) for o, n in zip(observed, noise, strict=True)]
        return torch.cat(found), (time.perf_counter() - started) / len(found)

    reference, _ = chunks("midpoint", 200)
    rows = []
    for solver, steps in SOLVERS:
        found, _ = chunks(solver, steps)
        seconds = min(chunks(solver, steps)[1] for _ in range(3))
        error = (found - reference).square().mean().sqrt().item()
        calls = evaluations(policy, lambda solver=solver, steps=steps: chunks(solver, steps)) / len(observed)
        row = measure(driver, "none", 0, every) | {"solver": solver, "steps": steps, "evaluations": calls}
        rows.append(row | {"error": error, "milliseconds": seconds * 1e3})
        low, high = row["interval_95"]
        print(
            f"| `{solver}` | {steps} | {calls:.1f} | {error:.4f} | {row['successes']}/{row['episodes']} "
            f"({low:.0%} – {high:.0%}) | {seconds * 1e3:.0f} |",
            flush=True,
        )
    return rows


def measure_rounding(folder: Path, scenes: int, every: int) -> list[dict]:
    """By how the VLM is rounded: distance of chunks from those in float32, from equal noise, and success.

    FP8 is emulated where no card has its products: the same numbers, but for the order of sums.
    """
    rows: list[dict] = []
    exact = None
    for name, options in ROUNDED.items():
        with mock.patch.object(rounding, "check"):
            driver = Driver(folder, scenes, options=options)
        draw = torch.Generator().manual_seed(1)
        shape = (driver.policy.config.chunk_size, driver.policy.config.max_action_dim)
        chunks = []
        for group in driver.groups():
            seen = driver.observe(*group)
            noise = flow.sample_noise((len(seen[OBS_STATE]), *shape), torch.device("cpu"), draw)
            chunks.append(driver.policy.predict_action_chunk(seen, noise=noise))
        found = torch.cat(chunks)
        exact = found if exact is None else exact
        error = ((found - exact).norm() / exact.norm()).item()
        rows.append(measure(driver, "none", 0, every) | {"rounded": name, "error": error})
        low, high = rows[-1]["interval_95"]
        ends = f"{rows[-1]['successes']}/{rows[-1]['episodes']} ({low:.0%} – {high:.0%})"
        print(f"| `{name}` | {error:.2%} | {ends} |", flush=True)
    return rows


def evaluations(policy: PI0Policy, run: Callable[[], Any]) -> int:
    """How often `run` evaluates the network's velocity."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = policy.model.expert.norm.register_forward_hook(count)
    run()
    handle.remove()
    return calls


def line(row: dict) -> str:
    """One row of the page's table."""
    low, high = row["interval_95"]
    jump = "–" if row["jump"] is None else f"{row['jump']:.2f} ± {row['jump_se']:.2f}"
    return (
        f"| {row['delay']} | {row['every']} | `{row['guide']}` | {row['successes']}/{row['episodes']} "
        f"({low:.0%} – {high:.0%}) | {jump} | {row['jerk']:.2f} ± {row['jerk_se']:.2f} |"
    )


@contextmanager
def panels(path: Path, width: float, labels: list[str], x: str, **shared: Any) -> Iterator[Sequence[Axes]]:
    """Panels side by side with one legend, in the first. The picture is written when the block ends."""
    figure = Figure(figsize=(width, 4))
    axes = figure.subplots(1, len(labels))
    yield axes
    for axis, label in zip(axes, labels, strict=True):
        axis.set(xlabel=x, ylabel=label, **shared)
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def plot_rtc(rows: list[dict], path: Path) -> None:
    """Success, jump and jerk over the delay, a line for each way."""
    labels = ["success, %", "jump at a seam, degrees", "jerk, degrees / tick³"]
    with panels(path, 13, labels, "delay, control steps of 0.1 s") as axes:
        for guide in dict.fromkeys(row["guide"] for row in rows):
            own = [row for row in rows if row["guide"] == guide]
            style = {"marker": "o", "markersize": 4, "linestyle": ":" if guide == "lerobot" else "-"}
            rates = np.array([100 * row["rate"] for row in own])
            bars = np.abs(np.array([row["interval_95"] for row in own]).T * 100 - rates)
            axes[0].errorbar([row["delay"] for row in own], rates, bars, capsize=2, label=guide, **style)
            for axis, name in ((axes[1], "jump"), (axes[2], "jerk")):
                seen = [row for row in own if row[name] is not None]
                errors = [1.96 * row[f"{name}_se"] for row in seen]
                axis.errorbar([row["delay"] for row in seen], [row[name] for row in seen], errors, **style)
        axes[0].set(ylim=(0, 103))
        for axis in axes[1:]:
            axis.set(ylim=(0, None))


def plot_solvers(rows: list[dict], path: Path) -> None:
    """Error of the chunk and success over evaluations of the network, a line for each solver."""
    labels = ["distance to 200 steps, normalised units", "success, %"]
    with panels(path, 10, labels, "evaluations of the network per chunk", xscale="log") as axes:
        for solver in dict.fromkeys(row["solver"] for row in rows):
            own = [row for row in rows if row["solver"] == solver]
            calls = [row["evaluations"] for row in own]
            axes[0].plot(calls, [row["error"] for row in own], marker="o", label=solver)
            axes[1].plot(calls, [100 * row["rate"] for row in own], marker="o")
        axes[0].set(yscale="log")
        axes[1].set(ylim=(0, 103))


PLOTS = {"rtc": plot_rtc, "solvers": plot_solvers}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, required=True, help="folder of a policy that make demo trained")
    parser.add_argument("--trained", type=Path, help="folder of one trained with rtc_training_max_delay")
    whats = ["rtc", "solvers", "replanning", "rounding"]
    parser.add_argument("--what", choices=whats, required=True, help="what to measure")
    parser.add_argument("--guides", nargs="+", choices=GUIDES, default=GUIDES, help="ways of chunking (default: all)")
    parser.add_argument("--scenes", type=int, default=100, help="unseen scenes (default: 100)")
    parser.add_argument("--every", type=int, default=6, help="least number of actions between chunks (default: 6)")
    parser.add_argument("--output", type=Path, default=Path("outputs/control"), help="folder of table and plot")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    driver = Driver(options.policy, options.scenes)
    if options.what == "rounding":
        rows = measure_rounding(options.policy, options.scenes, options.every)
    elif options.what == "rtc":
        trained = options.trained and Driver(options.trained, options.scenes)
        rows = measure_rtc(driver, trained, options.every, options.guides)
    elif options.what == "solvers":
        rows = measure_solvers(driver, options.every)
    else:
        rows = measure_replanning(driver)
    (options.output / f"{options.what}.json").write_text(json.dumps(rows, indent=2) + "\n")
    if options.what in PLOTS:
        PLOTS[options.what](rows, options.output / f"{options.what}.png")


if __name__ == "__main__":
    main()
