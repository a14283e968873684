"""The report of `lerobot-pi0 open-loop`, as text and as the sections of a page."""

from typing import Any

import numpy as np

from ...inputs.smoothness import HARMLESS_NOISE, TOO_ROUGH
from ..reports.charts import Curve, chart
from ..reports.markup import Html, Page, bar, grid, legend, note, section, table, tag

COLOURS = {"policy": 1, "hold still": 3, "mean action": 2}
"""Those of the page, by number."""

DRAWN = {"b0": "recorded", "b1": "predicted, from the dot on"}


def ranges(numbers: list[int], most: int = 8) -> str:
    """Numbers of episodes in few characters: 0-249, or 3, 5-7 and 12 more."""
    runs: list[list[int]] = []
    for x in sorted(numbers):
        if runs and x == runs[-1][-1] + 1:
            runs[-1].append(x)
        else:
            runs.append([x])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs[:most]]
    rest = sum(len(run) for run in runs[most:])
    return ", ".join(parts) + (f" and {rest} more" if rest else "")


def short_name(policy: str) -> str:
    """A checkpoint's name without what all paths of checkpoints have in common."""
    parts = [x for x in policy.replace("\\", "/").split("/") if x not in ("", "outputs", "train", "pretrained_model")]
    return "/".join(x for x in parts[-3:] if x != "checkpoints") or policy


def below(content: dict[str, Any]) -> str:
    """In words, what the curves of errors show."""
    errors = content["error by step"]
    over = [
        t + 1 for t, x in enumerate(errors["policy"]) if x >= min(errors["hold still"][t], errors["mean action"][t])
    ]
    steps = len(errors["policy"])
    if not over:
        return "This policy stays below both others at every step, as one that learned does."
    if len(over) == steps:
        return "A policy that learned stays below both others; this one does at no step."
    return f"A policy that learned stays below both others; this one does not at steps {ranges(over)} of {steps}."


def sentence(verdict: str) -> str:
    """A verdict with its subject."""
    return verdict if verdict.startswith("good") else f"This policy {verdict}"


def as_text(content: dict[str, Any]) -> str:
    """What is printed."""
    error = ", ".join(f"{name} {value:.3f}" for name, value in content["error"].items())
    lines = [
        f"{content['policy']} on {content['observations']} observations of {content['dataset']}, episodes "
        f"{ranges(content['episodes'])} ({content['episodes are']})",
        f"error: {error} (in deviations of the actions)",
        "error by image_resize: " + ", ".join(f"{way} {x:.3f}" for way, x in content["error by resizing"].items()),
        f"moves {content['way']:.0%} of the recorded way",
        "roughness, predicted and recorded: "
        + ", ".join(f"{name} {x['sampled']:.3g} {x['recorded']:.3g}" for name, x in content["roughness"].items()),
        *(f"reacts to {name}: {x['of everything']:.1%}" for name, x in content["reactions"].items()),
        "",
        *map(sentence, content["verdicts"]),
    ]
    return "\n".join(lines)


def page(content: dict[str, Any], drawn: dict[str, Any], plots: int) -> Page:
    """The page; `drawn` holds the chunks to draw, as `measure` returns them, of which `plots` episodes are shown."""
    numbers = np.unique(drawn["columns"].episode[drawn["rows"]]).tolist()[:plots]
    facts = (
        f"{content['observations']} observations of {content['dataset']}, episodes {ranges(content['episodes'])}: "
        f"{content['episodes are']}. Policy: {content['policy']}. "
        f"It moves {content['way']:.0%} of the recorded way. Seed {content['seed']}."
    )
    sections = [
        *(note(grade(verdict), sentence(verdict)) for verdict in content["verdicts"]),
        _horizon(content),
        _reactions(content),
        _joints(content),
        _roughness(content),
        *drawn["attention"],
        section("Recorded and predicted", "", legend(DRAWN), *(_episode(drawn, number) for number in numbers)),
    ]
    return Page(f"open-loop: {short_name(content['policy'])}", facts, sections)


