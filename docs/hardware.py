"""Writes the tables of docs/hardware.md: what fits which card, by `lerobot-pi0 plan`, and hours of training.

    python docs/hardware.py

The network is counted at full size on tensors without numbers: minutes, and no GPU.
"""

import logging
from pathlib import Path
from typing import NamedTuple

from lerobot_pi0 import PI0Config
from lerobot_pi0.tools.memory import Load
from lerobot_pi0.tools.plan import GIB, Options, plan

logger = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("hardware.md")
BATCH = 8
LOAD = Load(((480, 640),) * 2, 48)
CARDS = (8, 12, 16, 24, 48, 80)


class Way(NamedTuple):
    """A way of training: a mode of `plan`, and options that save memory."""

    mode: str
    vlm: str = "bfloat16"
    bits: int = 32  # of AdamW's moments

    def options(self) -> dict[str, object]:
        found: dict[str, object] = {"dtype": "bfloat16"}
        if self.vlm != "bfloat16":
            found["vlm_quantization"] = self.vlm
        if self.bits == 8:
            found["optimizer_8bit"] = True
        return found

    def saves(self) -> str:
        """The options beside `dtype`, as a cell of the table."""
        named = [f"`{name}={str(x).lower()}`" for name, x in self.options().items() if name != "dtype"]
        return ", ".join(named) or "–"


WAYS = (
    Way("LoRA, frozen VLM"),
    Way("frozen VLM", bits=8),
    Way("frozen VLM"),
    Way("everything", bits=8),
    Way("everything"),
)
"""From the smallest to the largest."""

TFLOP = {
    "frozen VLM, 1 camera, 10 prompt tokens": 1.33,
    "frozen VLM, 3 cameras, 48 prompt tokens": 3.93,
    "everything, 3 cameras, 48 prompt tokens": 11.6,
}
"""Of a training step with one sample: docs/comparison.md, which has them from `make bench`."""

STEPS = 20_000
RATES = (25, 50, 100, 200, 400)
"""TFLOP/s that a card sustains."""


def count(way: Way) -> dict[str, object]:
    """What `plan` counts for a way of training."""
    options = Options(batch_size=BATCH, cards_gb=list(CARDS))
    config = PI0Config(device="cpu", **way.options())
    return plan(options, config, way.mode, LOAD)


def row(way: Way, counted: dict) -> str:
    """A line of the table of memory."""
    batches = [str(counted["largest batch"][f"{card}"] or "–") for card in CARDS]
    return f"| {way.mode} | {way.saves()} | {counted['peak'] / GIB:.1f} GiB | {' | '.join(batches)} |"


def memory_table(rows: list[str]) -> str:
    head = " | ".join(f"{card} GB" for card in CARDS)
    return "\n".join(
        [f"| mode | with `--policy.…` | peak, batch {BATCH} | {head} |", "|---|---|---|" + "---|" * len(CARDS), *rows]
    )


def hours_table() -> str:
    """Hours of `STEPS` steps, by what is trained and the rate that a card sustains."""
    head = " | ".join(f"{rate} TFLOP/s" for rate in RATES)
    lines = [f"| {STEPS:,} steps of batch {BATCH} | {head} |".replace(",", " "), "|---|" + "---|" * len(RATES)]
    for what, each in TFLOP.items():
        hours = [STEPS * BATCH * each / rate / 3600 for rate in RATES]
        lines.append(f"| {what} | {' | '.join(f'{x:.1f} h' for x in hours)} |")
    return "\n".join(lines)


def replace(text: str, name: str, table: str) -> str:
    """The page with another table between the comments that carry its name."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{PAGE} has no place for the table {name!r}")
    return before + begin + table + end + after


def main() -> None:
    """Count, and write the tables into the page."""
    rows = []
    for way in WAYS:
        rows.append(row(way, count(way)))
        logger.info("%s", rows[-1])
    text = replace(PAGE.read_text(), "memory", memory_table(rows))
    PAGE.write_text(replace(text, "hours", hours_table()))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
