"""Registration with LeRobot as its "pi0", tested in separate processes, because imports cannot be undone.

The processes run in parallel. Each answers all questions about one order of imports.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_dataset
from processes import finish, start

TOOK_OVER = "policy type 'pi0' is lerobot_policy_pi0"

ORDERS = {
    "plugin first": "import lerobot_policy_pi0",
    "lerobot.policies first": """
import sys
import lerobot.policies
before = set(sys.modules)
import lerobot_policy_pi0
answers["new modules"] = sorted(set(sys.modules) - before)
""",
    "built-in model first, then discovery": """
import lerobot.policies.pi0.modeling_pi0
from lerobot.utils.import_utils import register_third_party_plugins
register_third_party_plugins()
register_third_party_plugins()
""",
    "off": """
from lerobot.utils.import_utils import register_third_party_plugins
register_third_party_plugins()
""",
}

LOOK_UP = """
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_policy_config
answers["class"] = PreTrainedConfig.get_choice_class("pi0").__module__
answers["made config"] = type(make_policy_config("pi0", device="cpu")).__module__
answers["policy"] = get_policy_class("pi0").__module__
answers["type"] = make_policy_config("pi0", device="cpu").type
"""

BUILD = """
from types import SimpleNamespace
import torch
from lerobot.policies import make_policy, make_pre_post_processors
stats = {key: {"mean": torch.zeros(6), "std": torch.ones(6)} for key in ("observation.state", "action")}
columns = {key: {"dtype": "float32", "shape": (6,), "names": list("abcdef")} for key in stats}
columns["observation.images.front"] = {
    "dtype": "image", "shape": (3, 64, 64), "names": ["channels", "height", "width"]
}
config = make_policy_config("pi0", paligemma_variant="tiny", action_expert_variant="tiny", device="cpu")
policy = make_policy(config, ds_meta=SimpleNamespace(features=columns, stats=stats))
preprocessor, _ = make_pre_post_processors(policy.config, dataset_stats=stats)
answers["made policy"] = type(policy).__module__
answers["action names"] = policy.config.action_feature_names
answers["tokenizer step"] = type(preprocessor.steps[3]).__module__
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[dict, str]]:
    """For each order of imports, the meaning of "pi0". Two processes at a time."""
    programs = {name: code + LOOK_UP + ("" if name == "off" else BUILD) for name, code in ORDERS.items()}
    names, results = list(programs), {}
    for pair in zip(names[::2], names[1::2], strict=True):
        running = {name: start(programs[name], LEROBOT_PI0_TAKEOVER="0" if name == "off" else "1") for name in pair}
        results |= {name: finish(process) for name, process in running.items()}
    return results


@pytest.mark.parametrize("order", [name for name in ORDERS if name != "off"])
def test_pi0_is_ours(answers, order):
    """Catches an order of imports in which LeRobot's own π₀ is silently used."""
    found, log = answers[order]
    assert found["class"] == found["made config"] == "lerobot_pi0.configuration_pi0"
    assert found["policy"] == found["made policy"] == "lerobot_pi0.modeling_pi0"
    assert found["tokenizer step"] == "lerobot_pi0.inputs.steps"
    assert found["type"] == "pi0"
    assert found["action names"] == list("abcdef")
    assert "Could not import third-party plugin: lerobot_policy_pi0" not in log


@pytest.mark.parametrize("order", [name for name in ORDERS if name != "off"])
def test_one_line_says_so(answers, order):
    """Catches a takeover that is not logged, or logged twice."""
    _, log = answers[order]
    (line,) = [line for line in log.splitlines() if TOOK_OVER in line]
    assert "LEROBOT_PI0_TAKEOVER=0" in line


def test_the_switch_leaves_the_built_in(answers):
    """Catches a switch that does not work: comparisons with the built-in need its config's type name."""
    found, log = answers["off"]
    assert found["class"] == found["made config"] == "lerobot.policies.pi0.configuration_pi0"
    assert found["policy"] == "lerobot.policies.pi0.modeling_pi0"
    assert found["type"] == "pi0"
    assert TOOK_OVER not in log


