"""Checks of the pages: commands parse, and run if they can; links and names exist; quoted messages are real.

Commands are checked in a folder in which `you/pi0_cubes` is a policy and `you/cubes` a dataset, so that LeRobot finds
there what it would otherwise fetch from the Hub.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import io
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import NamedTuple, get_type_hints

import draccus
import pytest
import torch
from conftest import stats, tiny_config, write_dataset
from lerobot.configs import parser
from lerobot.utils.import_utils import register_third_party_plugins

from lerobot_pi0 import PI0Policy, make_pi0_pre_post_processors, tools

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "examples/virtual_so100/README.md"])
NEEDS = "# needs "
"""A block whose first line begins with this needs more than this machine has: it is parsed but not run."""

ELSEWHERE = {
    "pip install": "tests/test_packaging.py::test_wheel",
    "make setup": ".ci/run",
    "make lint": ".ci/run",
    "make test": ".ci/run",
    "make finish": "tests/test_finish_line.py::test_the_finish_line",
    "make bench": "tests/test_bench.py::test_accounting",
    "make demo": "tests/test_examples.py::test_the_demo",
    "make so100": "tests/virtual_so100/test_so100.py::test_the_whole_way",
    "python benchmarks/bench.py": "tests/test_bench.py::test_accounting",
    "python docs/architecture.py": "tests/test_examples.py::test_the_picture",
    "python docs/options.py": "tests/test_pages.py::test_the_page_of_options",
    "python docs/hardware.py": "tests/test_pages.py::test_the_memory_of_cards",
    "python -m lerobot_env_virtual_so100.record": "tests/virtual_so100/test_virtual_so100.py::test_dataset_reloads",
    "python -m lerobot_env_virtual_so100.score": "tests/test_examples.py::test_the_demo",
    "python -m lerobot_env_virtual_so100.two_instructions": (
        "tests/virtual_so100/test_two_instructions.py::test_the_picture"
    ),
    "python -m lerobot_env_virtual_so100.cell": (
        "tests/virtual_so100/test_cell.py::test_scenes_change_before_anybody_looks"
    ),
    "lerobot-train": "tests/test_registration.py::test_the_commands_run_ours",
    "lerobot-eval": "tests/test_registration.py::test_the_commands_run_ours",
    "lerobot-edit-dataset": "tests/inputs/test_relative.py::test_the_command_makes_what_is_wanted",
    "lerobot-pi0 plan": "tests/tools/test_plan.py::test_the_command",
    "lerobot-pi0 check": "tests/tools/test_check.py::test_memory",
    "lerobot-pi0 serve": "tests/tools/test_serve.py::test_the_command",
}  # fmt: skip
"""Where commands are run that need nothing special, but that `test_commands_run` does not run."""

FOREIGN = {"git", "cd", "ssh", "hf", "pip", "sudo", "export"}
LAUNCHERS = ("accelerate ", "torchrun ")
COMMANDS = {
    name: f"lerobot.scripts.{name.replace('-', '_')}"
    for name in (
        "lerobot-calibrate", "lerobot-edit-dataset", "lerobot-eval", "lerobot-record", "lerobot-replay",
        "lerobot-rollout", "lerobot-teleoperate", "lerobot-train",
    )
}  # fmt: skip
BARE = {"lerobot-find-port", "lerobot-find-cameras", "lerobot-info"}
ANY_VALUE = {"…", "..."}


class Command(NamedTuple):
    """A command of a page."""

    page: str
    words: list[str]
    needs: str  # what the block says that it needs; empty if nothing

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def commands_of(page: str, text: str) -> list[Command]:
    """Commands of the fenced `sh` blocks of a page."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        needs = block.splitlines()[0].removeprefix("# ") if block.startswith(NEEDS) else ""
        for line in block.replace("\\\n", " ").splitlines():
            if words := [word for word in shlex.split(line, comments=True) if word not in ANY_VALUE]:
                found.append(Command(page, words, needs))
    return found


