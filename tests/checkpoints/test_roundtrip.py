"""Checkpoints move between this plugin and LeRobot's built-in, with processors and adapters, and between robots."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lerobot.policies.pi0.modeling_pi0 as builtin
import pytest
import torch
from conftest import (
    ACTION,
    CAMERAS,
    DIMS,
    OBS_LANGUAGE_TOKENS,
    OBS_STATE,
    BuiltinPI0Config,
    PI0Config,
    draws,
    gradients,
    make_batch,
    relative,
    shake,
    small_builtin,
    small_policy,
    stats,
    tiny_config,
    without_plugin,
)
from full_size import OnMeta, theirs  # noqa: F401  a fixture
from lerobot.configs import PreTrainedConfig
from lerobot.optim.optimizers import load_optimizer_state, save_optimizer_state
from lerobot.policies import make_policy, make_pre_post_processors
from peft import PeftModel
from raw_frames import sample, word_tokenizer
from safetensors.torch import load_file

from lerobot_pi0 import PI0Policy, make_pi0_pre_post_processors
from lerobot_pi0.checkpoints.names import EMBEDDING, LM_HEAD, published_state


def shaken_policy(**options) -> PI0Policy:
    """Weights that all matter; halved, as rounding grows in layers as steep as fresh ones.

    What is compared with the built-in wants steps of a length that float32 adds up well, which 1/3 is not.
    """
    torch.manual_seed(2)
    policy = small_policy(**options)
    shake(policy)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(0.5)
    return policy


def chunk(policy, batch: dict, dims: int = DIMS) -> torch.Tensor:
    noise = draws(0, len(batch[OBS_STATE]))[0][:, 0]
    with torch.no_grad():
        return policy.predict_action_chunk(batch, noise=noise)[..., :dims]


def own_weights(policy: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights by name; of the built-in's, those that ours has too."""
    return {name: x.detach().clone() for name, x in policy.state_dict().items() if "lm_head" not in name}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name].float(), expected[name].float())] == []


OPTIONS = {
    "defaults": {},
    "expert only": {"train_expert_only": True, "flow_samples": 4},
    "every option of the plugin": {
        "flow_samples": 2, "save_tokenizer": False, "text_tokenizer_name": "bytes", "freeze_vision_encoder": True,
        "empty_cameras": 1, "num_inference_steps": 5,
    },
    "bfloat16": {"dtype": "bfloat16"},
}  # fmt: skip


# --- policies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ours_to_ours(small, tmp_path, options):
    """Catches a weight or an option that is lost on the way: chunks are bitwise equal."""
    policy, batch = shaken_policy(**options), make_batch()
    policy.save_pretrained(tmp_path)
    again = PI0Policy.from_pretrained(tmp_path)
    assert_equal(own_weights(again), own_weights(policy))
    assert torch.equal(chunk(again, batch), chunk(policy, batch))
    assert again.config == policy.config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_builtin_to_ours(small, tmp_path, dtype):
    """Catches a tensor of LeRobot's own file that lands in another place, or an option of it that is not understood."""
    policy, batch = small_builtin(dtype=dtype, num_inference_steps=4), make_batch()
    with without_plugin():
        policy.save_pretrained(tmp_path)
    ours = PI0Policy.from_pretrained(tmp_path)
    stored = {name: x.to(getattr(torch, dtype)) for name, x in own_weights(policy).items()}  # some are float32 there
    assert_equal(own_weights(ours), stored)
    assert ours.config.num_inference_steps == 4
    if dtype == "float32":
        assert relative(chunk(ours, batch), chunk(policy.eval(), batch)) < 1e-5


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ours_to_builtin(small, tmp_path, capsys, options):
    """Catches a key too few or too many: the built-in swallows that, even with strict=True, and acts at random."""
    policy, batch = shaken_policy(**options), make_batch()
    policy.save_pretrained(tmp_path)
    with without_plugin():
        again = builtin.PI0Policy.from_pretrained(tmp_path, strict=True)
    assert "All keys loaded successfully!" in capsys.readouterr().out
    assert type(again.config) is BuiltinPI0Config
    assert_equal(own_weights(again), own_weights(policy))
    heads = [again.model.paligemma_with_expert.paligemma.lm_head.weight, again.state_dict()[EMBEDDING]]
    assert torch.equal(*heads)
    if policy.config.dtype == "float32":
        assert relative(chunk(policy, batch), chunk(again.eval(), batch)) < 1e-5


