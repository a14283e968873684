"""The report of `lerobot-pi0 plan`, as text and as the sections of a page."""

from collections.abc import Mapping
from typing import Any

from . import cached_plan
from .reports.markup import Html, Page, bar, legend, section, table, tag

GIB = 2**30
NAMES = ("weights", "gradients", "optimizer", "activations", "peak")
LEFT = "with {:g} GiB of the card left for CUDA and kernels"


def facts(content: Mapping[str, Any]) -> str:
    """What is counted, in a line."""
    cameras = ", ".join(f"{height} x {width}" for height, width in content["cameras"])
    return (
        f"π₀ {content['policy']}, {content['dtype']}, batch {content['batch_size']}, "
        f"{len(content['cameras'])} cameras ({cameras}), {content['prompt_tokens']} prompt tokens, "
        f"flow_samples={content['flow_samples']}"
        + (f", VLM in {content['vlm_quantization']}" if content["vlm_quantization"] else "")
        + (", gradient checkpointing" if content["gradient_checkpointing"] else "")
    )


def memory(content: Mapping[str, Any]) -> list[list[str]]:
    """A line for each mode under a line of names, in GiB."""
    found = [["GiB", "trained", *NAMES, "peak in"]]
    for mode, x in content["modes"].items():
        found.append([mode, f"{x['trained'] / 1e6:.1f} M", *(f"{x[name] / GIB:.2f}" for name in NAMES), x["peak in"]])
    return found


def batches(content: Mapping[str, Any]) -> list[list[str]]:
    """A line for each mode under a line of cards: the largest batch."""
    modes = list(content["modes"].values())
    found = [[f"{card} GB" for card in modes[0]["largest batch"]] if modes else []]
    return found + [[str(batch or "-") for batch in x["largest batch"].values()] for x in modes]


def notes(content: Mapping[str, Any]) -> list[str]:
    """What caching contexts costs and saves, if a mode needs it."""
    return cached_plan.as_lines(content["contexts"]) if any("cached" in mode for mode in content["modes"]) else []


def as_text(content: Mapping[str, Any]) -> str:
    """What is printed: the counts as a table."""
    lines = [facts(content), ""]
    rows = [a + b for a, b in zip(memory(content), batches(content), strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines += ["", f"under each card: the largest batch, {LEFT.format(content['reserve_gb'])}"]
    if found := notes(content):
        lines += ["", *found]
    return "\n".join(lines)


def page(content: Mapping[str, Any]) -> Page:
    """The page: bars to compare modes, then all numbers."""
    cards = [[mode, *row] for mode, row in zip(["", *content["modes"]], batches(content), strict=True)]
    sections = [
        section("The peak of a training step", COUNTED, legend(PARTS), *_bars(content)),
        section("Cards", f"The largest batch, {LEFT.format(content['reserve_gb'])}.", table(cards)),
        section("All numbers", "", table(memory(content))),
    ]
    if cached := notes(content):
        sections.append(section("Cached contexts", "", *(tag("p", line) for line in cached)))
    return Page("plan: memory of training", f"{facts(content)}.", sections)


COUNTED = """Counted with the real network, on tensors that have shapes and no numbers. Not counted: scratch space of
kernels, what the allocator leaves empty, and CUDA itself."""

PARTS = {"b1": "weights", "b2": "optimizer", "b3": "gradients and activations"}


def _bars(content: Mapping[str, Any]) -> list[Html]:
    """A bar for each mode, and in words the smallest card that takes the batch."""
    most = max((x["peak"] for x in content["modes"].values()), default=1)
    found = []
    for mode, x in content["modes"].items():
        cards = [float(card) for card, batch in x["largest batch"].items() if batch >= content["batch_size"]]
        fits = f"a card of {min(cards):g} GB" if cards else "none of the cards"
        parts = {"b1": x["weights"], "b2": x["optimizer"], "b3": x["peak"] - x["weights"] - x["optimizer"]}
        value = f"{x['peak'] / GIB:.1f} GiB: {fits}"
        found.append(bar(mode, value, {name: part / most for name, part in parts.items()}))
    return found
