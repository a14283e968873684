"""The report of `lerobot-pi0 open-loop`: text, and one HTML file with its pictures inside."""

import base64
import html
import importlib.util
import io
from typing import Any

import numpy as np

from .. import ToolError

COLOURS = {"policy": "#0072b2", "hold still": "#999999", "mean action": "#d55e00"}
"""Of Okabe and Ito's palette, which colour-blind people can tell apart."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>open-loop: {title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222;
  overflow-wrap: anywhere }}
img {{ max-width: 100% }} .wide {{ overflow-x: auto }} table {{ border-collapse: collapse }}
td, th {{ padding: .2em .8em; text-align: right; white-space: nowrap; overflow-wrap: normal }}
td:first-child, th:first-child {{ text-align: left }} tr {{ border-bottom: 1px solid #ddd }}
.verdict {{ border-left: .4em solid {colour}; background: #f6f6f6; padding: .6em 1em; margin: 1em 0 }}
</style></head><body>
<h1>{title}</h1>
<p>{facts}</p>
<div class="verdict">{verdicts}</div>
<h2>Error by step of the chunk</h2>
<p>Root mean square over joints, in deviations of the actions in training. {below}</p>
{horizon}
<h2>What it reacts to</h2>
<p>How far the chunk moves when one input is exchanged, as part of what a wholly different observation does. The
dashed line is the threshold below which an input counts as ignored (orange), and up to four times that if the error
does not grow by the exchange. Pictures and states come from another episode;
“black” and “frozen” (grey) are what no camera or arm would show: a reaction to them alone does not prove that the
input is used.</p>
{reactions}
<h2>Joints</h2>
{joints}
<h2>Recorded and predicted</h2>
{episodes}
</body></html>
"""


def need_matplotlib() -> None:
    """Raises ToolError where there is no matplotlib, before any time is spent."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ToolError("the report needs matplotlib: pip install 'lerobot_policy_pi0[report]'")


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


def as_text(content: dict[str, Any]) -> str:
    """What is printed."""
    error = ", ".join(f"{name} {value:.3f}" for name, value in content["error"].items())
    lines = [
        f"{content['policy']} on {content['observations']} observations of {content['dataset']}, episodes "
        f"{ranges(content['episodes'])} ({content['episodes are']})",
        f"error: {error} (in deviations of the actions)",
        "error by image_resize: " + ", ".join(f"{way} {x:.3f}" for way, x in content["error by resizing"].items()),
        f"moves {content['way']:.0%} of the recorded way",
        f"rattles (more than 1.5 times as rough as recorded): {', '.join(content['rattling']) or 'no joint'}",
        *(f"reacts to {name}: {x['of everything']:.1%}" for name, x in content["reactions"].items()),
        "",
        *(f"This policy {verdict}" if not verdict.startswith("good") else verdict for verdict in content["verdicts"]),
    ]
    return "\n".join(lines)


def as_html(content: dict[str, Any], drawn: dict[str, Any], plots: int) -> str:
    """The page; `drawn` holds the chunks to draw, as `measure` returns them, of which `plots` episodes are shown."""
    good = content["verdicts"][0].startswith("good")
    facts = (
        f"{content['observations']} observations of {content['dataset']}, episodes {ranges(content['episodes'])}: "
        f"{content['episodes are']}. Policy: {content['policy']}. "
        f"It moves {content['way']:.0%} of the recorded way. Seed {content['seed']}, "
        f"lerobot_policy_pi0 {content['version']}."
    )
    return PAGE.format(
        title=html.escape(short_name(content["policy"])),
        below=html.escape(below(content)),
        facts=html.escape(facts),
        colour="#009e73" if good else "#d55e00",
        verdicts="<br>".join(html.escape(verdict) for verdict in content["verdicts"]),
        horizon=_horizon(content),
        reactions=_reactions(content),
        joints=_joints(content),
        episodes="\n".join(_episode(drawn, number) for number in _numbers(drawn)[:plots]),
    )


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _image(figure: Any, alt: str) -> str:
    """A figure as an <img> that needs no file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _horizon(content: dict[str, Any]) -> str:
    figure, ((axes,),) = _figure(8, 3.2)
    for name, errors in content["error by step"].items():
        axes.plot(range(1, len(errors) + 1), errors, color=COLOURS[name], label=name)
    axes.set(xlabel="step of the chunk", ylabel="error", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return _image(figure, "error by step")


def _reactions(content: dict[str, Any]) -> str:
    found = {name: x["of everything"] for name, x in content["reactions"].items() if name != "everything"}
    names = list(found)[::-1]
    figure, ((axes,),) = _figure(8, 0.8 + 0.35 * len(names))
    judged = {True: "#d55e00", False: "#0072b2"}  # ignored or not; what no robot would show is not judged
    colours = ["#bbbbbb" if "," in name else judged[name in content["ignored"]] for name in names]
    axes.barh(names, [found[name] for name in names], color=colours)
    axes.axvline(content["threshold"], linestyle="--", color="#222222", linewidth=1)
    axes.set(xlabel="part of the reaction to another observation", xlim=(0, None))
    return _image(figure, "reactions")


def _joints(content: dict[str, Any]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("joint", *COLOURS))
    rows = [
        f"<tr><td>{html.escape(joint)}</td>" + "".join(f"<td>{errors[name]:.3f}</td>" for name in COLOURS) + "</tr>"
        for joint, errors in {**content["error by joint"], "all": content["error"]}.items()
    ]
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _numbers(drawn: dict[str, Any]) -> list[int]:
    return np.unique(drawn["columns"].episode[drawn["rows"]]).tolist()


def _episode(drawn: dict[str, Any], number: int) -> str:
    """Recorded actions of an episode, and over them each chunk from the frame where it was predicted."""
    columns, joints = drawn["columns"], drawn["joints"]
    mine = columns.episode == number
    wide = min(3, len(joints))
    figure, axes = _figure(11, 2.2 * -(-len(joints) // wide), -(-len(joints) // wide), wide)
    for i, joint in enumerate(joints):
        plot = axes.flat[i]
        plot.plot(columns.frame[mine], columns.action_ND[mine, i], color="#222222", linewidth=1.5, label="recorded")
        for n in np.flatnonzero(columns.episode[drawn["rows"]] == number):
            steps = np.flatnonzero(drawn["valid"][n])
            start = columns.frame[drawn["rows"][n]]
            plot.plot(start + steps, drawn["predicted"][n, steps, i], color=COLOURS["policy"], linewidth=1, alpha=0.7)
            plot.plot(start, drawn["predicted"][n, 0, i], ".", color=COLOURS["policy"], markersize=4)
        low, high = columns.action_ND[:, i].min(), columns.action_ND[:, i].max()
        room = 0.1 * (high - low) + 1e-6
        plot.set_ylim(low - room, high + room)  # of all episodes, so that a small error looks small
        plot.set_title(joint, fontsize=9)
    for plot in axes.flat[len(joints) :]:
        plot.set_axis_off()
    title = f"Episode {number}: black is recorded, blue what the policy predicts from the dot on"
    return f"<p>{title}</p>{_image(figure, title)}"
