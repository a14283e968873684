"""Checkpoints with processors, and ways to damage their folders: JSON, statistics, tokenizer, options and adapters."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CAMERAS, DIMS, MICRO_EXPERT, MICRO_VLM, configuration, shake, stats, tiny_config
from raw_frames import TASK, word_tokenizer
from safetensors.torch import load_file, save_file

from lerobot_pi0 import PI0Policy, make_pi0_pre_post_processors
from lerobot_pi0.tools import read_config
from lerobot_pi0.tools.data import build_pipelines
from lerobot_pi0.tools.evaluation.predictions import load_policy

PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"

Mutation = Callable[[Path, random.Random], None]

OPTIONS = {"chunk_size": 4, "n_action_steps": 2, "max_state_dim": 8, "max_action_dim": 8, "tokenizer_max_length": 12}


def make_originals(root: Path) -> dict[str, tuple[Path, torch.Tensor]]:
    """Make a checkpoint folder of each kind, in the sizes of the fixture `micro`, and compute its actions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configuration.PALIGEMMA_PRESETS, "tiny", MICRO_VLM)
        patch.setitem(configuration.EXPERT_PRESETS, "tiny", MICRO_EXPERT)
        tokenizer = word_tokenizer(root / "tokenizer")
        config = tiny_config(CAMERAS[:2], text_tokenizer_name=tokenizer, train_expert_only=True, **OPTIONS)
        torch.manual_seed(0)
        policy = PI0Policy(config, dataset_stats=stats(cameras=CAMERAS[:2]))
        shake(policy)
        save(policy, root / "own")
        as_published(Path(shutil.copytree(root / "own", root / "published")))
        policy = PI0Policy.from_pretrained(root / "own")
        policy.config.pretrained_path = str(root / "own")
        adapted = policy.wrap_with_peft(peft_cli_overrides={"method_type": "LORA", "r": 2})
        shake(adapted)
        PI0Policy.from_pretrained(root / "own").save_pretrained(root / "base")
        adapted.peft_config["default"].base_model_name_or_path = str(root / "base")
        save(adapted, root / "adapter")
        kinds = ("own", "published", "adapter")
        return {kind: (root / kind, act(root / kind)) for kind in kinds}


def as_published(folder: Path) -> Path:
    """Remove the files that only this plugin writes, so that contents cannot be compared with what was saved."""
    for file in folder.glob("lerobot_pi0*.json"):
        file.unlink()
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save(policy, folder: Path) -> None:
    """Save a checkpoint as LeRobot does: the policy, and then its processors."""
    policy.save_pretrained(folder)
    policy.config.save_pretrained(folder) if policy.config.use_peft else None
    for pipeline in make_pi0_pre_post_processors(policy.config, stats(cameras=CAMERAS[:2])):
        pipeline.save_pretrained(folder)


def act(folder: Path) -> torch.Tensor:
    """The actions that a robot would get for one observation."""
    config = read_config(str(folder), ["--device=cpu"])
    policy = load_policy(config) if config.use_peft else PI0Policy.from_pretrained(folder, config=config)
    before, after = build_pipelines(config, device_processor={"device": "cpu"})
    draw = torch.Generator().manual_seed(3)
    frame = {key: torch.rand(3, 16, 16, generator=draw) for key in CAMERAS[:2]}
    frame |= {"observation.state": torch.randn(DIMS, generator=draw), "task": TASK}
    noise = torch.randn(1, policy.config.chunk_size, policy.config.max_action_dim, generator=draw)
    chunk = policy.predict_action_chunk(before(frame), noise=noise)
    return torch.stack([after(action) for action in chunk.unbind(dim=1)], dim=1)


# --- JSON ----------------------------------------------------------------------------------------------


VALUES = [
    None, True, False, -1, 0, 1, 7, 10**30, 0.5, -1e308, "", "x", "cuda", "meta", "float16", "pi05", "../..", [], {},
    [1], ["a"], {"a": 1}, [[[]]], [2, 2], [0, 0], [16, 8], float("nan"), "MEAN_STD", "١",
]  # fmt: skip


def edit_json(file: Path, draw: random.Random) -> None:
    """Change, add or remove something at any depth of a JSON file."""
    content = json.loads(file.read_text())
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = draw.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and draw.random() < 0.7:
            place = place[key]
            continue
        action = draw.choice(["change", "change", "change", "drop", "add"])
        if action == "change":
            place[key] = draw.choice(VALUES)
        elif action == "drop":
            del place[key]
        elif isinstance(place, dict):
            place[draw.choice(["x", "proj_width", "device", "dtype", ""])] = draw.choice(VALUES)
        else:
            place.append(draw.choice(VALUES))
        break
    file.write_text(json.dumps(content))


def cut_json(file: Path, draw: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: draw.randrange(len(data))])


def flip_json(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] = draw.randrange(256)
    file.write_bytes(data)


def replace_json(file: Path, draw: random.Random) -> None:
    texts = ["", "null", "3", "[]", "{}", '"x"', "[" * 10**5, '{"a":' * 10**5, '{"a": ' + "1" * 10**4 + "}", "\0", "{]"]
    file.write_text(draw.choice(texts))


def lose(folder: Path, draw: random.Random) -> None:
    file = draw.choice(sorted(folder.iterdir()))
    file.unlink()
    if draw.random() < 0.3:
        file.mkdir()


