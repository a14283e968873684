"""Options of the plugin: declared once, each with a rule, a help text and a value when nobody sets it."""

import copy
import math
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import draccus
import pytest
from conftest import BuiltinPI0Config, PI0Config, tiny_config
from lerobot.configs import PreTrainedConfig

from lerobot_pi0.configuration_pi0 import OPTIONS, PLUGIN_FIELDS, RULES, choices, help_of

OF_TRAINING = (
    "optimizer_lr", "optimizer_eps", "optimizer_weight_decay", "optimizer_grad_clip_norm", "scheduler_warmup_steps",
    "scheduler_decay_steps", "scheduler_decay_lr",
)  # fmt: skip
WHOLE, NUMBER, BOOL = "has to be a whole number", "has to be a number", "has to be true or false"
POSITIVE, FINITE = "has to be above 0 and finite", "has to be 0 or more and finite"
ALLOWED = {
    "flow_samples": [1, 8],
    "ema_decay": [0, 0.0, 0.99],
    "augment_shift": [0, 0.02, 0.49],
    "environment_state_weight": [0, 0.1, 2],
    "solver_tolerance": [1e-6, 1],
    "noise_temperature": [0, 0.5, 1.5],
    "max_action_step": [1e-3, 5, math.inf],
    "action_range_margin": [0, 0.1, math.inf],
    "num_inference_steps": [1, 50],
    "tokenizer_max_length": [1, 200],
    "max_state_dim": [1, 64],
    "max_action_dim": [1, 64],
    "chunk_size": [50, 64],
    "n_action_steps": [1, 50],
    "image_resolution": [(32, 32), [64, 64]],
    "min_period": [1e-3],
    "max_period": [1, 4.0],
    "time_sampling_beta_alpha": [0.5, 1],
    "time_sampling_beta_beta": [2],
    "time_sampling_scale": [0.5, 0.999],
    "time_sampling_offset": [0, 0.001],
    "time_sampling_warmup_steps": [0, 1000],
    "empty_cameras": [0, 2],
    **{name: [0, 1] for name in OF_TRAINING},
}
REFUSED = {
    "flow_samples": ([0, -1], "has to be at least 1"),
    "ema_decay": ([-0.1, 1, 1.5, math.nan], "has to be at least 0 and below 1; openpi's is 0.99"),
    "augment_shift": ([-0.01, 0.5, math.nan], "has to be at least 0 and below 0.5"),
    "environment_state_weight": ([-0.1, math.nan, math.inf], FINITE),
    "solver_tolerance": ([0, -1, math.nan], "has to be more than 0"),
    "noise_temperature": ([-0.1, math.nan, math.inf], FINITE),
    "time_sampling_warmup_steps": ([-1], "has to be at least 0"),
    "max_action_step": ([0, -1, math.nan], "has to be more than 0, or inf for no bound"),
    "action_range_margin": ([-0.1, math.nan], "has to be 0 or more, or inf for no bound"),
    "num_inference_steps": ([0], "has to be at least 1"),
    "tokenizer_max_length": ([0], "has to be at least 1"),
    "max_state_dim": ([0], "has to be at least 1"),
    "max_action_dim": ([0], "has to be at least 1"),
    "chunk_size": ([0, -1], "has to be at least 1"),
    "n_action_steps": ([0, -1], "has to be at least 1"),
    "image_resolution": ([(32, 64), (0, 0), (32.0, 32.0), (32,), 32, "32"], "has to be square"),
    "min_period": ([0, -1, math.nan, math.inf], POSITIVE),
    "max_period": ([0, -1, math.nan, math.inf], POSITIVE),
    "time_sampling_beta_alpha": ([0, math.nan], POSITIVE),
    "time_sampling_beta_beta": ([-1, math.inf], POSITIVE),
    "time_sampling_scale": ([-0.1, math.nan], FINITE),
    "time_sampling_offset": ([-0.1, math.nan], FINITE),
    "empty_cameras": ([-1], FINITE),
    **dict.fromkeys(OF_TRAINING, ([-1], FINITE)),
    "rtc_training_max_delay": ([-1, 50], "has to be from 0 to chunk_size - 1 = 49: one action at least has to be"),
}
FEW = [name for name in RULES if choices(name)]

