"""Configuration files of a checkpoint: config.json, which LeRobot shares, and lerobot_pi0.json, this plugin's own."""

import logging
from collections.abc import Mapping
from typing import Any

import draccus
from huggingface_hub.constants import CONFIG_NAME

from ..configuration_pi0 import PLUGIN_CONFIG_NAME, PLUGIN_FIELDS, PI0Config
from .errors import CheckpointConfigError, WrongPolicyError
from .origin import Base

OLD_LEROBOT_KEYS = {
    "proj_width",
    "num_steps",
    "resize_imgs_with_padding",
    "adapt_to_pi_aloha",
    "attention_implementation",
}
OTHER_NETWORKS = {"pi05": " It is π₀.₅, another network.", "pi0_fast": " It is π₀-FAST, another network."}


logger = logging.getLogger(__name__)


def check_type(content: dict[str, Any], place: str) -> None:
    """Look whether the content of a config.json is a π₀'s.

    Raises:
        WrongPolicyError: it names another policy, or is of a LeRobot before 0.4.
    """
    if old := OLD_LEROBOT_KEYS & content.keys():
        raise WrongPolicyError(
            f"{place} was written by a LeRobot before 0.4 ({', '.join(sorted(old))} in {CONFIG_NAME}), whose π₀ had "
            "other weights and normalised inside the model: take a current checkpoint, such as lerobot/pi0_base"
        )
    if (kind := content.get("type")) != "pi0":
        hint = OTHER_NETWORKS.get(str(kind), "")
        raise WrongPolicyError(f"{CONFIG_NAME} of {place} says type={kind!r}, expected 'pi0'.{hint}")


def decode_config(content: dict[str, Any], place: str) -> PI0Config:
    """The options in a config.json.

    Raises:
        CheckpointConfigError: they are not π₀'s.
    """
    try:
        with draccus.config_type("json"):
            config = draccus.decode(PI0Config, {k: v for k, v in content.items() if k != "type"})
        config.validate_features()
        return config
    except Exception as error:  # draccus raises what the parsed types raise; all of it means the same here
        raise CheckpointConfigError(f"{CONFIG_NAME} of {place} does not describe a π₀: {_reason(error)}") from error


def decode_options(options: dict[str, Any]) -> PI0Config:
    """A config with these options, which JSON holds; raises what draccus and the options' types raise."""
    with draccus.config_type("json"):
        return draccus.decode(PI0Config, options | {"device": "cpu"})


def decode_saved(content: dict[str, Any], place: str) -> dict[str, Any]:
    """What a lerobot_pi0.json holds: options by name, `updates`, `start` and `base`.

    Raises:
        CheckpointConfigError: it is from a newer version of this plugin, or holds values that no option takes.
    """
    if unknown := content.keys() - {*PLUGIN_FIELDS, "updates", "start", "base"}:
        raise CheckpointConfigError(
            f"{PLUGIN_CONFIG_NAME} of {place} holds {', '.join(sorted(unknown))}, which this version does not know: "
            "pip install --upgrade lerobot_policy_pi0"
        )
    options = {name: content[name] for name in PLUGIN_FIELDS if name in content}
    try:
        decoded = decode_options(options)
        base = content.get("base")
        return content | {
            **{name: getattr(decoded, name) for name in options},
            "updates": int(content.get("updates", 0)),
            "start": _text(content.get("start")),
            "base": None if base is None else Base(str(base["id"]), _text(base["revision"]), str(base["digest"])),
        }
    except Exception as error:  # as in `decode_config`
        raise CheckpointConfigError(f"{PLUGIN_CONFIG_NAME} of {place} cannot be used: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """What went wrong, with what it came from: draccus hides an option's own error behind one of its own."""
    cause = f" ({_reason(error.__cause__)})" if error.__cause__ is not None else ""
    return f"{error}{cause}" if isinstance(error, ValueError) else f"{error!r}{cause}"


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def check_without_checkpoint(config: Any) -> None:
    """Refuse options of a policy that is built without a checkpoint and cannot have them.

    Args:
        config: of any class: another than π₀'s is refused elsewhere.

    Raises:
        ValueError: an option goes with the VLM of a checkpoint.
    """
    if option := next((x for x in ("vlm_quantization", "context_cache") if getattr(config, x, None)), None):
        raise ValueError(
            f"{option} goes with the VLM of a checkpoint, and there is none: give --policy.path or "
            "--policy.pretrained_path, or leave it out"
        )


def resolve(config: PI0Config, saved: Mapping[str, Any], vlm_is_pretrained: bool) -> None:
    """`PI0Config.resolve`, with the checkpoint's file named where its options and the run's do not go together.

    Raises:
        CheckpointConfigError: they do not; each was valid alone.
        ValueError: options of the run do not go together, and the checkpoint has none.
    """
    try:
        config.resolve(dict(saved), vlm_is_pretrained=vlm_is_pretrained)
    except ValueError as error:
        if saved.keys().isdisjoint(PLUGIN_FIELDS):
            raise
        raise CheckpointConfigError(
            f"options of the run and of the checkpoint ({PLUGIN_CONFIG_NAME}) do not go together: {error}"
        ) from error


def overrule(config: PI0Config, saved: Mapping[str, Any], place: str) -> None:
    """Set options back that the checkpoint at `place` has decided for good, and say so."""
    vlm = saved.get("vlm_path")
    if config.vlm_path not in (None, vlm):
        logger.warning("vlm_path=%s is not read: the VLM's weights are in %s", config.vlm_path, place)
        config.vlm_path = vlm