def grade(verdict: str) -> str:
    """The look of a verdict: for the policy, against it, or open."""
    return "fine" if verdict.startswith("good") else "warning" if verdict.startswith(("cannot", "rattles")) else "error"


def _horizon(content: dict[str, Any]) -> Html:
    errors = content["error by step"]
    curves = [Curve(np.arange(1, len(y) + 1), np.array(y), f"c{COLOURS[name]}") for name, y in errors.items()]
    text = f"Root mean square over joints, in deviations of the actions in training. {below(content)}"
    drawn = chart(curves, "error", "step of the chunk", 0, max(curve.y.max() for curve in curves))
    return section("Error by step of the chunk", text, legend({f"b{x}": name for name, x in COLOURS.items()}), drawn)


REACTIONS = """How far the chunk moves when one input is exchanged, as part of what a wholly different observation does.
Pictures and states come from another episode. An input counts as ignored below the threshold, the dashed line, and up
to four times that if the error does not grow by the exchange. “Black” and “frozen” are what no camera or arm would
show: a reaction to them alone does not prove that the input is used."""

JUDGED = {"b1": "used", "b2": "ignored", "b3": "not judged"}


def _reactions(content: dict[str, Any]) -> Html:
    found = {name: x["of everything"] for name, x in content["reactions"].items() if name != "everything"}
    widest, bars = max(1.0, *found.values()), []
    for name, x in found.items():
        judged = "b3" if "," in name else "b2" if name in content["ignored"] else "b1"
        bars.append(bar(name, f"{x:.1%}", {judged: x / widest}, mark=content["threshold"] / widest))
    return section("What it reacts to", REACTIONS, legend(JUDGED), *bars)


def _joints(content: dict[str, Any]) -> Html:
    errors = {**content["error by joint"], "all": content["error"]}
    rows = [[joint, *(f"{x[name]:.3f}" for name in COLOURS)] for joint, x in errors.items()]
    return section("Error by joint", "In deviations of the actions in training.", table([["joint", *COLOURS], *rows]))


ROUGHNESS = f"""Root mean square third difference of chunks, in the robot's units per step³: nearly zero for a smooth
motion. A joint that is more than {TOO_ROUGH} times as rough as recorded rattles. A noise of {HARMLESS_NOISE:.0%} of the
joint's deviation is allowed beside what was recorded."""


def _roughness(content: dict[str, Any]) -> Html:
    shown = {"sampled": "predicted", "recorded": "recorded", "times": "times as rough"}
    rows = [[joint, *(f"{x[name]:.3g}" for name in shown)] for joint, x in content["roughness"].items()]
    return section("Roughness by joint", ROUGHNESS, table([["joint", *shown.values()], *rows]))


def _episode(drawn: dict[str, Any], number: int) -> Html:
    """Recorded actions of an episode, and over them each chunk from the frame where it was predicted."""
    columns, chosen = drawn["columns"], np.flatnonzero(drawn["columns"].episode[drawn["rows"]] == number)
    mine = columns.episode == number
    charts = []
    for i, joint in enumerate(drawn["joints"]):
        curves = [Curve(columns.frame[mine], columns.action_ND[mine, i], "c0")]
        for n in chosen:
            steps = np.flatnonzero(drawn["valid"][n])
            begin = columns.frame[drawn["rows"][n]]
            curves.append(Curve(begin + steps, drawn["predicted"][n, steps, i], "c1", dotted=True))
        low, high = columns.action_ND[:, i].min(), columns.action_ND[:, i].max()
        room = 0.1 * (high - low) + 1e-6  # of all episodes, so that a small error looks small
        charts.append(chart(curves, joint, "frame", low - room, high + room))
    return tag("div", tag("h3", f"Episode {number}"), grid(*charts))
