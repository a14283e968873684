"""Writes docs/options.md from the declarations of the options: PI0Config's fields and the comments above them.

python docs/options.py
"""

import re
from pathlib import Path

from lerobot_pi0.configuration_pi0 import OPTIONS, RULES, PI0Config, choices, help_of
from lerobot_pi0.network.sizes import EXPERT_PRESETS, PALIGEMMA_PRESETS

DOCS = Path(__file__).parent
PAGE = DOCS / "options.md"
EXPLAINED_IN = ("training", "control", "checkpoints", "troubleshooting", "learning", "attention")
OVERRIDDEN = ("train_expert_only", "tokenizer_max_length", "image_resolution")
"""LeRobot's options that may stay unset here, with a default that depends on the rest."""

RECIPES = ("openpi", "small")

TOP = """\
# Options of this plugin

`python docs/options.py` writes this page from the code (`lerobot_pi0/configuration_pi0.py`), and a test fails if it is
out of date.

Write each option as `--policy.NAME=VALUE`, in `lerobot-train`, `lerobot-eval`, `lerobot-rollout` and `lerobot-pi0`. An
option that you do not set takes the checkpoint's value, or else the default. Options marked **run** belong to one
training run: a checkpoint records them, but the next run that starts from it does not inherit them. `recipe=openpi`
and `recipe=small` change the defaults in the columns with these names.

All other options of `--policy.type=pi0` are LeRobot's, with LeRobot's meaning: `lerobot-train --policy.type=pi0 --help`
lists them.
"""


def shown(value: object) -> str:
    """A value as it is typed on the command line; a dash for none."""
    if value is None:
        return "–"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def explanation(name: str) -> str:
    """The help text without what another column says, the values that are allowed, and the pages with more."""
    text = re.sub(r" None means \S+\.(?= |$)", "", help_of(name))
    if not all(x in text for x in choices(name)):
        text += f" One of {', '.join(f'`{x}`' for x in choices(name))}."
    elif name in RULES and not choices(name):
        text += f" {RULES[name].says[0].upper()}{RULES[name].says[1:]}."
    pages = [page for page in EXPLAINED_IN if re.search(rf"`(--policy\.)?{name}\b", (DOCS / f"{page}.md").read_text())]
    return " ".join([text, *(f"[{page}]({page}.md)" for page in pages[:2])])


def rows() -> list[str]:
    """A line for each option that only this plugin has."""
    found = []
    for name, option in OPTIONS.items():
        run = "run" if option.of_the_run else ""
        recipes = [shown(option.recipes[x]) if x in option.recipes else "" for x in RECIPES]
        found.append(f"| {' | '.join([f'`{name}`', shown(option.default), *recipes, run, explanation(name)])} |")
    return found


def page() -> str:
    """The whole page."""
    lines = [
        TOP,
        f"| option | default | {' | '.join(RECIPES)} | run | what it does, and where to read more |",
        "|---|---|---|---|---|---|",
        *rows(),
        "",
    ]
    lines += ["## LeRobot's options with another default", "", "| option | |", "|---|---|"]
    lines += [f"| `{name}` | {explanation(name)} |" for name in OVERRIDDEN]
    lines += ["", "## Sizes", "", "| option | values |", "|---|---|"]
    for name, presets in (("paligemma_variant", PALIGEMMA_PRESETS), ("action_expert_variant", EXPERT_PRESETS)):
        values = ", ".join(f"`{preset}`" for preset in presets)
        lines.append(f"| `{name}` | {values}; by default `{getattr(PI0Config, name)}` |")
    lines += [
        "",
        "`tiny` is a network of one million parameters that trains on a CPU. Use it for both options.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
