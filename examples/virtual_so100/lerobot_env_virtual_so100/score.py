"""Success rates of controls in the simulator, and of policies from the results file of `lerobot-eval`.

    python -m lerobot_env_virtual_so100.score --dataset=DIR --episodes=100 --output=controls.json
    python -m lerobot_env_virtual_so100.score --controls='[]' --results=results.jsonl

A success rate means something only in comparison with controls: random actions and the mean action must fail, the
expert and the replay of recorded demonstrations must succeed. Every number comes from the simulator's state; nothing is
rendered.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import draccus
import numpy as np
from tqdm import tqdm

from .constants import FPS, episode_steps

logger = logging.getLogger(__name__)
_Z95 = 1.959964
_NEED_DATASET = ("mean", "replay")


@dataclass
class ScoreConfig:
    """Score controls in the simulator, or the results of an evaluation."""

    # Task: reach, hover or pick_place.
    task: str = "reach"
    # Which controls: random, mean, expert, replay.
    controls: list[str] = field(default_factory=lambda: ["random", "mean", "expert"])
    # Dataset whose mean action is sent (mean) and whose episodes are replayed (replay).
    dataset: Path | None = None
    # Scenes, or recorded episodes, for each control.
    episodes: int = 100
    # First scene; give lerobot-eval the same --seed to compare on equal scenes.
    seed: int = 1000
    # Stream of scenes: train, validation or test.
    split: str = "test"
    # Control steps a second.
    fps: int = FPS
    # File that lerobot-eval wrote through --env.results, to be summarised beside the controls.
    results: Path | None = None
    # JSON file for the scores.
    output: Path | None = None

    def __post_init__(self):
        unknown = sorted(set(self.controls) - set(_CONTROLS))
        if unknown:
            raise ValueError(f"--controls knows {', '.join(_CONTROLS)}, not {', '.join(unknown)}")
        needing = [name for name in self.controls if name in _NEED_DATASET]
        if needing and self.dataset is None:
            raise ValueError(f"--dataset=DIR is needed for: {', '.join(needing)}")


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a success rate, as fractions. Raises ValueError if there are no trials."""
    if trials < 1:
        raise ValueError("no trials: there is no success rate")
    rate, z2 = successes / trials, _Z95**2
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z95 / (1 + z2 / trials) * np.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials**2))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def summary(outcomes: list[dict]) -> dict:
    """Success rate with its interval, and where the episodes ended, from the final infos of episodes."""
    wins = sum(outcome["is_success"] for outcome in outcomes)
    at_target = sum(outcome["ended_at"] == outcome["target"] for outcome in outcomes)
    return {
        "successes": wins,
        "episodes": len(outcomes),
        "rate": wins / max(1, len(outcomes)),
        "interval_95": wilson(wins, len(outcomes)),
        "ended_at_scenes_target": at_target,
        "ended_nowhere": sum(outcome["ended_at"] == "none" for outcome in outcomes),
        "median_distance_m": float(np.median([outcome["distance"] for outcome in outcomes])),
    }


def _play(env, act: Callable[[int], np.ndarray]) -> dict:
    """Run the episode that was reset; `act(step)` gives the joint targets (6,). Returns its final info."""
    step, over, info = 0, False, {}
    while not over:
        _, _, terminated, truncated, info = env.step(act(step))
        step, over = step + 1, terminated or truncated
    return info


def _on_scenes(config: ScoreConfig, name: str, prepare: Callable) -> list[dict]:
    """Final infos over the scenes; `prepare(env, seed)` gives the episode's `act`."""
    from .env import VirtualSO100GymEnv

    env = VirtualSO100GymEnv(config.task, config.fps, split=config.split, pixels=False)
    infos = []
    for seed in tqdm(range(config.seed, config.seed + config.episodes), desc=name, unit="ep"):
        env.reset(seed=seed)
        infos.append(_play(env, prepare(env, seed)))
    return infos


def _random(config: ScoreConfig) -> list[dict]:
    def prepare(env, seed):
        rng = np.random.default_rng(seed)
        return lambda step: rng.uniform(env.action_space.low, env.action_space.high)

    return _on_scenes(config, "random actions", prepare)


def _mean(config: ScoreConfig) -> list[dict]:
    stats = json.loads((config.dataset / "meta" / "stats.json").read_text())
    mean = np.array(stats["action"]["mean"])
    return _on_scenes(config, "mean action", lambda env, seed: lambda step: mean)


def _expert(config: ScoreConfig) -> list[dict]:
    from .experts import make_expert

    def prepare(env, seed):
        expert = make_expert(config.task, env.simulation, config.fps)
        expert.reset(env.instructed)
        return lambda step: expert.act()

    return _on_scenes(config, "expert", prepare)


def recorded_episodes(root: Path, count: int) -> list[tuple]:
    """The first `count` episodes of a dataset of this package: (Layout, actions (T, 6))."""
    import pyarrow.dataset

    from .record import SCENES_FILE
    from .tasks import Layout

    lines = (root / SCENES_FILE).read_text().splitlines()[:count]
    columns = ["episode_index", "index", "action"]
    files = pyarrow.dataset.dataset(root / "data").to_table(columns=columns)
    table = files.filter(pyarrow.compute.field("episode_index") < len(lines)).sort_by("index").to_pandas()
    episodes = []
    for line, (_, rows) in zip(lines, table.groupby("episode_index"), strict=True):
        scene = json.loads(line)
        scene.pop("task")
        episodes.append((Layout(**scene), np.stack(rows["action"])))
    return episodes


def _replay(config: ScoreConfig) -> list[dict]:
    from .env import VirtualSO100GymEnv

    infos = []
    for layout, actions in tqdm(recorded_episodes(config.dataset, config.episodes), desc="replay", unit="ep"):
        steps = episode_steps(config.task, config.fps) if config.task == "pick_place" else len(actions)
        env = VirtualSO100GymEnv(config.task, config.fps, episode_length=steps, pixels=False)
        env.reset(options={"layout": layout})
        infos.append(_play(env, lambda step, actions=actions: actions[min(step, len(actions) - 1)]))
    return infos


_CONTROLS = {"random": _random, "mean": _mean, "expert": _expert, "replay": _replay}


def score(config: ScoreConfig) -> dict[str, dict]:
    """Summaries by name; "results" is that of `config.results`."""
    scores = {name: summary(_CONTROLS[name](config)) for name in config.controls}
    if config.results is not None:
        lines = config.results.read_text().splitlines()
        scores["results"] = summary([json.loads(line) for line in lines])
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(scores, indent=2) + "\n")
    return scores


@draccus.wrap()
def main(config: ScoreConfig) -> None:
    """Command line."""
    for name, entry in score(config).items():
        low, high = entry["interval_95"]
        print(
            f"{name:8s} {entry['successes']:4d}/{entry['episodes']} = {entry['rate']:6.1%} [{low:.1%}, {high:.1%}]"
            f"  at the scene's target {entry['ended_at_scenes_target']}, median {entry['median_distance_m']:.3f} m"
        )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