COMMANDS_OF_PAGES = [x for page in PAGES for x in commands_of(str(page.relative_to(ROOT)), page.read_text())]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with the policies and datasets that the pages name."""
    root = tmp_path_factory.mktemp("world")
    write_dataset(root / "you/cubes", episodes=4, frames=60, cameras=["observation.images.front"])
    torch.manual_seed(0)
    config = tiny_config(["observation.images.front"])
    config.action_feature_names = [f"joint_{i}" for i in range(6)]
    policy = PI0Policy(config)
    for place in ("you/pi0_cubes", "POLICY", "CHECKPOINT", "outputs/train/my_run/checkpoints/last/pretrained_model"):
        policy.save_pretrained(root / place)
        for pipeline in make_pi0_pre_post_processors(policy.config, stats(cameras=["observation.images.front"])):
            pipeline.save_pretrained(root / place)
    for name in ("you", "lerobot"):
        (root / name).mkdir(exist_ok=True)
        (root / name / "pi0_base").symlink_to(root / "POLICY")
    return root


@pytest.fixture
def there(world, monkeypatch) -> Path:
    """Make that folder the working directory, with its datasets where LeRobot looks for them."""
    monkeypatch.chdir(world)
    for module in [
        m for name, m in sys.modules.items() if name.startswith("lerobot.") and hasattr(m, "HF_LEROBOT_HOME")
    ]:
        monkeypatch.setattr(module, "HF_LEROBOT_HOME", world)
    return world


@functools.cache
def config_class(module: str) -> type:
    """The dataclass whose fields are the options of a command."""
    register_third_party_plugins()
    for thing in vars(importlib.import_module(module)).values():
        if inspect.isfunction(thing) and hasattr(thing, "__wrapped__") and thing.__module__ == module:
            hints = get_type_hints(inspect.unwrap(thing))
            first = next(iter(inspect.signature(inspect.unwrap(thing)).parameters), None)
            if dataclasses.is_dataclass(hints.get(first)):
                return hints[first]
    raise AssertionError(f"{module} has no command")


def parse(words: list[str], monkeypatch) -> None:
    """Let a command's own parser read its options; its errors are raised."""
    if words[0] == "accelerate":  # its own options, then $(which lerobot-train) and that one's
        words = ["lerobot-train", *words[words.index("lerobot-train)") + 1 :]]
    name, *args = words
    monkeypatch.setattr(sys, "argv", words)
    if name == "lerobot-pi0":
        module = importlib.import_module(f"lerobot_pi0.tools.{args[0].replace('-', '_')}")
        tools.parse(module.Options, args[1:], prog="lerobot-pi0")
    elif name in COMMANDS:
        parse_as_lerobot(config_class(COMMANDS[name]))
    elif name == "python" and args[0] == "-m":
        draccus.parse(config_class(args[1]), args=args[2:])
    elif name == "python" and args[0].startswith("examples/"):
        draccus.parse(runpy.run_path(str(ROOT / args[0]))["Options"], args=args[1:])
    elif name == "python":
        assert (ROOT / args[0]).is_file()
        assert {x.split("=")[0] for x in args[1:]} <= argparse_options(ROOT / args[0])
    elif name == "make":
        parse_make(args)
    elif name in BARE:
        importlib.import_module(f"lerobot.scripts.{name.replace('-', '_')}")
    else:
        assert name in FOREIGN, f"{name} is no command that these pages may name"


def parse_as_lerobot(options: type) -> None:
    """Parse options as LeRobot does, from the command line to a config, including `--policy.path`."""

    def command(cfg):
        return cfg

    command.__annotations__ = {"cfg": options}
    cfg = parser.wrap()(command)()
    if hasattr(cfg, "_resolve_pretrained_from_cli"):
        cfg._resolve_pretrained_from_cli()


def argparse_options(file: Path) -> set[str]:
    return set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', file.read_text()))


