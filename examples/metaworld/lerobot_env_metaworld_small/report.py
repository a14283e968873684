"""Tables and pictures of success by task and difficulty."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from lerobot_env_virtual_so100.record import SCENES_FILE
from lerobot_env_virtual_so100.score import wilson

from .evaluate import Successes
from .policies import REPO
from .tasks import by_difficulty

DRAWS = 10_000
FEW = 10  # lines or rows that a picture has room for


def counted(outcomes: Iterable[bool]) -> dict:
    """Successes, trials, rate, and Wilson's 95 % interval."""
    outcomes = list(outcomes)
    wins, trials = sum(outcomes), len(outcomes)
    return {"successes": wins, "trials": trials, "rate": wins / trials, "interval_95": wilson(wins, trials)}


def mean_of_groups(found: Successes) -> float:
    """The mean over difficulty groups of their mean success, as papers report it."""
    return float(np.mean([np.mean([x for task in tasks for x in found[task]]) for _, tasks in by_difficulty(found)]))


def bootstrap(found: Successes, draws: int = DRAWS) -> tuple[float, float]:
    """95 % interval of `mean_of_groups`: tasks of each group, and trials of each task, are drawn anew."""
    rng, groups = np.random.default_rng(0), []
    for _, tasks in by_difficulty(found):
        rates = np.array([np.mean(found[task]) for task in tasks])
        trials = np.array([len(found[task]) for task in tasks])
        drawn = rng.integers(len(tasks), size=(draws, len(tasks)))
        groups.append((rng.binomial(trials[drawn], rates[drawn]) / trials[drawn]).mean(axis=1))
    low, high = np.quantile(np.mean(groups, axis=0), [0.025, 0.975])
    return float(low), float(high)


def summary(found: Successes) -> dict:
    """All that is reported of one policy."""
    groups = {name: counted(x for task in tasks for x in found[task]) for name, tasks in by_difficulty(found)}
    return {
        "tasks": {task: counted(each) for task, each in found.items()},
        "groups": groups,
        "all": counted(x for each in found.values() for x in each),
        "mean_of_groups": {"rate": mean_of_groups(found), "interval_95": bootstrap(found)},
    }


def table(rows: dict[str, dict]) -> str:
    """Tasks and groups down, policies across; `rows` are summaries by policy."""
    names, first = list(rows), next(iter(rows.values()))
    width = max(22, *(len(name) + 2 for name in names))
    lines = [" " * 30 + "".join(f"{name:>{width}}" for name in names)]

    def line(title: str, entries: Iterable[dict]) -> str:
        return f"{title:<30}" + "".join(f"{_cell(entry):>{width}}" for entry in entries)

    for group, tasks in by_difficulty(first["tasks"]):
        lines += [line(f"  {task}", (rows[name]["tasks"][task] for name in names)) for task in tasks]
        lines.append(line(group, (rows[name]["groups"][group] for name in names)))
    lines.append(line("all trials", (rows[name]["all"] for name in names)))
    lines.append(line("mean of the groups", (rows[name]["mean_of_groups"] for name in names)))
    return "\n".join(lines)


def _cell(entry: dict) -> str:
    low, high = entry["interval_95"]
    share = f"{entry['successes']}/{entry['trials']}" if "trials" in entry else f"{entry['rate']:.1%}"
    return f"{share} ({100 * low:.0f} – {100 * high:.0f} %)"


def _axes(rows: int, columns: int, size: tuple[float, float]):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=size, squeeze=False)


def plot_curves(curves: dict[str, dict[int, Successes]], output: Path) -> None:
    """Success over training steps, of all tasks and of each, or of each group if there are many; `curves` has policies,
    then steps."""
    figure, axes = _axes(1, 1, (7, 4.5))
    axis = axes[0][0]
    for name, points in curves.items():
        steps = sorted(points)
        means = [100 * np.mean([x for each in points[step].values() for x in each]) for step in steps]
        axis.plot(steps, means, marker="o", linewidth=2.5, label=f"{name}, all tasks")
        if len(curves) == 1:
            tasks = list(points[steps[0]])
            parts = [(task, [task]) for task in tasks] if len(tasks) <= FEW else [*by_difficulty(tasks)]
            for part, members in parts:
                rates = [100 * np.mean([x for task in members for x in points[step][task]]) for step in steps]
                axis.plot(steps, rates, alpha=0.6, label=part)
    axis.set(xlabel="training step", ylabel="success, %", ylim=(-3, 103))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(output, dpi=120)


def picture(dataset: Path, tasks: list[str], output: Path, moments: int = 4) -> None:
    """A row of moments of one demonstration for each task, or for a few of many, from the dataset's own pictures."""
    from lerobot.datasets import LeRobotDataset

    episodes = first_episodes(dataset)
    tasks = tasks[:: -(-len(tasks) // FEW)]
    figure, axes = _axes(len(tasks), moments, (1.6 * moments, 1.75 * len(tasks)))
    for row, task in zip(axes, tasks, strict=True):
        frames = LeRobotDataset(REPO, root=dataset, episodes=[episodes[task]])
        for axis, index in zip(row, np.linspace(0, len(frames) - 1, moments).round().astype(int), strict=True):
            axis.imshow(frames[int(index)]["observation.image"].permute(1, 2, 0).numpy())
            axis.set_axis_off()
        row[0].set_title(task, fontsize=8, loc="left")
    figure.tight_layout()
    figure.savefig(output, dpi=120)


def first_episodes(dataset: Path) -> dict[str, int]:
    """The first episode of each task."""
    scenes = [json.loads(line)["task"] for line in (dataset / SCENES_FILE).read_text().splitlines()]
    return {task: scenes.index(task) for task in dict.fromkeys(scenes)}
