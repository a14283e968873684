"""Options of a config and their rules: how one is declared, and what its value has to be."""

import math
from collections.abc import Callable
from dataclasses import field, fields
from numbers import Integral, Real
from types import NoneType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints


class Rule(NamedTuple):
    """What the value of an option has to be."""

    holds: Callable[[Any], bool]
    says: str
    """The rule as the end of a sentence that begins with the option and its value."""
    choices: tuple[str, ...] = ()
    """All values that there are, where they are few."""


class Option(NamedTuple):
    """What is known of an option that only this plugin has, beside its name, type and help text."""

    default: Any
    """What None means once the policy is built; None where it stays None."""
    rule: Rule | None
    of_the_run: bool
    """Whether a checkpoint remembers it, but does not hand it on to the runs that begin with it."""
    recipes: dict[str, Any]
    """By recipe: the default under it, where that is another."""


def option(default: Any = None, rule: Rule | None = None, *, of_the_run: bool = False, **recipes: Any) -> Any:
    """A field of the config that is None until somebody sets it; the arguments are those of `Option`."""
    return field(default=None, metadata={"option": Option(default, rule, of_the_run, recipes)})


def one_of(*choices: str) -> Rule:
    return Rule(lambda x: x in choices, f"is not one of {', '.join(choices)}", choices)


def at_least(least: float, says: str = "") -> Rule:
    return Rule(lambda x: x >= least, says or f"has to be at least {least}")


def above(least: float, says: str = "") -> Rule:
    return Rule(lambda x: x > least, says or f"has to be more than {least}")


BELOW_HALF = Rule(lambda x: 0 <= x < 0.5, "has to be at least 0 and below 0.5")
POSITIVE = Rule(lambda x: 0 < x < math.inf, "has to be above 0 and finite")
FINITE = Rule(lambda x: 0 <= x < math.inf, "has to be 0 or more and finite")

KINDS: dict[Any, Rule] = {
    bool: Rule(lambda x: isinstance(x, bool), "has to be true or false"),
    int: Rule(lambda x: isinstance(x, Integral) and not isinstance(x, bool), "has to be a whole number"),
    float: Rule(lambda x: isinstance(x, Real) and not isinstance(x, bool), "has to be a number"),
    str: Rule(lambda x: isinstance(x, str), "has to be a text"),
    list: Rule(lambda x: isinstance(x, list | tuple), "has to be a list"),
}


def kinds_of(config: type) -> dict[str, tuple[Rule, bool]]:
    """By name of a config's field, the rule of its kind, and whether it may be None; not of fields of other kinds."""
    found = {}
    for name, annotation in get_type_hints(config).items():
        kinds = {*(get_args(annotation) if NoneType in get_args(annotation) else (annotation,))}
        kind = next(iter(kinds - {NoneType}))
        rule = KINDS.get(get_origin(kind) or kind)
        if rule is not None and name in {x.name for x in fields(config)}:
            found[name] = rule, NoneType in kinds
    return found


def _is_square(x: Any) -> bool:
    return isinstance(x, list | tuple) and len(x) == 2 and x[0] == x[1] and KINDS[int].holds(x[0]) and x[0] > 0


LEROBOTS: dict[str, Rule] = {
    "dtype": one_of("bfloat16", "float32"),
    "compile_mode": one_of("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "image_resolution": Rule(_is_square, "has to be square: twice the same number of pixels"),
    **dict.fromkeys(
        (
            "chunk_size", "n_action_steps", "num_inference_steps", "tokenizer_max_length", "max_state_dim",
            "max_action_dim",
        ),
        at_least(1),
    ),
    **dict.fromkeys(("min_period", "max_period", "time_sampling_beta_alpha", "time_sampling_beta_beta"), POSITIVE),
    **dict.fromkeys(
        (
            "time_sampling_scale", "time_sampling_offset", "empty_cameras", "optimizer_lr", "optimizer_eps",
            "optimizer_weight_decay", "optimizer_grad_clip_norm", "scheduler_warmup_steps", "scheduler_decay_steps",
            "scheduler_decay_lr",
        ),
        FINITE,
    ),
}  # fmt: skip
"""Rules of single options that are LeRobot's own."""