DEFAULTS = {
    "flow_samples": 1, "save_expert_only": False, "save_tokenizer": True, "cuda_graphs": True,
    "solver": "euler", "solver_tolerance": 1e-2, "noise_temperature": 1.0, "image_resize": "lerobot",
    "rtc_training_max_delay": 0, "ema_decay": 0.0, "augment_images": False, "augment_shift": 0.0,
    "optimizer_muon": False, "environment_state_weight": 0.0,
    "clean_prompts": False, "mask_padded_actions": False, "optimizer_8bit": False, "recipe": "lerobot",
    "text_tokenizer_name": "bytes", "vlm_path": None, "vlm_quantization": None, "rtc_guidance": None,
    "max_action_step": None,
    "action_range_margin": None, "context_cache": None, "time_sampling_warmup_steps": 0,
    "show_attention": False,
}  # fmt: skip
"""The values that version 0.1.0 uses for options that nobody sets."""


def test_every_rule_is_tested():
    """Catches a new option with a rule but without a test value that breaks the rule."""
    assert {*FEW, *ALLOWED} == RULES.keys()
    assert {*FEW, *REFUSED} >= RULES.keys()
    assert DEFAULTS.keys() == OPTIONS.keys()


@pytest.mark.parametrize(("name", "value"), [(name, x) for name, values in ALLOWED.items() for x in values])
def test_allowed(name, value):
    """Catches a rule that refuses valid values."""
    assert getattr(tiny_config(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), [(name, x) for name, (values, _) in REFUSED.items() for x in values])
def test_refused(name, value):
    """Catches an invalid value, such as NaN, that would only be found hours later."""
    with pytest.raises(ValueError) as refused:
        tiny_config(**{name: value})
    assert str(refused.value).startswith(f"{name}={value!r} {REFUSED[name][1]}")


KINDS = {
    "n_action_steps": ([2.5, "2", True, None, [1]], WHOLE),
    "chunk_size": ([50.0, math.nan, False], WHOLE),
    "num_inference_steps": ([10.0, "10"], WHOLE),
    "flow_samples": ([1.0, True], WHOLE),
    "rtc_training_max_delay": ([2.5, "3"], WHOLE),
    "min_period": (["0.004", True, None, [1]], NUMBER),
    "ema_decay": (["0.9", True], NUMBER),
    "max_action_step": (["5", False], NUMBER),
    "use_relative_actions": ([1, "false", None, 0.0], BOOL),
    "augment_images": ([1, "yes"], BOOL),
    "augment_shift": (["0.1", True], NUMBER),
    "environment_state_weight": (["0.1", True], NUMBER),
    "optimizer_muon": ([1, "yes"], BOOL),
    "text_tokenizer_name": ([3, True, ["bytes"]], "has to be a text"),
    "relative_exclude_joints": (["gripper", None, 3], "has to be a list"),
}


@pytest.mark.parametrize(("name", "value"), [(name, x) for name, (values, _) in KINDS.items() for x in values])
def test_kinds(name, value):
    """Catches a value of a wrong type, which would be rounded, cut or iterated over; also if it is set later."""
    with pytest.raises(ValueError) as refused:
        tiny_config(**{name: value})
    assert str(refused.value) == f"{name}={value!r} {KINDS[name][1]}"
    config = tiny_config()
    before = getattr(config, name)
    with pytest.raises(ValueError, match=name):
        setattr(config, name, value)
    assert getattr(config, name) == before


@pytest.mark.parametrize(("name", "value"), [(name, x) for name, (values, _) in REFUSED.items() for x in values])
def test_refused_later(name, value):
    """Catches an invalid value that a script sets later, and with which a checkpoint could not be loaded again."""
    config = tiny_config()
    with pytest.raises(ValueError, match=name):
        setattr(config, name, value)
        config.resolve({}, vlm_is_pretrained=True)  # some depend on others


def test_periods_and_times_go_together():
    """Catches a range whose start is above its end, although each of the two numbers is valid."""
    with pytest.raises(ValueError, match=r"min_period=5.0 has to be below max_period=4.0"):
        tiny_config(min_period=5.0)
    with pytest.raises(ValueError, match="times from 0 to 1"):
        tiny_config(time_sampling_offset=0.5)


def test_a_copy_keeps_the_rules():
    """Catches a copied or pickled config that accepts any value."""
    for config in (copy.deepcopy(tiny_config()), pickle.loads(pickle.dumps(tiny_config()))):
        with pytest.raises(ValueError, match="n_action_steps"):
            config.n_action_steps = 2.5


@pytest.mark.parametrize("name", FEW)
def test_few_values(name):
    """Catches a missing choice, or a mistyped one that is silently replaced by the default."""
    for value in choices(name):
        if (name, value) != ("rtc_guidance", "trained"):
            assert getattr(tiny_config(**{name: value}), name) == value
    with pytest.raises(ValueError) as refused:
        tiny_config(**{name: "none of them"})
    assert str(refused.value) == f"{name}='none of them' is not one of {', '.join(choices(name))}"