def test_there_and_back(small, tmp_path):
    """Catches a change that one direction makes and the other hides: ours → built-in → ours is bitwise the same."""
    policy = shaken_policy()
    policy.save_pretrained(tmp_path / "ours")
    with without_plugin():
        builtin.PI0Policy.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = PI0Policy.from_pretrained(tmp_path / "theirs")
    assert_equal(own_weights(again), own_weights(policy))
    assert torch.equal(chunk(again, make_batch()), chunk(policy, make_batch()))


def test_full_size(theirs):  # noqa: F811
    """Catches a name or shape at full size that the built-in does not have, without 7 GB of weights."""
    with torch.device("meta"):
        published = published_state(OnMeta().state_dict())
    expected = {name: tuple(x.shape) for name, x in theirs.state_dict().items() if name != EMBEDDING}
    assert {name: tuple(x.shape) for name, x in published.items()} == expected
    assert LM_HEAD in published


# --- processors ---------------------------------------------------------------------------------------------

BUILTIN_PROCESSORS = """
import functools, sys, torch
from lerobot.utils.import_utils import register_third_party_plugins
register_third_party_plugins()
import lerobot.policies.pi0.processor_pi0 as module
from lerobot.configs import PreTrainedConfig
from lerobot.policies import make_pre_post_processors
from lerobot.processor import TokenizerProcessorStep
ours, theirs, tokenizer, out = sys.argv[1:]
given = torch.load(f"{out}/given.pt", weights_only=False)
module.TokenizerProcessorStep = lambda **options: TokenizerProcessorStep(**options | {"tokenizer_name": tokenizer})

def outputs(pipelines):
    before, after = pipelines
    assert type(before.steps[3]) is TokenizerProcessorStep
    batch = before(dict(given["sample"]))
    return {"batch": {k: v for k, v in batch.items() if torch.is_tensor(v)}, "actions": after(given["actions"])}

config = PreTrainedConfig.from_pretrained(ours)
assert type(config).__module__ == "lerobot.policies.pi0.configuration_pi0"
results = {"ours": outputs(make_pre_post_processors(config, pretrained_path=ours))}
made = make_pre_post_processors(config, dataset_stats=given["stats"])
results["theirs"] = outputs(made)
for pipeline in made:
    pipeline.save_pretrained(theirs)
torch.save(results, f"{out}/results.pt")
"""