# --- tensors and folders --------------------------------------------------------------------------------


def state_file(folder: Path, step: str) -> Path:
    return next(file for file in folder.glob("policy_*.safetensors") if file.stem.endswith(f"_{step}"))


def in_state(step: str, change: Callable[[Path, random.Random], None]) -> Mutation:
    return lambda folder, draw: change(state_file(folder, step), draw)


def in_file(name: str, change: Callable[[Path, random.Random], None]) -> Mutation:
    return lambda folder, draw: change(folder / name, draw)


def flip_bytes(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(draw.choice([1, 1, 8])):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def cut(file: Path, draw: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: draw.choice([0, draw.randrange(len(data)), len(data) - 1])])


def with_tensors(change: Callable[[dict[str, torch.Tensor], random.Random], None]):
    def mutate(file: Path, draw: random.Random) -> None:
        tensors = load_file(file)
        change(tensors, draw)
        save_file(tensors, file)

    return mutate


def drop_tensor(tensors: dict, draw: random.Random) -> None:
    for name in draw.sample(sorted(tensors), draw.choice([1, 1, len(tensors)])):
        del tensors[name]


def rename_tensor(tensors: dict, draw: random.Random) -> None:
    name = draw.choice(sorted(tensors))
    tensors[draw.choice(["x", "action", f"{name}.x", name.upper(), draw.choice(sorted(tensors))])] = tensors.pop(name)


def retype_tensor(tensors: dict, draw: random.Random) -> None:
    name = draw.choice(sorted(tensors))
    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]
    tensors[name] = tensors[name].to(draw.choice(kinds))


def reshape_tensor(tensors: dict, draw: random.Random) -> None:
    name = draw.choice(sorted(tensors))
    x = tensors[name]
    tensors[name] = draw.choice(
        [x[None], x.new_ones(0), x.flatten()[:-1], x.flatten().repeat(2), x.new_ones(())]
    ).contiguous()


def edit_number(tensors: dict, draw: random.Random) -> None:
    name = draw.choice(sorted(tensors))
    x = tensors[name].clone().reshape(-1)
    if not len(x):
        return
    at, values = draw.randrange(len(x)), [float("nan"), float("inf"), -1, 0, 1, 1e30, 7]
    x[at] = draw.choice(values) if x.is_floating_point() else draw.randrange(256)
    tensors[name] = x.view(tensors[name].shape)


STATES = {
    "flipped": flip_bytes, "cut": cut, "a tensor lost": with_tensors(drop_tensor),
    "renamed": with_tensors(rename_tensor), "of another type": with_tensors(retype_tensor),
    "of another shape": with_tensors(reshape_tensor), "another number": with_tensors(edit_number),
}  # fmt: skip
JSONS = {"edited": edit_json, "cut": cut_json, "flipped": flip_json, "replaced": replace_json}
STEPS = ("normalizer_processor", "unnormalizer_processor", "tokenizer_processor")


def both_statistics(folder: Path, draw: random.Random) -> None:
    """Make the same change in preprocessor and postprocessor, so that the files do not contradict each other."""
    factor = draw.choice([0.5, 1.1, 3.0])
    for step in ("normalizer_processor", "unnormalizer_processor"):
        file = state_file(folder, step)
        save_file({name: x * factor if name == "action.std" else x for name, x in load_file(file).items()}, file)


def others(folder: Path, draw: random.Random) -> None:
    """Statistics of another dataset, in one file or in both."""
    for step in draw.sample(("normalizer_processor", "unnormalizer_processor"), draw.choice([1, 2])):
        file = state_file(folder, step)
        tensors = load_file(file)
        save_file({name: x + draw.choice([0.5, 1]) if "mean" in name else x for name, x in tensors.items()}, file)


def exchange_files(folder: Path, draw: random.Random) -> None:
    a, b = draw.sample(sorted(file.name for file in folder.iterdir() if file.suffix in (".json", ".safetensors")), 2)
    (folder / a).rename(folder / "x")
    (folder / b).rename(folder / a)
    (folder / "x").rename(folder / b)


def sort_keys(folder: Path, draw: random.Random) -> None:
    name = draw.choice(["config.json", PRE, POST])
    content = json.loads((folder / name).read_text())
    if name == "config.json":
        content["input_features"] = dict(reversed(content["input_features"].items()))
    (folder / name).write_text(json.dumps(content))


FOLDER = {
    **{f"{name} {kind}": in_file(name, x) for name in (PRE, POST, "config.json") for kind, x in JSONS.items()},
    **{f"{step} {kind}": in_state(step, x) for step in STEPS for kind, x in STATES.items()},
    "statistics of both": both_statistics, "statistics of others": others, "a file lost": lose,
    "files exchanged": exchange_files, "keys in another order": sort_keys,
}  # fmt: skip
OURS = {
    f"{name} {kind}": in_file(name, x)
    for name in ("lerobot_pi0.json", "lerobot_pi0_manifest.json")
    for kind, x in JSONS.items()
}
ADAPTER = {
    **{f"adapter_model.safetensors {kind}": in_file("adapter_model.safetensors", x) for kind, x in STATES.items()},
    **{f"adapter_config.json {kind}": in_file("adapter_config.json", x) for kind, x in JSONS.items()},
}
