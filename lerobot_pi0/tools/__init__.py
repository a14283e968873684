"""The command `lerobot-pi0`: one file per verb.

A verb is a module of this package with a dataclass `Options`, whose comments are the help text, and a function
`run(options)`, which returns the exit status, or None for 0. Each verb has a line in `VERBS`.
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
from ..checkpoints.quoting import plain
from . import usage

logger = logging.getLogger(__name__)

VERBS = {
    "show": "describe a checkpoint: what it was trained on, what it expects, which programs can load it",
    "check": "look for faults in a dataset, and compare it with a policy and a robot, before training",
    "plan": "how much GPU memory training needs, by mode and batch size, and which card is large enough",
    "cache": "compute what the VLM makes of a dataset's pictures once, so that training needs no VLM",
    "open-loop": "compare predicted chunks with recorded actions, and test which inputs the policy uses",
    "serve": "run LeRobot's policy server with this policy, for robots on other machines",
    "convert": "make a LeRobot checkpoint from openpi's (JAX or PyTorch)",
}

WITHOUT_DEVICE = ("plan", "check")
"""Verbs that run no policy. For them LeRobot need not choose a device, nor warn that there is no GPU."""


class ToolError(RuntimeError):
    """A verb cannot do what was asked. The message says what to do instead; it is shown without a traceback."""


def parse(options: type, args: list[str], prog: str) -> Any:
    """Parse the options of a verb, which are written as for LeRobot's commands.

    `--policy.path` fills the field `policy` from a checkpoint, as in LeRobot; where that field is a list, it gets the
    `--policy.*` options, for a checkpoint that is named later. `--flag` means `--flag=true`.

    Raises:
        DecodingError: the value of an option is not valid.
        ValueError: there is no such option.
        ToolError: there is no such checkpoint.
    """
    usage.check_names(options, args)
    flags = {f"--{field.name}" for field in fields(options) if field.type is bool}
    args = [f"{arg}=true" if arg in flags else arg for arg in args]
    path = parser.get_path_arg("policy", args)
    if any(field.name == "policy" and field.type == list[str] for field in fields(options)):
        return _parse_list(options, args, path, prog)
    parsed: Any = draccus.parse(options, args=parser.filter_path_args("policy", args), prog=prog)
    if path is not None:
        parsed.policy = read_config(path, parser.get_cli_overrides("policy", args) or [])
    return parsed


def _parse_list(options: type, args: list[str], path: str | None, prog: str) -> Any:
    if path is not None:
        raise ToolError("--policy.path is the client's to give, as --pretrained_name_or_path: leave it out here")
    overrides = parser.get_cli_overrides("policy", args) or []
    for name in [override.removeprefix("--").split("=")[0] for override in overrides]:
        args = parser.filter_arg(f"policy.{name}", args)
    parsed: Any = draccus.parse(options, args=args, prog=prog)
    parsed.policy = overrides
    return parsed


def read_config(path: str, overrides: list[str]) -> Any:
    """The options of a checkpoint, as LeRobot's commands read them with `--policy.path`.

    Args:
        overrides: options in place of the checkpoint's, such as `--device=cpu`.

    Raises:
        CheckpointError: there is no such checkpoint, or it is not π₀'s.
    """
    revision = parser.parse_arg("pretrained_revision", overrides)
    checkpoint = Checkpoint.open(path, revision=revision)
    checkpoint.config()  # explains what is wrong with it; LeRobot's parser raises many kinds of errors
    _ = checkpoint.pipelines  # refuses what would run a program, before a verb builds them
    config: Any = PreTrainedConfig.from_pretrained(path, revision=revision, cli_overrides=overrides)
    config.pretrained_path = path
    return config


def main(args: Sequence[str] | None = None) -> int:
    """Run a verb. Returns the exit status: 0, 1 after an error with an explanation, 2 for a wrong command line."""
    verb, *rest = [*(sys.argv[1:] if args is None else args)] or ["--help"]
    if verb in usage.HELP:
        print(usage.overview(VERBS))
        return 0
    if verb not in VERBS:
        near = usage.nearest(verb, VERBS)
        print(f"lerobot-pi0: {verb!r} is not a verb{near}\n\n{usage.overview(VERBS)}", file=sys.stderr)
        return 2
    if verb in WITHOUT_DEVICE and any(arg.startswith("--policy.") for arg in rest):
        rest = ["--policy.device=cpu", *rest]
    init_logging()
    module = importlib.import_module(f"{__name__}.{verb.replace('-', '_')}")
    if {*usage.HELP, usage.EVERYTHING} & {*rest}:
        every = usage.EVERYTHING in rest
        print(usage.everything(module, rest) if every else usage.screen(verb, VERBS[verb], module))
        return 0
    try:
        options = parse(module.Options, rest, prog=f"lerobot-pi0 {verb}")
    except (CheckpointError, ToolError) as error:
        logger.error("%s: %s", type(error).__name__, plain(error, keep="\n"))
        return 1
    except (DecodingError, ValueError) as error:  # ValueError: the policy's config refuses an option
        print(f"lerobot-pi0 {verb}: {error}; --help lists the options", file=sys.stderr)
        return 2
    try:
        status = module.run(options)
    except (ToolError, ValueError, OSError, FloatingPointError) as error:  # CheckpointError is a ValueError
        logger.debug("", exc_info=True)
        logger.error("%s: %s", type(error).__name__, plain(error, keep="\n"))
        return 1
    return status if isinstance(status, int) else 0
