"""`lerobot-pi0 check` beside other programs that look for faults in LeRobot datasets: who finds what, and false alarms.

    pip install --target=outputs/peers lerobot-doctor==0.2.0 lerobot-lint==0.1.1 --no-deps
    python scripts/doctors.py --peers=outputs/peers --clean outputs/demo/reach_2500 --output=outputs/doctors

Each fault is planted alone into a good dataset, by the code of the tests. It counts as found if a program says
something about it (a word of the fault's subject is in the message) that it does not say of the good dataset. What a
program says of good datasets is a false alarm, each message counted. `messages.json` keeps all of them, to be read.
"""

import argparse
import contextlib
import io
import json
import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest  # noqa: E402, F401  which sets the process up as the tests need it
from lerobot.datasets.utils import DEFAULT_TASKS_PATH  # noqa: E402
from tools import test_alarms, test_check, test_damaged_datasets  # noqa: E402

Messages = list[tuple[str, str]]
"""Of a program on a dataset: grade (error or warning) and text."""


class Fault(NamedTuple):
    """A dataset with one fault: which good one it is made of, how it is written, and words of its subject."""

    name: str
    good: str
    write: Callable[[Path], Any]
    words: str


def recorded(name: str, words: str, **how: Any) -> Fault:
    """A fault of the demonstrations."""
    return Fault(name, "a recording", lambda root: test_alarms.build(root, **how), words)


def planted(name: str, key: str, words: str) -> Fault:
    """A fault of values or pictures."""
    how = test_check.PLANTED[key][0]
    return Fault(name, "a smooth motion", lambda root: test_check.build(root, **how), words)


def damaged(name: str, change: Callable[[Path], Any], words: str) -> Fault:
    """A fault of the files."""

    def write(root: Path) -> None:
        test_damaged_datasets.build(root)
        change(root)

    return Fault(name, "one with videos", write, words)


