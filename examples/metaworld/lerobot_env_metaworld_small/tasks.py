"""MetaWorld's tasks by name and difficulty, from LeRobot's own list."""

import json
import random
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

FIVE = "door-open-v3:50,drawer-open-v3:50,button-press-topdown-v3:50,reach-v3:400,pick-place-v3:400"
"""The tasks of `make metaworld`. Small things need more scenes than a door."""


@cache
def _list() -> dict:
    """LeRobot's list, read as a file: importing its module would need MetaWorld."""
    return json.loads(Path(find_spec("lerobot.envs").origin).with_name("metaworld_config.json").read_text())


def groups() -> dict[str, list[str]]:
    """Names of tasks by difficulty: easy, medium, hard, very_hard."""
    return _list()["DIFFICULTY_TO_TASKS"]


def ten() -> list[str]:
    """Ten tasks that were drawn before any of them was trained: 1 easy, 3 medium, 3 hard, 3 very hard."""
    rng, counts = random.Random(0), {"easy": 1, "medium": 3, "hard": 3, "very_hard": 3}
    return [task for name, count in counts.items() for task in rng.sample(groups()[name], count)]


def instruction(task: str) -> str:
    """The sentence that LeRobot's environment gives to policies."""
    return _list()["TASK_DESCRIPTIONS"][task]


def parse(text: str) -> list[str]:
    """The tasks of `demonstrations`."""
    return [*demonstrations(text, 1)]


def demonstrations(text: str, episodes: int) -> dict[str, int]:
    """Tasks of a list with commas of tasks, groups, "ten" and "all", each once, and how many episodes each has.

    Args:
        text: such as "easy,reach-v3:250"; a number after a name is for it, and the last one counts.
        episodes: of those without a number.

    Raises:
        ValueError: there is no such task or group, or what follows a name is no number of episodes.
    """
    found: dict[str, int] = {}
    sets = groups() | {"ten": ten(), "all": [task for tasks in groups().values() for task in tasks]}
    for part in text.split(","):
        name, colon, number = (x.strip() for x in part.partition(":"))
        if name not in sets and name not in _list()["TASK_DESCRIPTIONS"]:
            raise ValueError(
                f"MetaWorld has no task {name!r}. Groups: {', '.join(sets)}. Tasks: "
                f"{', '.join(_list()['TASK_DESCRIPTIONS'])}"
            )
        if colon and not (number.isdecimal() and int(number)):
            raise ValueError(f"{part.strip()!r}: after the colon comes a number of episodes, such as {name}:100")
        for task in sets.get(name, [name]):
            if colon or task not in found:
                found[task] = int(number) if colon else episodes
    return found


def difficulty(task: str) -> str:
    """The group of a task."""
    return next(name for name, tasks in groups().items() if task in tasks)


def by_difficulty(tasks: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Groups that have any of the tasks, the easiest first, each with those."""
    chosen = set(tasks)
    for name, members in groups().items():
        if found := [task for task in members if task in chosen]:
            yield name, found
