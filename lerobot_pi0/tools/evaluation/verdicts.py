"""Verdicts on a policy: what the numbers of an open-loop evaluation say, in words."""

from typing import Any

NOTHING_LOST = 1.01
"""An input counts as useless if the error grows by less than this factor when it is exchanged: chance does as much."""

BARELY = 0.3
"""A policy "barely moves" if it covers less than this part of the recorded motion."""


def ignored(content: dict[str, Any]) -> list[str]:
    """Inputs that the policy does not use.

    A trained network never quite ignores an input: one to which the instruction had told nothing still moved by 7 %, at
    random. So a small reaction counts as none if the chunk is as near to what was recorded without it. What no robot
    would show, a black picture and a frozen state, is not judged.
    """
    threshold, error = content["threshold"], content["error"]["policy"]
    return [
        name
        for name, x in content["reactions"].items()
        if "," not in name
        and (
            x["of everything"] < threshold
            or (x["of everything"] < 4 * threshold and x["error"] <= NOTHING_LOST * error)
        )
    ]


def verdicts(content: dict[str, Any]) -> list[str]:
    """What the numbers say, in words; "good" if nothing is to be said against the policy."""
    error, found = content["error"], []
    best = min((name for name in error if name != "policy"), key=error.__getitem__)
    if error["policy"] > 0.9 * error[best]:
        found.append(
            f"has not learned these movements: it errs by {error['policy']:.2f}, {best!r} by {error[best]:.2f}"
        )
    if content["way"] < BARELY:
        found.append(f"barely moves: {content['way']:.0%} of the recorded way")
    for name in content["ignored"]:
        reaction = content["reactions"][name]
        found.append(
            f"ignores the {name}: exchanged, it moves the chunk by {reaction['of everything']:.1%} of what another "
            f"observation does, and the error goes from {error['policy']:.2f} to {reaction['error']:.2f}"
        )
    found = found or ["good: better than holding still and than the mean action, and it uses what was exchanged"]
    if "instruction" not in content["reactions"]:
        found.append("cannot be asked whether it listens: the dataset has one instruction")
    return found