def test_the_import_is_cheap(answers):
    """Catches model code or a library that every LeRobot command would load at its start, whatever its policy."""
    found, _ = answers["lerobot.policies first"]
    ours = {name for name in found["new modules"] if name.startswith("lerobot_")}
    rooms = {"configuration_pi0", "network", "network.sizes", "rules", "takeover", "training"}
    optimizers = {f"training.{name}" for name in ("ema", "muon", "optimizers", "recipes")}
    assert ours == {"lerobot_policy_pi0", "lerobot_pi0"} | {f"lerobot_pi0.{name}" for name in rooms | optimizers}
    assert not [name for name in found["new modules"] if name not in ours and not is_light(name)]


EVERY_MODULE = """
import importlib
import pkgutil
import lerobot.policies
from lerobot.configs import PreTrainedConfig
from lerobot.optim import LRSchedulerConfig, OptimizerConfig
from lerobot.processor import ProcessorStepRegistry
from transformers import AttentionInterface
import lerobot_pi0.tools  # imports much of LeRobot and nothing of ours that is looked at

def registered():
    found = {
        "policies": PreTrainedConfig.get_known_choices(), "optimizers": OptimizerConfig.get_known_choices(),
        "schedules": LRSchedulerConfig.get_known_choices(), "steps": ProcessorStepRegistry._registry,
        "attention": dict(AttentionInterface()),
    }
    return {
        (kind, name, f"{entry.__module__}.{entry.__qualname__}")
        for kind, entries in found.items() for name, entry in entries.items() if hasattr(entry, "__qualname__")
    }

def ours(entries):
    return sorted(entry for entry in entries if entry[2].startswith("lerobot_p"))

import lerobot_pi0
answers["failed"], answers["modules"], answers["added"] = {}, [], {}
before = registered()
for _, name, _ in pkgutil.walk_packages(lerobot_pi0.__path__, "lerobot_pi0."):
    try:
        importlib.import_module(name)
    except ImportError as error:
        answers["failed"][name] = error.name
        continue
    answers["modules"].append(name)
    if new := ours(registered() - before):
        answers["added"][name] = new
    before = registered()
lerobot_pi0.take_over()
answers["taken over"] = ours(registered() - before)
once = registered()
lerobot_pi0.take_over()
answers["again"] = sorted(registered() ^ once)
"""


@pytest.fixture(scope="module")
def registries() -> dict:
    """What each of our modules, and after them `take_over`, adds to the registries of a process."""
    found, log = finish(start(EVERY_MODULE, LEROBOT_PI0_TAKEOVER="0"))
    return found | {"log": log}


def test_an_import_registers_nothing(registries):
    """Catches a module whose import changes the process, such as by a decorator or a registration at its end."""
    assert set(registries["failed"].values()) <= {"bitsandbytes", "jax", "orbax", "grpc", "matplotlib"}
    assert {"lerobot_pi0.modeling_pi0", "lerobot_pi0.inputs.steps", "lerobot_pi0.control.bounds"} <= {
        *registries["modules"]
    }
    added = {(kind, name) for entries in registries["added"].values() for kind, name, _ in entries}
    assert added <= {("attention", "pi0")}  # network/attention.py, for transformers' vision tower


def test_take_over_registers_everything(registries):
    """Catches a policy, a saved step, or an optimizer of a train_config.json that LeRobot would not find."""
    found = {(kind, name): cls.rsplit(".", 1)[1] for kind, name, cls in registries["taken over"]}
    assert found == {
        ("policies", "pi0"): "PI0Config",
        ("optimizers", "pi0_averaged_adamw"): "AveragedAdamWConfig",
        ("optimizers", "pi0_adamw_8bit"): "AdamW8bitConfig",
        ("optimizers", "pi0_averaged_adamw_8bit"): "AveragedAdamW8bitConfig",
        ("optimizers", "pi0_muon"): "MuonConfig",
        ("optimizers", "pi0_averaged_muon"): "AveragedMuonConfig",
        ("schedules", "pi0_warmup_cosine"): "WarmupCosineConfig",
    }
    assert registries["again"] == []
    assert registries["log"].count(TOOK_OVER) == 1


LAZY = """
import sys
import lerobot_policy_pi0
answers["before"] = "lerobot_pi0.modeling_pi0" in sys.modules
from lerobot_policy_pi0 import PI0Config, PI0Policy, make_pi0_pre_post_processors
answers["names"] = [x.__module__ for x in (PI0Config, PI0Policy, make_pi0_pre_post_processors)]
try:
    lerobot_policy_pi0.PI05Policy
except AttributeError as error:
    answers["error"] = str(error)
"""