def parse_make(args: list[str]) -> None:
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for arg in args:
        assert arg.startswith(("ARGS=", "LEROBOT=")) or arg in targets, f"make has no target {arg}"
    options = [word for arg in args if arg.startswith("ARGS=") for word in shlex.split(arg.removeprefix("ARGS="))]
    if "bench" in args:
        assert {x for x in options if x.startswith("--")} <= argparse_options(ROOT / "benchmarks/bench.py")
    elif args[0] in ("demo", "so100") and options != ["--help"]:
        draccus.parse(config_class(f"lerobot_env_virtual_so100.{args[0]}"), args=options)


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in PAGES])
def test_commands_parse(there, monkeypatch, page):
    """Catches an option that is misspelt or was renamed, or whose value has another type than on the page."""
    for command in COMMANDS_OF_PAGES:
        if command.page == page:
            try:
                parse(command.words, monkeypatch)
            except (Exception, SystemExit) as error:
                pytest.fail(f"{command}\n{type(error).__name__}: {error}")


@pytest.mark.parametrize(
    ("planted", "mistake"),
    [
        ("lerobot-train --policy.type=pi0 --policy.train_expert_onyl=true --dataset.repo_id=you/cubes", "onyl"),
        ("lerobot-train --policy.path=you/pi0_cubes --policy.flow_sample=2 --dataset.repo_id=you/cubes", "flow_sample"),
        ("lerobot-train --policy.type=pi0 --policy.solver=rk4 --dataset.repo_id=you/cubes", "PI0Config"),
        ("lerobot-rollout --policy.path=you/pi0_cubes --robot.type=so100_follower --robot.prot=y", "prot"),
        ("lerobot-pi0 check --policy.type=pi0 --dataset.repo_ids=you/cubes", "repo_ids"),
        ("lerobot-pi0 shwo --source=you/pi0_cubes", "shwo"),
        ("python examples/push.py --policy=POLICY --repo_id=you/x --privat=true", "privat"),
        ("make demonstration", "demonstration"),
        ("make bench ARGS='--sizes full'", "sizes"),
        ("lerobot-trian --policy.type=pi0", "trian"),
    ],
)
def test_a_planted_mistake_is_found(there, monkeypatch, capsys, planted, mistake):
    """Catches checks of the pages that find no mistake, or fail for another reason than the mistake."""
    (command,) = commands_of("planted", f"```sh\n{planted}\n```\n")
    with pytest.raises((Exception, SystemExit)) as error:
        parse(command.words, monkeypatch)
    assert mistake in f"{error.value} {error.value.__cause__} {capsys.readouterr().err}"


def test_every_command_is_run_or_says_what_it_needs():
    """Catches a command that no test runs, in a block that does not say why."""
    for command in COMMANDS_OF_PAGES:
        line = " ".join(command.words)
        if not command.needs and not runs_here(command):
            by = [test for prefix, test in ELSEWHERE.items() if line.startswith(prefix)]
            assert by, f"{command}: run it in a test, or begin its block with {NEEDS!r}"
    for test in set(ELSEWHERE.values()):
        assert named_test(*test.split("::")), f"there is no {test}"


def runs_here(command: Command) -> bool:
    """Commands that `test_commands_run` runs: the diagnosing verbs, and the examples that need no Hub."""
    verb = command.words[:2]
    counts = any(word.startswith("--card_gb") for word in command.words)  # at full size: minutes
    return not (command.needs or counts) and (
        (verb[0] == "lerobot-pi0" and verb[1] in ("show", "check", "open-loop"))
        or verb == ["python", "examples/load_and_act.py"]
    )


@pytest.mark.parametrize(
    "line", sorted({shlex.join(x.words) for x in COMMANDS_OF_PAGES if runs_here(x)}), ids=lambda line: line[:60]
)
def test_commands_run(there, monkeypatch, line):
    """Catches a command that parses but fails when it is run as on the page, with a small policy and dataset."""
    words = shlex.split(line)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if words[0] == "lerobot-pi0":
            status = tools.main(words[1:])
            assert status in (0, 1 if words[1] == "check" else 0)  # random data deserve complaints
        else:
            monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    assert out.getvalue().strip()


