"""Seeds of MetaWorld's scenes: which are for data, for choosing settings, and for the numbers that are reported.

A seed decides where objects and goal are. The three ranges share none.
"""

DATA = range(10_000)
"""Demonstrations."""
CHOOSING = range(10_000, 20_000)
"""Evaluations by which settings are chosen."""
REPORTED = range(20_000, 30_000)
"""Evaluations that are reported."""

ATTEMPTS = 10  # seeds that an episode may need until its expert succeeds
MAX_EPISODES = len(DATA) // ATTEMPTS


def of_episode(episode: int) -> range:
    """Seeds of a task's episode: the first one, and those that are tried if its expert fails. None has two episodes.

    Raises:
        ValueError: there are not that many episodes.
    """
    if not 0 <= episode < MAX_EPISODES:
        raise ValueError(f"a task has at most {MAX_EPISODES} episodes, 0 to {MAX_EPISODES - 1}; this is {episode}")
    return DATA[episode::MAX_EPISODES]