def test_lerobots_way_to_import_a_plugin():
    """Catches a plugin without the names that LeRobot's page on plugins imports, or that loads the model for them."""
    found, _ = finish(start(LAZY))
    assert found["before"] is False
    assert found["names"] == [f"lerobot_pi0.{name}_pi0" for name in ("configuration", "modeling", "processor")]
    assert "PI05Policy" in found["error"]


def test_without_lerobot(tmp_path):
    """Catches a traceback about an unknown module if LeRobot is not installed."""
    hide = "import sys\nsys.modules['lerobot'] = None\nimport lerobot_policy_pi0"
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert done.returncode == 1
    assert "pip install 'lerobot[pi,training]" in done.stderr.splitlines()[-1]


def test_discover_packages_path():
    """Catches a plugin that LeRobot's own option cannot load: this option looks for modules inside of a package."""
    code = """
from lerobot.configs.parser import load_plugin
load_plugin("lerobot_policy_pi0")
from lerobot.configs import PreTrainedConfig
answers["class"] = PreTrainedConfig.get_choice_class("pi0").__module__
"""
    found, _ = finish(start(code))
    assert found["class"] == "lerobot_pi0.configuration_pi0"


def is_light(name: str) -> bool:
    """Whether a module is one of LeRobot's own processors or of Python's standard library."""
    return name.split(".")[0] in sys.stdlib_module_names or name.startswith("lerobot.policies.pi0")


# --- the real commands --------------------------------------------------------------------------------------