# --- text ---------------------------------------------------------------------------------------------------


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes from a page's headings."""
    titles = re.findall(r"^#+ (.*)", prose(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@functools.cache
def named_test(file: str, function: str | None = None) -> bool:
    """Whether there is such a file, and such a test in it."""
    path = ROOT / file
    return path.is_file() and (function is None or f"def {function}(" in path.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Catches a link to a page, a picture or a heading that was moved or renamed."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        path, _, heading = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not heading or heading in anchors(linked), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_and_tests_exist(page):
    """Catches a page that names a file or a test which was moved, renamed or never written."""
    last = ""
    for span in re.findall(r"`([^`\n]+)`", prose(page.read_text())):
        match = re.fullmatch(r"(?:tests/)?((?:\w+/)?test_\w+\.py)?(?:::(\w+))?", span)
        if match and (match[1] or match[2]):
            last = match[1] or last
            assert named_test(f"tests/{last}", match[2]), f"{page.name} names {span}"
        elif re.fullmatch(r"(lerobot_pi0|tests|docs|benchmarks|examples|scripts|\.ci)/[\w./]*", span):
            assert (ROOT / span).exists(), f"{page.name} names {span}"


@functools.cache
def known_options() -> set[str]:
    """Every option of every command, with the choices of these pages for `policy.type` and the like."""
    chosen = {
        "policy": "pi0", "robot": "so100_follower", "teleop": "so100_leader", "env": "virtual_so100",
        "inference": "rtc", "strategy": "dagger", "operation": "recompute_stats",
    }  # fmt: skip
    args = [f"--{field}.type={name}" for field, name in chosen.items()]
    verbs = [f"lerobot_pi0.tools.{verb.replace('-', '_')}" for verb in tools.VERBS]
    classes = [config_class(module) for module in COMMANDS.values()]
    classes += [importlib.import_module(verb).Options for verb in verbs]
    classes += [
        config_class(f"lerobot_env_virtual_so100.{name}")
        for name in ("record", "score", "demo", "so100", "cell", "two_instructions")
    ]
    classes += [config_class(f"lerobot_env_metaworld_small.{name}") for name in ("record", "learn")]
    classes += [config_class("lerobot.async_inference.robot_client"), config_class("reading")]
    found = {"--policy.path", "--help", "--teleop.type"}
    for one in classes:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            parser.print_scoped_help(one, args)
        found |= set(re.findall(r"--[a-z][\w.]*", out.getvalue()))
    return found | set.union(*(argparse_options(file) for file in (ROOT / "benchmarks").glob("*.py")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_in_running_text_exist(page):
    """Catches an option in a sentence or a table that no command has."""
    known = known_options()
    for span in re.findall(r"`([^`\n]+)`", prose(page.read_text())):
        if span.startswith(LAUNCHERS):
            continue
        for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*[a-z\d](?![\w.]*[…*])", span):
            assert option in known, f"{page.name}: no command has {option}"


def test_an_option_that_is_none_is_unknown():
    """Catches a list of known options that accepts everything."""
    assert not {"--policy.flow_sample", "--policy.eval_split", "--fsp"} & known_options()


def test_quoted_messages_are_real():
    """Catches a message that the page on troubleshooting explains but that no code contains any more."""
    others = (importlib.util.find_spec(name) for name in ("lerobot", "draccus", "torchcodec"))
    folders = [ROOT / "lerobot_pi0", *(Path(spec.origin).parent for spec in others)]
    files = [file for folder in folders for file in folder.rglob("*.py")]
    said = "\n".join(re.sub(r'"\s*\n\s*[rf]*"', "", file.read_text()) for file in files)
    text = (ROOT / "docs/troubleshooting.md").read_text()
    for message in re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE):
        for part in message.split("…"):
            assert part.strip(" ':") in said, f"nothing says {message!r}"
