"""The command `lerobot-pi0`: one verb a file.

A verb is a module of this package with a dataclass `Options`, whose comments are the help text, and a function
`run(options)`. It gets a line in `VERBS`.
"""

import importlib
import logging
import sys
from collections.abc import Sequence

import draccus
from draccus.utils import DecodingError
from lerobot.utils.utils import init_logging

from ..checkpoint import CheckpointError

logger = logging.getLogger(__name__)

VERBS = {
    "convert": "openpi's checkpoints (JAX or PyTorch) to a LeRobot checkpoint",
}


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


def main(args: Sequence[str] | None = None) -> int:
    """Run a verb. Returns the exit status: 0, 1 for an error that was explained, 2 for a wrong command line."""
    verb, *rest = [*(sys.argv[1:] if args is None else args)] or ["--help"]
    if verb in ("-h", "--help"):
        print(usage())
        return 0
    if verb not in VERBS:
        print(f"lerobot-pi0: {verb!r} is none of its verbs\n\n{usage()}", file=sys.stderr)
        return 2
    init_logging()
    module = importlib.import_module(f"{__name__}.{verb.replace('-', '_')}")
    try:
        options = draccus.parse(module.Options, args=rest, prog=f"lerobot-pi0 {verb}")
    except DecodingError as error:
        print(f"lerobot-pi0 {verb}: {error}; --help lists the options", file=sys.stderr)
        return 2
    try:
        module.run(options)
    except (CheckpointError, ToolError) as error:
        logger.error("%s: %s", type(error).__name__, error)
        return 1
    return 0