def rewrite(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda root: (root / file).write_bytes(change((root / file).read_bytes()))


def edited(change: Callable) -> Callable[[Path], None]:
    return lambda root: test_check.edit_frames(root, change)


VIDEO, DATA = test_damaged_datasets.VIDEO, test_damaged_datasets.DATA
POINTER = test_damaged_datasets.POINTER.encode()
ALARMS = {name: how for name, (how, *_) in test_alarms.ALARMS.items()}
info = test_damaged_datasets.change_info

GOOD: dict[str, Callable[[Path], Any]] = {
    "a recording": lambda root: test_alarms.build(root, length=lambda e: 30 + 5 * (e % 3)),
    "a smooth motion": test_check.build,
    "one with videos": test_damaged_datasets.build,
}

FAULTS = (
    recorded("the arm stands still in most frames", "still|idle|static|frozen|stuck", **ALARMS["it stands still"]),
    recorded("the leader hangs: one action repeated", "repeat|frozen|stuck|stale", **ALARMS["the leader hangs"]),
    recorded("a joint jumps for one frame", "jump|spike|disconti|velocity|outlier", **ALARMS["a jump and back"]),
    recorded("a joint stays at its limit", "limit|saturat|clip", **ALARMS["a joint at its limit"]),
    recorded("an episode of ten times the length", "long|length|duration", **ALARMS["a long episode"]),
    recorded("an episode of a quarter of the length", "short|length|duration", **ALARMS["a short episode"]),
    recorded("the last episodes are elsewhere", "drift|shift|elsewhere", **ALARMS["a drift"]),
    recorded("a joint that only has noise", "constant|never|dead|variance|still|joint_2", **ALARMS["a joint of noise"]),
    recorded("a camera is black in one episode", "black|dark|bright", episodes=10, picture=test_alarms.black),
    recorded("a camera is frozen in one episode", "frozen|freeze|same", episodes=10, picture=test_alarms.frozen),
    planted("actions in degrees, state in radians", "actions in degrees, state in radians", "degree|unit|scale|range"),
    planted("a joint that never moves", "a constant joint", "constant|never|dead|variance|zero std"),
    planted("an episode without an instruction", "an empty prompt", "instruction|task|prompt|empty"),
    planted("a camera at half the rate", "a camera of half the rate", "repeat|duplicate|frozen|rate"),
    planted("NaN in the state", "NaN", "nan|finite"),
    planted("one value far outside", "an outlier", "outlier|spike|jump|normalised"),
    planted("pictures divided by 255 twice", "images divided by 255 twice", "black|dark|range|bright"),
    damaged("a video is missing", lambda root: (root / VIDEO).unlink(), "missing|not found|no such"),
    damaged("a video is a Git LFS pointer", rewrite(VIDEO, lambda x: POINTER), "lfs|pointer|decode|corrupt|video"),
    damaged("a video is cut off", rewrite(VIDEO, lambda x: x[: int(0.6 * len(x))]), "video|decode|corrupt|truncat"),
    damaged("the data are a Git LFS pointer", rewrite(DATA, lambda x: POINTER), "lfs|pointer|parquet|load|read"),
    damaged("instructions are missing", lambda root: (root / DEFAULT_TASKS_PATH).unlink(), "tasks|instruction"),
    damaged("statistics are missing", lambda root: (root / "meta/stats.json").unlink(), "stat"),
    damaged("statistics are of other data", lambda root: test_check.edit_stats(
        root, lambda s: s["action"].update(mean=[5.0] * 6)), "stat"),
    damaged("time stamps are late from a frame on", edited(test_check.late), "time|gap|fps"),
    damaged("another fps than the time stamps", lambda root: info(root, fps=15), "fps|rate"),
    damaged("frames are lost", edited(lambda t: t.drop(index=[20, 21], inplace=True)), "frame|gap|length|index"),
    damaged("more episodes declared than there are", lambda root: info(root, total_episodes=5), "episode"),
    damaged("two episodes' rows are exchanged", edited(lambda t: t.sort_values(
        ["task_index", "index"], inplace=True)), "index|order|row|place|mono"),
    damaged("format 2.1", lambda root: info(root, codebase_version="v2.1"), "v2.1|version|convert"),
)  # fmt: skip


def ours(root: Path) -> Messages:
    """What `lerobot-pi0 check` says, of a policy that is yet to be trained."""
    small = ["--policy.type=pi0", "--policy.paligemma_variant=tiny", "--policy.action_expert_variant=tiny"]
    chunk = ["--policy.chunk_size=8", "--policy.n_action_steps=8", "--dataset.repo_id=me/data", "--json"]
    from lerobot_pi0.tools import main

    printed = run(lambda: main(["check", *small, *chunk, f"--dataset.root={root}"]))
    if not printed.startswith("{"):
        return refused(printed, "Error: ")
    found = json.loads(printed)["findings"]
    return [(x["grade"], f"{x['about']}: {x['message']}") for x in found if x["grade"] != "fine"]


def doctor(root: Path) -> Messages:
    """What lerobot-doctor says."""
    from lerobot_doctor.cli import main

    printed, grades = run(lambda: main(["check", str(root), "--json"])), {"WARN": "warning", "FAIL": "error"}
    if not printed.startswith("{"):
        return refused(printed, "Error loading dataset: ")
    return [
        (grades[x["severity"]], f"{check['name']}: {x['message']}")
        for check in json.loads(printed)["checks"]
        for x in check["messages"]
        if x["severity"] in grades
    ]


def lint(root: Path) -> Messages:
    """What lerobot-lint says; what it calls information is left out."""
    from lerobot_lint.cli import app

    file = root.with_suffix(".json")
    file.unlink(missing_ok=True)
    printed = run(lambda: app(["check", str(root), f"--json={file}"]))
    if not file.exists():
        return refused(printed, "Could not load dataset: ")
    found = json.loads(file.read_text())["findings"]
    return [(x["severity"], f"{x['check']}: {x['message']}") for x in found if x["severity"] != "info"]


PROGRAMS = {"`lerobot-pi0 check`": ours, "lerobot-doctor": doctor, "lerobot-lint": lint}


def run(command: Callable[[], Any]) -> str:
    """What a command prints, and what it logs as an error."""
    printed, handler = io.StringIO(), logging.StreamHandler(errors := io.StringIO())
    handler.setLevel(logging.ERROR)
    logging.getLogger("lerobot_pi0").addHandler(handler)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            command()
    except SystemExit:
        pass
    except Exception as error:  # a crash is an answer too
        printed.write(f"crashed unexpectedly: {error!r}")
    finally:
        logging.getLogger("lerobot_pi0").removeHandler(handler)
    text = printed.getvalue()
    return text[text.find("{\n") :] if "{\n" in text else errors.getvalue() + text


def refused(printed: str, begins: str) -> Messages:
    """Of a program that stops: an error where it says so in its own words, else a crash."""
    lines = [line for line in printed.splitlines() if begins in line]
    return [("error", line) for line in lines] or [("crash", printed[-500:])]


def without_numbers(text: str) -> str:
    """A message by which the same one about other numbers is known again."""
    return re.sub(r"[\d.]+", "#", text)


def ask(write: Callable[[Path], Any]) -> dict[str, Messages]:
    """What each program says of a dataset."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "data"
        write(root)
        return {name: program(root) for name, program in PROGRAMS.items()}


def mark(said: Messages, of_good: Messages, words: str) -> str:
    """One cell of the table."""
    known = {without_numbers(text) for _, text in of_good}
    new = [(grade, text) for grade, text in said if without_numbers(text) not in known]
    grades = {grade for grade, text in new if re.search(words, text, re.IGNORECASE)}
    return next((grade for grade in ("error", "warning", "crash") if grade in grades), "")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="folder that pip installed the others into")
    parser.add_argument("--clean", type=Path, nargs="*", default=[], help="more datasets without faults")
    parser.add_argument("--output", type=Path, default=Path("outputs/doctors"), help="folder for table and messages")
    options = parser.parse_args()
    sys.path.append(str(options.peers))
    copies = {root.name: (lambda place, root=root: shutil.copytree(root, place)) for root in options.clean}
    kept = {name: ask(write) for name, write in (GOOD | copies).items()}
    lines = [f"| fault | {' | '.join(PROGRAMS)} |", "|---|" + "---|" * len(PROGRAMS)]
    for fault in FAULTS:
        kept[fault.name] = said = ask(fault.write)
        cells = [mark(said[name], kept[fault.good][name], fault.words) or "–" for name in PROGRAMS]
        lines.append(f"| {fault.name} | {' | '.join(cells)} |")
    for name in GOOD | copies:
        counts = [str(len(kept[name][program])) for program in PROGRAMS]
        lines.append(f"| false alarms: {name} | {' | '.join(counts)} |")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "messages.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    (options.output / "table.md").write_text("\n".join(lines) + "\n")
    sys.stdout.write((options.output / "table.md").read_text())


if __name__ == "__main__":
    main()
