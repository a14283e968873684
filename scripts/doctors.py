"""Comparison of `lerobot-pi0 check` with other programs that search LeRobot datasets for faults.

    pip install --target=outputs/peers lerobot-doctor==0.2.0 lerobot-lint==0.1.1 --no-deps
    python scripts/doctors.py --peers=outputs/peers --clean=outputs/demo/reach_2500 --output=outputs/doctors

The tests' code puts one fault into a good dataset. The fault counts as found if a program prints a message about it (a
word of the fault's subject is in the message) that it does not print for the good dataset. Each message about a good
dataset counts as a false alarm. `messages.json` keeps all messages, so that you can read them.
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


SMALL = re.compile("chunk|horizon|enlarged|shorter than 10 frames")
"""What is rightly said of these datasets because they are small; it is not counted as a false alarm."""


class Fault(NamedTuple):
    """A dataset with one fault: the good dataset it is made from, how it is written, words of the fault's subject."""

    name: str
    good: str
    write: Callable[[Path], Any]
    words: str


def recorded(name: str, words: str, **how: Any) -> Fault:
    """A fault in the demonstrations."""
    good = "a recording, as video" if how.get("video") else "a recording"
    return Fault(name, good, lambda root: test_alarms.build(root, **how), words)


def planted(name: str, key: str, words: str, video: bool = False) -> Fault:
    """A fault in values or images."""
    how, good = test_check.PLANTED[key][0], "a smooth motion, as video" if video else "a smooth motion"
    return Fault(name, good, lambda root: test_check.build(root, video=video, **how), words)


def damaged(name: str, change: Callable[[Path], Any], words: str) -> Fault:
    """A fault in the files."""

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
VIDEOS: dict[str, Any] = {"episodes": 10, "video": True}
ALARMS = {name: how for name, (how, *_) in test_alarms.ALARMS.items()}
info = test_damaged_datasets.change_info

GOOD: dict[str, Callable[[Path], Any]] = {
    "a recording": lambda root: test_alarms.build(root, length=lambda e: 30 + 5 * (e % 3)),
    "a recording, as video": lambda root: test_alarms.build(root, video=True, episodes=10),
    "a smooth motion": test_check.build,
    "a smooth motion, as video": lambda root: test_check.build(root, video=True),
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
    recorded("a camera is black in one episode", "black|dark|bright|degenerate", **VIDEOS, picture=test_alarms.black),
    recorded("a camera is frozen in one episode", "frozen|freeze|same", **VIDEOS, picture=test_alarms.frozen),
    planted("actions in degrees, state in radians", "actions in degrees, state in radians", "degree|unit|scale|range"),
    planted("a joint that never moves", "a constant joint", "constant|never|dead|variance|zero std"),
    planted("an episode without an instruction", "an empty prompt", "instruction|task|prompt|empty"),
    planted("a camera at half the rate", "a camera of half the rate", "repeat|duplicate|frozen|rate", video=True),
    planted("NaN in the state", "NaN", "nan|finite"),
    planted("one value far outside", "an outlier", "outlier|spike|jump|normalised"),
    planted("pictures divided by 255 twice", "images divided by 255 twice", "black|dark|bright|degenerate", video=True),
    damaged("a video is missing", lambda root: (root / VIDEO).unlink(), "missing|not found|no such|load"),
    damaged("a video is a Git LFS pointer", rewrite(VIDEO, lambda x: POINTER), "lfs|pointer|decode|corrupt|video|load"),
    damaged("a video is cut off", rewrite(VIDEO, lambda x: x[: int(0.6 * len(x))]), "video|decode|corrupt|load"),
    damaged("the data are a Git LFS pointer", rewrite(DATA, lambda x: POINTER), "lfs|pointer|parquet|load|read"),
    damaged("instructions are missing", lambda root: (root / DEFAULT_TASKS_PATH).unlink(), "tasks?|instruction|load"),
    damaged("statistics are missing", lambda root: (root / "meta/stats.json").unlink(), "stat"),
    damaged("statistics are of other data", lambda root: test_check.edit_stats(
        root, lambda s: s["action"].update(mean=[5.0] * 6)), "stat"),
    damaged("time stamps are late from a frame on", edited(test_check.late), "time|gap|fps"),
    damaged("another fps than the time stamps", lambda root: info(root, fps=15), "fps|rate"),
    damaged("frames are lost", edited(lambda t: t.drop(index=[20, 21], inplace=True)), "frame|gap|length|index"),
    damaged("more episodes declared than there are", lambda root: info(root, total_episodes=5), "episode"),
    damaged("two episodes' rows are exchanged", edited(lambda t: t.sort_values(
        ["task_index", "index"], inplace=True)), "index|order|row|place|mono"),
    damaged("format 2.1", lambda root: info(root, codebase_version="v2.1"), "v2.1|version|convert|load"),
)  # fmt: skip


def ours(root: Path) -> Messages:
    """Messages of `lerobot-pi0 check`, for a policy that is not trained yet."""
    small = ["--policy.type=pi0", "--policy.paligemma_variant=tiny", "--policy.action_expert_variant=tiny"]
    chunk = ["--policy.chunk_size=8", "--policy.n_action_steps=8", "--dataset.repo_id=me/data", "--json"]
    from lerobot_pi0.tools import main

    printed = run(lambda: main(["check", *small, *chunk, f"--dataset.root={root}"]))
    if not printed.startswith("{"):
        return refused(printed, "Error: ")
    found = json.loads(printed)["findings"]
    return [(x["grade"], f"{x['about']}: {x['message']}") for x in found if x["grade"] != "fine"]


def doctor(root: Path) -> Messages:
    """Messages of lerobot-doctor."""
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
    """Messages of lerobot-lint, without those of the level information."""
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
    """The output of a command, and the errors that it logs."""
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
    """The message of a program that stops: an error if it reports one itself, otherwise a crash."""
    lines = [line.split(begins, 1)[1] for line in printed.splitlines() if begins in line]
    return [("error", line) for line in dict.fromkeys(lines)] or [("crash", printed[-500:])]


def without_numbers(text: str) -> str:
    """A message without its numbers, so that the same message about other numbers is equal."""
    return re.sub(r"(?<![\[_\d.])(?<!oint )[\d.]+", "#", text)  # except in names of joints


def ask(write: Callable[[Path], Any]) -> dict[str, Messages]:
    """The messages of each program about a dataset."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "data"
        write(root)
        return {name: program(root) for name, program in PROGRAMS.items()}


def ask_all(datasets: dict[str, Callable[[Path], Any]], file: Path) -> dict[str, dict[str, Messages]]:
    """The messages of each program about each dataset. They are kept in a file; programs do not run for those in it."""
    kept = json.loads(file.read_text()) if file.exists() else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    for name, write in datasets.items():
        if name not in kept:
            kept[name] = ask(write)
            file.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    return kept


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
    kept = ask_all(GOOD | copies | {fault.name: fault.write for fault in FAULTS}, options.output / "messages.json")
    lines = [f"| fault | {' | '.join(PROGRAMS)} |", "|---|" + "---|" * len(PROGRAMS)]
    for fault in FAULTS:
        cells = [mark(kept[fault.name][x], kept[fault.good][x], fault.words) or "–" for x in PROGRAMS]
        lines.append(f"| {fault.name} | {' | '.join(cells)} |")
    for name in GOOD | copies:
        counts = [str(sum(not SMALL.search(text) for _, text in kept[name][program])) for program in PROGRAMS]
        lines.append(f"| false alarms: {name} | {' | '.join(counts)} |")
    sys.stdout.write("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
