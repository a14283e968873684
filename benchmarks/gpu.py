"""Unattended benchmark on a GPU: correctness, speed and memory of π₀, compared with the built-in.

    python benchmarks/gpu.py                          # `make bench-gpu`: everything, at full size
    python benchmarks/gpu.py --seconds 600 --parts card right chunk
    python benchmarks/gpu.py --device cpu --size small     # a rehearsal

The most informative parts come first. Each line is written to `gpu.jsonl` as soon as it is known; at the end `gpu.json`
and `gpu.md` are written. A part that will probably not fit into the time that is left is skipped. A part for which the
time runs out ends after its next line. An error becomes a line too.

Weights are random; the built-in and ours hold the same numbers.
"""

import argparse
import json
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpu_bench import Bench, Row
from gpu_parts import PARTS
from presets import SIZES


def markdown(rows: Sequence[Row], title: str) -> str:
    """A table for each part."""
    lines = [f"# {title}", ""]
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == part]
        keys = list(dict.fromkeys(key for row in own for key in row if key != "part"))
        lines += [f"## {part}", "", "| " + " | ".join(keys) + " |", "|---" * len(keys) + "|"]
        lines += ["| " + " | ".join(_cell(row.get(key, "")) for key in keys) + " |" for row in own] + [""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")


def run_part(part: str, bench: Bench, time_left: Callable[[], float], write: Callable[[str, Row], None]) -> None:
    """Write the lines of a part as they come, until the time is up."""
    run, needed = PARTS[part]
    if (left := time_left()) < (needed if bench.full else 1):
        write(part, {"left out": f"needs about {needed:.0f} s, and {left:.0f} are left"})
        return
    try:
        for row in run(bench):
            write(part, row)
            if time_left() < 0:
                write(part, {"left out": "the rest: the time is up"})
                return
    except Exception as error:  # measure the other parts all the same
        write(part, {"error": repr(error), "where": traceback.format_exc().splitlines()[-3].strip()})


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="(default: cuda)")
    parser.add_argument("--size", choices=SIZES, default="full", help="of the networks (default: full)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    parser.add_argument("--seconds", type=float, default=3600, help="time for all parts (default: 3600)")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each line (default: 20)")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"), help="folder for the results")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    bench, begun, rows = Bench(options.device, options.size, options.repeats), time.monotonic(), []
    with (options.out / "gpu.jsonl").open("w") as log:

        def write(part: str, row: Row) -> None:
            rows.append({"part": part, **row})
            log.write(json.dumps(rows[-1], default=str) + "\n")
            log.flush()
            print(*(f"{key}={_cell(value)}" for key, value in rows[-1].items()), flush=True)

        for part in options.parts:
            run_part(part, bench, lambda: options.seconds - (time.monotonic() - begun), write)
            bench.free()
    (options.out / "gpu.json").write_text(json.dumps(rows, indent=1, default=str))
    title = next((row["name"] for row in rows if row["part"] == "card" and "name" in row), options.device)
    (options.out / "gpu.md").write_text(markdown(rows, f"{title}, {options.size} size"))
    return rows


if __name__ == "__main__":
    main()
