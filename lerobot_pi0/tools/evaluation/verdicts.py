"""Verdicts on a policy: what the numbers of an open-loop evaluation say, in words."""

from typing import Any

NOTHING_LOST = 1.01
"""An input counts as useless if the error grows by less than this factor when it is exchanged: chance does as much."""

BARELY = 0.3
"""A policy "barely moves" if it covers less than this part of the recorded motion."""

LEARNED = 0.9
"""A policy has learned if its error is below this part of the better one of holding still and the mean action."""

CLEAR = (0.6, 1.3)
"""Where too few episodes are held out for an interval, only ratios outside of this range are clear."""

DELAYED = 0.6
"""A policy comes too late if moving its chunks back leaves less than this part of the error."""

REACTS = 0.02
"""A chunk that moves by less than this many deviations for a wholly different observation reacts to nothing."""


def ignored(content: dict[str, Any]) -> list[str]:
    """Inputs that the policy does not use.

    A trained network never quite ignores an input: one to which the instruction had told nothing still moved by 7 %, at
    random. So a small reaction counts as none if the chunk is as near to what was recorded without it. What no robot
    would show, a black picture and a frozen state, is not judged. Nothing is said where only one episode is held out,
    in which all pictures are alike, or where the policy reacts to nothing at all.
    """
    threshold, error = content["threshold"], content["error"]["policy"]
    if content["episodes seen"] < 2 or content["reactions"]["everything"]["moves"] < REACTS:
        return []
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
    learned, open_question = _learned(content)
    found = [learned] if learned else []
    if content["way"] < BARELY:
        found.append(f"barely moves: {content['way']:.0%} of the recorded way")
    if content["reactions"]["everything"]["moves"] < REACTS:
        found.append("reacts to nothing: its chunks are the same for every observation")
    late, left = content["delay"]
    if late and left < DELAYED:
        found.append(f"comes too late by about {late} steps: moved back by as many, {left:.0%} of the error is left")
    for name in content["ignored"]:
        reaction = content["reactions"][name]
        found.append(
            f"ignores the {name}: exchanged, it moves the chunk by {reaction['of everything']:.1%} of what another "
            f"observation does, and the error goes from {content['error']['policy']:.2f} to {reaction['error']:.2f}"
        )
    if not found and open_question is None:
        found = ["good: better than holding still and than the mean action, and it uses what was exchanged"]
    found += [open_question] if open_question else []
    if content["rattling"]:  # it may be good apart from that
        times = ", ".join(f"{joint} {content['roughness'][joint]['times']:.1f}" for joint in content["rattling"])
        found.append(
            f"rattles: its chunks are rougher than the recorded ones, by a factor of {times}. "
            "--policy.noise_temperature=0.5 makes them smoother"
        )
    if "instruction" not in content["reactions"]:
        found.append("cannot be asked whether it listens: the dataset has one instruction")
    if content["episodes seen"] < 2:
        found.append("cannot be asked which inputs it uses: one episode is held out, in which they are alike")
    return found


def _learned(content: dict[str, Any]) -> tuple[str | None, str | None]:
    """What speaks against the policy's error, and what cannot be said about it."""
    error, ratio, interval = content["error"], content["ratio"], content["interval"]
    best = min((name for name in error if name != "policy"), key=error.__getitem__)
    low, high = interval or (ratio * LEARNED / CLEAR[1], ratio * LEARNED / CLEAR[0])
    said = f"it errs by {error['policy']:.2f}, {best!r} by {error[best]:.2f}"
    if low > LEARNED:
        return f"has not learned these movements: {said}", None
    if high <= LEARNED:
        return None, None
    episodes = content["episodes seen"]
    return None, (
        f"cannot be judged: {said}, and with {episodes} held-out episodes the ratio of {ratio:.2f} could be anything "
        f"from {low:.2f} to {high:.2f}. Hold out more episodes, or name more with --dataset.episodes"
    )