def test_what_is_not_an_option_has_no_choices():
    """Catches a table of options that lists choices where there are none."""
    assert choices("flow_samples") == choices("no such option") == ()


def test_dtype_has_to_be_said():
    """Catches None in options of LeRobot, which, unlike ours, are never unset."""
    with pytest.raises(ValueError, match="dtype=None is not one of bfloat16, float32"):
        tiny_config(dtype=None)


# --- unset, and where the value comes from ------------------------------------------------------------------


def test_options_are_unset():
    """Catches a default in a config: it could not be distinguished from a checkpoint's own value."""
    config = PI0Config()
    assert {name: getattr(config, name) for name in OPTIONS} == dict.fromkeys(OPTIONS)
    ours = {f.name for f in fields(PI0Config)} - {f.name for f in fields(BuiltinPI0Config)}
    assert ours == OPTIONS.keys()
    assert tuple(sorted(ours)) == PLUGIN_FIELDS


def test_defaults():
    """Catches a changed default of an option that nobody has set."""
    config = tiny_config()
    config.resolve({}, vlm_is_pretrained=False)
    assert {name: getattr(config, name) for name in OPTIONS} == DEFAULTS


OTHER = {"flow_samples": 3, "solver": "heun", "solver_tolerance": 0.5, "noise_temperature": 0.5,
         "rtc_training_max_delay": 4, "ema_decay": 0.5,
         "save_expert_only": True, "save_tokenizer": False, "cuda_graphs": False,
         "augment_images": True, "augment_shift": 0.02, "clean_prompts": True, "image_resize": "openpi",
         "mask_padded_actions": True, "optimizer_8bit": True, "recipe": "openpi", "text_tokenizer_name": "t",
         "vlm_path": "v", "vlm_quantization": "int8", "rtc_guidance": "vjp", "max_action_step": 2.0,
         "action_range_margin": 0.5, "context_cache": "contexts",
         "time_sampling_warmup_steps": 7, "show_attention": True, "optimizer_muon": True,
         "environment_state_weight": 0.5}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_who_says_it(name):
    """Catches a run that overrules the user's option, or inherits an option that was only for the earlier run."""
    of_the_run = ("ema_decay", "augment_images", "augment_shift", "mask_padded_actions", "optimizer_8bit", "recipe",
                  "vlm_quantization", "context_cache", "time_sampling_warmup_steps", "show_attention",
                  "optimizer_muon", "environment_state_weight")  # fmt: skip
    saved = {name: OTHER[name]}
    unset, asked = tiny_config(), tiny_config(**saved)
    unset.resolve(saved, vlm_is_pretrained=True)
    asked.resolve({name: DEFAULTS[name]}, vlm_is_pretrained=True)
    assert getattr(unset, name) == (DEFAULTS[name] if name in of_the_run else OTHER[name])
    assert getattr(asked, name) == OTHER[name]
    assert OPTIONS[name].of_the_run is (name in of_the_run)


def test_saved_values_obey_the_rules():
    """Catches an invalid value in a checkpoint's file that was edited by hand."""
    with pytest.raises(ValueError, match="flow_samples=0 has to be at least 1"):
        tiny_config().resolve({"flow_samples": 0}, vlm_is_pretrained=True)


# --- LeRobot's parser ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_on_the_command_line(name):
    """Catches an option that draccus cannot parse, or that changes when it is written to a file and read."""
    if name == "vlm_path":  # every string is one
        assert draccus.parse(PI0Config, args=["--vlm_path=somewhere"]).vlm_path == "somewhere"
        return
    found = draccus.parse(PI0Config, args=[f"--{name}={OTHER[name]}"])
    assert getattr(found, name) == OTHER[name]
    encoded = draccus.encode(found, PreTrainedConfig)
    assert encoded[name] == OTHER[name]
    assert {key for key in encoded.keys() & OPTIONS.keys() if encoded[key] is not None} >= {name}


def test_help_of_every_option():
    """Catches an option without a help text: a line between comment and field is enough to lose it."""
    for name in OPTIONS:
        text = help_of(name)
        assert len(text) > 20, name
        assert text[0].isupper() or text[0] in "\"'" or text.startswith("openpi"), name


def test_the_commands_show_it():
    """Catches help texts that LeRobot's commands do not show."""
    command = [sys.executable, "-m", "lerobot.scripts.lerobot_train", "--policy.type=pi0", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=300)
    shown = " ".join(done.stdout.split())
    for name in OPTIONS:
        assert f"--policy.{name}" in shown, name
        assert help_of(name)[:60] in shown, name
