"""The command `lerobot-pi0`: one verb a file.

A verb is a module of this package with a dataclass `Options`, whose comments are the help text, and a function
`run(options)`, whose result is the exit status where it is an int. It gets a line in `VERBS`.
"""

import importlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import draccus
from draccus.utils import DecodingError
from lerobot.configs import PreTrainedConfig, parser
from lerobot.utils.utils import init_logging

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.errors import CheckpointError

logger = logging.getLogger(__name__)

VERBS = {
    "show": "what a checkpoint is, what it was trained on, what it expects, who can load it",
    "check": "does a dataset suit a policy, and a robot? Asked before training",
    "plan": "what training takes of a GPU's memory, by mode and batch size, and which card it fits",
    "open-loop": "chunks beside recorded actions, and what the policy reacts to: an HTML report",
    "serve": "LeRobot's policy server for robots that are elsewhere, with this policy in it",
    "convert": "openpi's checkpoints (JAX or PyTorch) to a LeRobot checkpoint",
}


IDLE = ("plan", "check")
"""Verbs that run no policy: LeRobot would choose a device for it, and warn that there is no GPU."""


class ToolError(RuntimeError):
    """What a verb cannot do; the message says what to do instead. Shown without a traceback."""


def usage() -> str:
    """What `lerobot-pi0 --help` prints."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {line}" for verb, line in VERBS.items())
    return (
        f"usage: lerobot-pi0 VERB [--option=value …]\n\n{verbs}\n\n"
        "`lerobot-pi0 VERB --help` lists the options of a verb. Training, evaluation and robots are LeRobot's own\n"
        "commands: lerobot-train, lerobot-eval, lerobot-rollout with --policy.type=pi0."
    )


def parse(options: type, args: list[str], prog: str) -> Any:
    """The options of a verb, written as LeRobot's commands take them.

    `--policy.path` fills the field `policy` from a checkpoint, as it does there; a flag may stand without `=true`.

    Raises:
        DecodingError: an option has no such value.
        ToolError: there is no such checkpoint.
    """
    flags = {f"--{field.name}" for field in fields(options) if field.type is bool}
    args = [f"{arg}=true" if arg in flags else arg for arg in args]
    path = parser.get_path_arg("policy", args)
    parsed: Any = draccus.parse(options, args=parser.filter_path_args("policy", args), prog=prog)
    if path is not None:
        Checkpoint.open(path).config()  # says what is wrong, where LeRobot's own parser raises what it likes
        parsed.policy = PreTrainedConfig.from_pretrained(path, cli_overrides=parser.get_cli_overrides("policy", args))
        parsed.policy.pretrained_path = path
    return parsed


def main(args: Sequence[str] | None = None) -> int:
    """Run a verb. Returns the exit status: 0, 1 for an error that was explained, 2 for a wrong command line."""
    verb, *rest = [*(sys.argv[1:] if args is None else args)] or ["--help"]
    if verb in ("-h", "--help"):
        print(usage())
        return 0
    if verb not in VERBS:
        print(f"lerobot-pi0: {verb!r} is none of its verbs\n\n{usage()}", file=sys.stderr)
        return 2
    if verb in IDLE and any(arg.startswith("--policy.") for arg in rest):
        rest = ["--policy.device=cpu", *rest]
    init_logging()
    module = importlib.import_module(f"{__name__}.{verb.replace('-', '_')}")
    if {"-h", "--help"} & {*rest}:
        print(module.__doc__)
        parser.print_scoped_help(module.Options, rest)  # draccus' own lists the options of every policy and robot
        return 0
    try:
        options = parse(module.Options, rest, prog=f"lerobot-pi0 {verb}")
    except (CheckpointError, ToolError) as error:
        logger.error("%s: %s", type(error).__name__, error)
        return 1
    except (DecodingError, ValueError) as error:  # ValueError: what the policy's options say about themselves
        print(f"lerobot-pi0 {verb}: {error}; --help lists the options", file=sys.stderr)
        return 2
    try:
        status = module.run(options)
    except (CheckpointError, ToolError) as error:
        logger.error("%s: %s", type(error).__name__, error)
        return 1
    return status if isinstance(status, int) else 0