COMMANDS = """
import runpy
import sys
from pathlib import Path

dataset, out = sys.argv[1:]

def command(name, *arguments):
    print("COMMAND", name, *arguments, file=sys.stderr, flush=True)
    sys.argv = [name, *arguments]
    runpy.run_module(f"lerobot.scripts.{name}", run_name="__main__")
    policies = [m for m in sys.modules if m.endswith(".modeling_pi0")]
    answers.setdefault("modules", []).append(policies)

data = ["--dataset.repo_id=test/tiny", f"--dataset.root={dataset}"]
loop = ["--batch_size=2", "--num_workers=0", "--log_freq=1", "--save_freq=1", "--wandb.enable=false"]
robot = ["--policy.device=cpu", "--policy.push_to_hub=false"]
tiny = ["--policy.type=pi0", "--policy.paligemma_variant=tiny", "--policy.action_expert_variant=tiny"]
last = f"{out}/scratch/checkpoints/last/pretrained_model"

command("lerobot_train", *data, *loop, *robot, *tiny, "--steps=2", f"--output_dir={out}/scratch")
command("lerobot_train", "--resume=true", f"--config_path={last}/train_config.json", "--steps=3")
command("lerobot_train", *data, *loop, *robot, f"--policy.path={last}", "--steps=1", f"--output_dir={out}/tuned")
command(
    "lerobot_train", *data, *loop, *robot, *tiny, f"--policy.pretrained_path={last}", "--steps=1",
    f"--output_dir={out}/pretrained",
)

# lerobot-eval wants an environment: one that shows noise and has no goal
import gymnasium
import numpy as np
from dataclasses import dataclass, field
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig

class Blank(gymnasium.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    image = gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    joints = gymnasium.spaces.Box(-np.inf, np.inf, (6,), np.float32)
    observation_space = gymnasium.spaces.Dict(
        {"pixels": gymnasium.spaces.Dict({"front": image, "left": image}), "agent_pos": joints}
    )
    action_space = joints
    task_description = task = "reach cube 0"
    _max_episode_steps = 3

    def __init__(self, **kwargs):
        self.steps = 0

    def observation(self):
        return {"pixels": {"front": self.render(), "left": self.render()}, "agent_pos": np.zeros(6, np.float32)}

    def render(self):
        return np.full((64, 64, 3), 40, np.uint8)

    def reset(self, **kwargs):
        self.steps = 0
        return self.observation(), {"is_success": False}

    def step(self, action):
        assert action.shape == (6,) and np.isfinite(action).all()
        self.steps += 1
        return self.observation(), 0.0, self.steps == 3, False, {"is_success": False}

gymnasium.register("gym_blank/noise", Blank)

@EnvConfig.register_subclass("blank")
@dataclass
class BlankConfig(EnvConfig):
    task: str = "noise"
    gym_kwargs = {}
    features: dict = field(default_factory=lambda: {
        "action": PolicyFeature(FeatureType.ACTION, (6,)),
        "agent_pos": PolicyFeature(FeatureType.STATE, (6,)),
        "pixels/front": PolicyFeature(FeatureType.VISUAL, (64, 64, 3)),
        "pixels/left": PolicyFeature(FeatureType.VISUAL, (64, 64, 3)),
    })
    features_map: dict = field(default_factory=lambda: {
        "action": "action", "agent_pos": "observation.state",
        "pixels/front": "observation.images.front", "pixels/left": "observation.images.left",
    })

command(
    "lerobot_eval", f"--policy.path={out}/tuned/checkpoints/last/pretrained_model", "--policy.device=cpu",
    "--env.type=blank", "--eval.n_episodes=2", "--eval.batch_size=2", "--eval.use_async_envs=false",
    f"--output_dir={out}/eval",
)
answers["success"] = json.loads(Path(f"{out}/eval/eval_info.json").read_text())["overall"]["pc_success"]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[dict, dict[str, str], Path]:
    """lerobot-train from scratch, resumed, and from its checkpoint; lerobot-eval: answers, logs, outputs."""
    root = tmp_path_factory.mktemp("commands")
    write_dataset(root / "data")
    found, log = finish(start(COMMANDS, str(root / "data"), str(root / "out")))
    return found, log, root / "out"


def test_the_commands_run_ours(run):
    """Catches a command that takes the built-in for "pi0", by checking that its model code is never loaded."""
    found, log, _ = run
    assert log.count(TOOK_OVER) == 1
    assert len(found["modules"]) == 5
    assert all("lerobot_pi0.modeling_pi0" in modules for modules in found["modules"])


@pytest.mark.parametrize("name", ["scratch", "tuned", "pretrained"])
def test_checkpoints_are_ours(run, name):
    """Catches a run that was saved by the built-in, or by a save that LeRobot does not call."""
    *_, out = run
    folder = out / name / "checkpoints" / "last" / "pretrained_model"
    files = {file.name for file in folder.iterdir()}
    assert files >= {"config.json", "lerobot_pi0.json", "model.safetensors", "policy_preprocessor.json"}
    config = json.loads((folder / "config.json").read_text())
    assert config["type"] == "pi0"
    assert "text_tokenizer_name" not in config


def test_who_is_frozen(run):
    """Catches a resumed run that freezes what it trained, or a recipe that trains 3 B parameters unasked."""
    *_, out = run
    frozen = {
        name: json.loads((out / name / "checkpoints/last/pretrained_model/config.json").read_text())[
            "train_expert_only"
        ]
        for name in ("scratch", "tuned", "pretrained")
    }
    assert frozen == {"scratch": False, "tuned": False, "pretrained": True}


def test_resume_goes_on(run):
    """Catches a resumed run that starts again at step 0, or loses the optimizer's state."""
    *_, out = run
    steps = sorted(
        int(folder.name) for folder in (out / "scratch" / "checkpoints").iterdir() if not folder.is_symlink()
    )
    assert steps == [1, 2, 3]
    state = json.loads((out / "scratch/checkpoints/last/training_state/training_step.json").read_text())
    assert state["step"] == 3


def test_eval_reports_no_success(run):
    """Catches an evaluation that did not run. (The environment has no goal, so the success rate is 0.)"""
    found, *_ = run
    assert found["success"] == 0.0


def test_an_option_that_is_refused_is_explained():
    """Catches an error in a config's options whose message LeRobot's parser hides."""
    options = ["--policy.type=pi0", "--policy.recipe=open_pi", "--dataset.repo_id=you/cubes"]
    done = subprocess.run(
        [sys.executable, "-m", "lerobot.scripts.lerobot_train", *options],
        capture_output=True, text=True, cwd=Path(__file__).parent, timeout=300,
    )  # fmt: skip
    assert done.returncode != 0
    assert "recipe='open_pi' is not one of lerobot, openpi" in done.stderr