@pytest.fixture(scope="module")
def processors(tmp_path_factory) -> SimpleNamespace:
    """Pipelines that ours saved, read by LeRobot without the plugin, and pipelines that it saved; their outputs."""
    root = tmp_path_factory.mktemp("processors")
    words = word_tokenizer(root / "tokenizer")
    config = tiny_config(text_tokenizer_name=words, tokenizer_max_length=12, use_relative_actions=True)
    config.paligemma_variant, config.action_expert_variant = "gemma_2b", "gemma_300m"  # the built-in's own
    given = {"sample": sample(), "actions": torch.randn(1, DIMS), "stats": stats()}
    torch.save(given, root / "given.pt")
    config.save_pretrained(root / "ours")
    made = make_pi0_pre_post_processors(config, dataset_stats=given["stats"])
    for pipeline in made:
        pipeline.save_pretrained(root / "ours")
    run = subprocess.run(
        [sys.executable, "-c", BUILTIN_PROCESSORS, root / "ours", root / "theirs", words, root],
        env=os.environ | {"LEROBOT_PI0_TAKEOVER": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    results = torch.load(root / "results.pt", weights_only=False)
    return SimpleNamespace(root=root, config=config, given=given, made=made, results=results)


def outputs(pipelines, given: dict) -> dict:
    before, after = pipelines
    batch = before(dict(given["sample"]))
    return {"batch": {k: v for k, v in batch.items() if torch.is_tensor(v)}, "actions": after(given["actions"])}


def assert_same_outputs(found: dict, expected: dict) -> None:
    assert found["batch"].keys() == expected["batch"].keys() >= {OBS_STATE, OBS_LANGUAGE_TOKENS, ACTION}
    for key, x in expected["batch"].items():
        torch.testing.assert_close(found["batch"][key], x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["actions"], expected["actions"], rtol=1e-5, atol=1e-5)


def test_our_processors_in_lerobot(processors):
    """Catches a saved step that LeRobot's own classes do not take, such as the tokenizer's files in its state."""
    assert_same_outputs(processors.results["ours"], outputs(processors.made, processors.given))


def test_lerobots_processors_in_ours(processors):
    """Catches a pipeline of the built-in that ours refuses, or that normalises or tokenizes otherwise with ours."""
    loaded = make_pre_post_processors(processors.config, pretrained_path=str(processors.root / "theirs"))
    assert_same_outputs(outputs(loaded, processors.given), processors.results["theirs"])
    assert_same_outputs(processors.results["theirs"], processors.results["ours"])


# --- adapters -----------------------------------------------------------------------------------------------


def dataset(dims: int = DIMS, cameras=CAMERAS) -> SimpleNamespace:
    """What `make_policy` reads of a dataset's metadata."""
    names = [f"joint_{i}" for i in range(dims)]
    columns = {key: {"dtype": "float32", "shape": (dims,), "names": names} for key in (OBS_STATE, ACTION)}
    for key in cameras:
        columns[key] = {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channels"]}
    return SimpleNamespace(features=columns, stats=stats(dims, cameras))


def shaken_adapter(model) -> None:
    """Fresh adapters are zero and change nothing."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn(p.shape, generator=draw) * 0.03)


def wrapped(policy, base: Path, **options):
    """As `lerobot-train --peft.…` wraps it."""
    policy.config.pretrained_path = str(base)
    torch.manual_seed(1)
    model = policy.wrap_with_peft(peft_cli_overrides={"method_type": "LORA", "r": 4, **options})
    shaken_adapter(model)
    return model.eval()


def save_adapter(model, folder: Path) -> None:
    """As LeRobot's save_checkpoint does it."""
    model.save_pretrained(folder)
    model.config.save_pretrained(folder)


def reload_adapter(folder: Path):
    """As `--policy.path` of an adapter's folder does it."""
    config = PreTrainedConfig.from_pretrained(folder)
    assert config.use_peft
    config.pretrained_path = folder
    return make_policy(config, ds_meta=dataset()).eval()


@pytest.fixture
def base(small, tmp_path) -> tuple[Path, PI0Policy]:
    policy = shaken_policy(train_expert_only=True, num_inference_steps=4)
    policy.save_pretrained(tmp_path / "base")
    return tmp_path / "base", PI0Policy.from_pretrained(tmp_path / "base")


def test_our_adapters(base, tmp_path):
    """Catches an adapter that is saved without its base's name, or that loads beside the weights it is for."""
    folder, policy = base
    batch = make_batch()
    plain = chunk(policy, batch)
    model = wrapped(policy, folder)
    expected = chunk(model, batch)
    save_adapter(model, tmp_path / "adapter")
    again = reload_adapter(tmp_path / "adapter")
    assert isinstance(again, PeftModel)
    assert torch.equal(chunk(again, batch), expected)
    assert relative(expected, plain) > 0.01


def test_every_adapter_counts(base):
    """Catches a layer that is used by its weight alone: an adapter on it is trained in vain and changes no action."""
    folder, policy = base
    model, batch, (noise, time) = wrapped(policy, folder), make_batch(), draws(0, 2)
    model.train()
    model.forward(batch, noise=noise, time=time)[0].backward()
    adapters = {name for name, p in model.named_parameters() if p.requires_grad}
    assert adapters == {name for name, _ in model.named_parameters() if "lora_" in name or "modules_to_save" in name}
    assert len(adapters) == 2 * (7 * 3) + 2 * 5
    found = gradients(model)
    assert {name for name in adapters if not (name in found and found[name].any())} == set()


def test_merged_adapters_are_the_same_policy(base, tmp_path):
    """Catches an adapter that is applied to another part of a layer's input than the layer's own matrix is."""
    folder, policy = base
    model, batch = wrapped(policy, folder), make_batch()
    expected = chunk(model, batch)
    merged = model.merge_and_unload()
    merged.config.use_peft = False
    merged.save_pretrained(tmp_path / "merged")
    assert relative(chunk(PI0Policy.from_pretrained(tmp_path / "merged"), batch), expected) < 1e-5


TARGETS = {
    "default": {},
    "attention of both": {"target_modules": r".*\.self_attn\.(q|k|v|o)_proj"},
    "everything linear": {"target_modules": "all-linear"},
    "full modules": {"full_training_modules": ["state_proj", "action_in_proj"]},
}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_the_built_ins_adapters(base, tmp_path, targets):
    """Catches an adapter of the built-in that loads onto other layers of ours, or in part."""
    folder, ours = base
    batch = make_batch()
    with without_plugin():
        theirs = builtin.PI0Policy.from_pretrained(folder)
        assert_equal(own_weights(theirs), own_weights(ours))
        model = wrapped(theirs, folder, **targets)
        expected = chunk(model, batch)
        save_adapter(model, tmp_path / "adapter")
    again = reload_adapter(tmp_path / "adapter")
    found, meant = (
        {name: p.detach() for name, p in x.named_parameters() if "lora_" in name or "modules_to_save" in name}
        for x in (again, model)
    )
    assert found
    assert_equal(found, {name: p for name, p in meant.items() if "lm_head" not in name})  # which no action depends on
    assert relative(chunk(again, batch), expected) < 1e-5
    assert relative(expected, chunk(ours, batch)) > 0.01


# --- robots -------------------------------------------------------------------------------------------------

BIG, LITTLE = (14, CAMERAS), (6, CAMERAS[1:])


def robot_batch(robot: tuple[int, tuple[str, ...]], seed: int = 0) -> dict:
    return make_batch(seed, dims=robot[0], cameras=robot[1])


def fine_tune(folder: Path, robot: tuple[int, tuple[str, ...]], output: Path) -> PI0Policy:
    """`lerobot-train --policy.type=pi0 --policy.pretrained_path=…` on a dataset of the robot: three steps."""
    config = PI0Config(
        pretrained_path=folder, device="cpu", image_resolution=(32, 32), tokenizer_max_length=12, num_inference_steps=2
    )
    policy = make_policy(config, ds_meta=dataset(*robot)).train()
    optimizer = torch.optim.Adam(policy.get_optim_params(), 1e-3)
    for seed in range(3):
        optimizer.zero_grad()
        policy.forward(robot_batch(robot, seed))[0].backward()
        optimizer.step()
    policy.eval().save_pretrained(output)
    return PI0Policy.from_pretrained(output)


def test_one_set_of_weights_for_several_robots(small, tmp_path):
    """Catches shapes that depend on the robot: 14 joints and 3 cameras, then 6 and 2, and back to 14 and 3."""
    start = shaken_policy(dims=14)
    start.save_pretrained(tmp_path / "start")
    folder, shapes = tmp_path / "start", {name: p.shape for name, p in start.named_parameters()}
    for i, robot in enumerate((LITTLE, BIG)):
        policy = fine_tune(folder, robot, tmp_path / str(i))
        folder = tmp_path / str(i)
        assert {name: p.shape for name, p in policy.named_parameters()} == shapes
        assert policy.config.output_features[ACTION].shape == (robot[0],)
        assert {*policy.config.image_features} == {*robot[1]}  # those that the checkpoint knows keep its slots
        assert policy.select_action(robot_batch(robot)).shape == (2, robot[0])
        frozen = {name: x for name, x in own_weights(start).items() if ".paligemma." in name}
        assert_equal({name: own_weights(policy)[name] for name in frozen}, frozen)


def test_another_robot_by_path_is_refused(small, tmp_path):
    """Catches `--policy.path` with a dataset of another robot: LeRobot keeps the checkpoint's state of 14 joints."""
    small_policy(dims=14).save_pretrained(tmp_path)
    config = PreTrainedConfig.from_pretrained(tmp_path)
    config.pretrained_path = tmp_path
    with pytest.raises(ValueError, match=r"'observation\.state'.*6.*\(14,\).*--policy\.pretrained_path"):
        make_policy(config, ds_meta=dataset(*LITTLE))


def test_padding_carries_no_loss(small):
    """Catches a small robot that is taught the zeros behind its joints: no gradient, no loss, nothing learnt there."""
    policy, (noise, time) = shaken_policy(dims=6).train(), draws(0, 2)
    batch = robot_batch((6, CAMERAS))
    loss, _ = policy.forward(batch, noise=noise, time=time)
    loss.backward()
    out = policy.model.action_out_proj
    assert out.weight.grad[:6].any(dim=1).all()
    assert not out.weight.grad[6:].any()
    assert not out.bias.grad[6:].any()
    assert not policy.model.state_proj.weight.grad[:, 6:].any()
    with torch.no_grad():
        out.weight[6:] += 5
        out.bias[6:] -= 5
        policy.model.state_proj.weight[:, 6:] *= 3
    assert torch.equal(policy.forward(batch, noise=noise, time=time)[0], loss)


# --- a run that the built-in began --------------------------------------------------------------------------


def began(policy, folder: Path) -> None:
    """A checkpoint of LeRobot's training after a step."""
    optimizer = torch.optim.AdamW(policy.get_optim_params(), 1e-3)
    policy.train()
    policy.forward(make_batch())[0].backward()
    optimizer.step()
    (folder / "training_state").mkdir()
    save_optimizer_state(optimizer, folder / "training_state")
    (folder / "training_state" / "training_step.json").write_text('{"step": 1}')
    policy.save_pretrained(folder / "pretrained_model")


@pytest.mark.parametrize("frozen", [False, True], ids=["everything trained", "VLM frozen"])
def test_a_run_of_the_built_in_is_not_resumed(small, tmp_path, caplog, frozen):
    """Catches an optimizer whose moments are given to other weights: it is refused, and a line says what to do."""
    with without_plugin():
        began(small_builtin(train_expert_only=frozen), tmp_path)
    with caplog.at_level(logging.WARNING):
        policy = PI0Policy.from_pretrained(tmp_path / "pretrained_model", dataset_meta=dataset())
    assert "cannot be resumed" in caplog.text
    assert "--policy.path=" in caplog.text
    optimizer = torch.optim.AdamW(policy.get_optim_params(), 1e-3)
    with pytest.raises(ValueError, match="List length mismatch"):
        load_optimizer_state(optimizer, tmp_path / "training_state")
    assert optimizer.state_dict()["state"] == {}


def test_a_run_of_ours_is_resumed(small, tmp_path, caplog):
    """Catches moments that are restored to other parameters, and a warning where all is well."""
    policy = small_policy(train_expert_only=True)
    began(policy, tmp_path)
    with caplog.at_level(logging.WARNING):
        again = PI0Policy.from_pretrained(tmp_path / "pretrained_model", dataset_meta=dataset())
    assert "resumed" not in caplog.text
    optimizer = torch.optim.AdamW(again.get_optim_params(), 1e-3)
    load_optimizer_state(optimizer, tmp_path / "training_state")
    moments = load_file(tmp_path / "training_state" / "optimizer_state.safetensors")
    for i, p in enumerate(again.get_optim_params()):
        assert optimizer.state[p]["exp_avg"].shape == p.shape
        assert torch.equal(optimizer.state[p]["exp_avg"], moments[f"state/{i}/exp_avg"])


def test_config_of_the_built_in_parses_ours(small, tmp_path):
    """Catches a config.json that only this plugin can read: all options of the plugin are in a file of its own."""
    small_policy(**OPTIONS["every option of the plugin"]).save_pretrained(tmp_path)
    with without_plugin():
        config = PreTrainedConfig.from_pretrained(tmp_path)
    assert type(config) is BuiltinPI0Config
    assert config.num_inference_steps == 5
    assert json.loads((tmp_path / "lerobot_pi0.json").read_text())["flow_samples"] == 2
