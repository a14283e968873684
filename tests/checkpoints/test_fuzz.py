"""Mutated checkpoints, hundreds of them: each loads to the weights that were meant, or raises a CheckpointError.

Every kind of damage is drawn from a seed. What is done to a checkpoint of others, which carries no digests, is what
can be seen in it: names, shapes, kinds, lengths, numbers that are not finite. In one that ours wrote any byte counts.
"""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import micro_policy
from folders import cut_json, edit_json, flip_json, lose, replace_json
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lerobot_pi0 import PI0Policy
from lerobot_pi0.checkpoints.errors import CheckpointError
from lerobot_pi0.checkpoints.names import EXPERT_HEAD, LM_HEAD
from lerobot_pi0.control.bounds import BoundsError

pytestmark = pytest.mark.usefixtures("micro")

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DRAWS = 20
"""Mutations of each kind."""

Weights = dict[str, torch.Tensor]
Mutation = Callable[[Path, random.Random], torch.dtype | None]
"""Damages a folder; returns the dtype that numbers were rounded to, if that is all that happened to them."""


# --- weights ------------------------------------------------------------------------------------------------


def read(folder: Path) -> tuple[Weights, dict[str, str] | None]:
    with safe_open(folder / WEIGHTS, "pt") as opened:
        metadata = opened.metadata()
    return load_file(folder / WEIGHTS), metadata


def header(folder: Path) -> tuple[dict, bytes]:
    data = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def write_header(folder: Path, content: dict, numbers: bytes) -> None:
    text = json.dumps(content).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + numbers)


def edit_entry(folder: Path, draw: random.Random, edit: Callable[[dict], None]) -> None:
    content, numbers = header(folder)
    edit(content[draw.choice([name for name in content if name != "__metadata__"])])
    write_header(folder, content, numbers)


def drop(folder: Path, draw: random.Random) -> None:
    tensors, metadata = read(folder)
    for name in draw.sample(sorted(tensors), draw.choice([1, 1, 2, 10, len(tensors) - 1])):
        del tensors[name]
    save_file(tensors, folder / WEIGHTS, metadata)


def rename(folder: Path, draw: random.Random) -> None:
    tensors, metadata = read(folder)
    old = draw.choice(sorted(tensors))
    parts = old.split(".")
    i = draw.randrange(len(parts))
    parts[i : i + 1] = draw.choice(
        [[], [parts[i], parts[i]], [parts[i][:-1] or "x"], ["more", parts[i]], [str(draw.randrange(4))], ["lm_head"]]
    )
    new = draw.choice([".".join(parts), draw.choice(sorted(tensors)), "x"])
    value = tensors.pop(old)
    tensors[new] = value  # may take another one's place
    save_file(tensors, folder / WEIGHTS, metadata)


def reshape(folder: Path, draw: random.Random) -> None:
    tensors, metadata = read(folder)
    name = draw.choice(sorted(tensors.keys() - {EXPERT_HEAD}))
    x = tensors[name]
    shapes = [x.flatten(), x[None], x[..., :-1], x[:1], x.T if x.ndim == 2 else x[0], x.new_ones(0)]
    tensors[name] = draw.choice([y for y in shapes if y.shape != x.shape]).contiguous().clone()
    save_file(tensors, folder / WEIGHTS, metadata)


def reshape_by_header(folder: Path, draw: random.Random) -> None:
    def edit(entry: dict) -> None:
        shape = entry["shape"]
        options = [
            shape[::-1],
            [*shape, 1],
            [1, *shape],
            shape[1:],
            [2, *shape],
            [*shape[:-1], shape[-1] + 1],
            [-1],
            [],
        ]
        entry["shape"] = draw.choice(options)

    edit_entry(folder, draw, edit)


FLOATS = [torch.float64, torch.float16, torch.bfloat16, torch.float32]
OTHERS = [torch.int32, torch.int64, torch.uint8, torch.int8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]


def retype_all(folder: Path, draw: random.Random) -> torch.dtype:
    dtype = draw.choice(FLOATS)
    tensors, metadata = read(folder)
    save_file({name: x.to(dtype) for name, x in tensors.items()}, folder / WEIGHTS, metadata)
    return dtype


def retype_one(folder: Path, draw: random.Random) -> None:
    tensors, metadata = read(folder)
    name = draw.choice(sorted(tensors.keys() - {EXPERT_HEAD}))
    tensors[name] = (tensors[name] * 8).to(draw.choice(OTHERS))
    save_file(tensors, folder / WEIGHTS, metadata)


def retype_by_header(folder: Path, draw: random.Random) -> None:
    kinds = ["I32", "U32", "F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "f32", "", 3, None]
    edit_entry(folder, draw, lambda entry: entry.update(dtype=draw.choice(kinds)))


def move_by_header(folder: Path, draw: random.Random) -> None:
    def edit(entry: dict) -> None:
        start, end = entry["data_offsets"]
        options = [[start + 4, end + 4], [start, end - 4], [end, start], [start], [-1, end], [start, 2**62], [0, 0]]
        entry["data_offsets"] = draw.choice(options)

    edit_entry(folder, draw, edit)


def not_finite(folder: Path, draw: random.Random) -> None:
    tensors, metadata = read(folder)
    name = draw.choice(sorted(tensors.keys() - {EXPERT_HEAD}))
    value = draw.choice([float("nan"), float("inf"), float("-inf")])
    tensors[name].view(-1)[draw.randrange(tensors[name].numel())] = value
    save_file(tensors, folder / WEIGHTS, metadata)


def add(folder: Path, draw: random.Random) -> None:
    tensors, metadata = read(folder)
    twin = draw.choice(sorted(tensors))
    name = draw.choice(["x", "model.x.weight", twin + "_scale", twin.removeprefix("model."), twin.upper()])
    tensors[name] = tensors[twin].clone() + 1
    save_file(tensors, folder / WEIGHTS, metadata)


def cut(folder: Path, draw: random.Random) -> None:
    data = (folder / WEIGHTS).read_bytes()
    length = draw.choice([draw.randrange(20), draw.randrange(len(data)), len(data) - 1 - draw.randrange(9)])
    (folder / WEIGHTS).write_bytes(data[:length])


def lengthen(folder: Path, draw: random.Random) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(draw.choice([data + b"\0", data + data, b"\0" + data, b"\0" * 64, data[8:]]))


def pad_header(folder: Path, draw: random.Random) -> None:
    """Spaces after the header, and its entries in another order: the same checkpoint."""
    content, numbers = header(folder)
    names = draw.sample(sorted(content), len(content))
    text = json.dumps({name: content[name] for name in names}).encode() + b" " * draw.randrange(64)
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + numbers)


def flip_header(folder: Path, draw: random.Random) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    position = draw.randrange(8 + int.from_bytes(data[:8], "little"))
    data[position] = draw.choice([data[position] ^ (1 << draw.randrange(8)), draw.randrange(256)])
    (folder / WEIGHTS).write_bytes(data)


def flip_numbers(folder: Path, draw: random.Random) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    for _ in range(draw.choice([1, 1, 3])):
        data[draw.randrange(start, len(data))] ^= 1 << draw.randrange(8)
    (folder / WEIGHTS).write_bytes(data)


def edit_value(folder: Path, draw: random.Random) -> None:
    tensors, metadata = read(folder)
    x = tensors[draw.choice(sorted(tensors.keys() - {EXPERT_HEAD}))].view(-1)
    x[draw.randrange(len(x))] += draw.choice([1e-6, 1, -3, 1e30])
    save_file(tensors, folder / WEIGHTS, metadata)


def equal_shapes(tensors: Weights, draw: random.Random) -> tuple[str, str]:
    pairs = [(a, b) for a in tensors for b in tensors if a < b and tensors[a].shape == tensors[b].shape]
    return draw.choice(sorted(pair for pair in pairs if EXPERT_HEAD not in pair))


def swap(folder: Path, draw: random.Random) -> None:
    tensors, metadata = read(folder)
    a, b = equal_shapes(tensors, draw)
    tensors[a], tensors[b] = tensors[b], tensors[a]
    save_file(tensors, folder / WEIGHTS, metadata)


def swap_by_header(folder: Path, draw: random.Random) -> None:
    a, b = equal_shapes(load_file(folder / WEIGHTS), draw)
    content, numbers = header(folder)
    content[a]["data_offsets"], content[b]["data_offsets"] = content[b]["data_offsets"], content[a]["data_offsets"]
    write_header(folder, content, numbers)


def spoil_digests(folder: Path, draw: random.Random) -> None:
    """The digests themselves: all that may be lost with them is the check."""
    tensors, metadata = read(folder)
    key = "lerobot_pi0.digests"
    text = metadata[key]
    metadata[key] = draw.choice(
        ["", "[]", "{}", "3", "null", text[: draw.randrange(len(text))], text[::-1], "[" * 10**5]
    )
    save_file(tensors, folder / WEIGHTS, metadata)


# --- JSON ---------------------------------------------------------------------------------------------------


def of(name: str, change: Callable[[Path, random.Random], None]) -> Mutation:
    return lambda folder, draw: change(folder / name, draw)


# --- the run ------------------------------------------------------------------------------------------------

SEEN = {  # in any checkpoint
    "drop": drop, "rename": rename, "reshape": reshape, "reshape by header": reshape_by_header, "retype": retype_all,
    "retype one": retype_one, "retype by header": retype_by_header, "move by header": move_by_header,
    "not finite": not_finite, "add": add, "cut": cut, "lengthen": lengthen, "pad header": pad_header,
    "config edited": of("config.json", edit_json), "config cut": of("config.json", cut_json),
    "config flipped": of("config.json", flip_json), "config replaced": of("config.json", replace_json), "lose": lose,
}  # fmt: skip
OWN = {  # in checkpoints that ours wrote
    "flip header": flip_header, "flip numbers": flip_numbers, "edit value": edit_value, "swap": swap,
    "swap by header": swap_by_header, "spoil digests": spoil_digests,
    "plugin file edited": of("lerobot_pi0.json", edit_json), "plugin file cut": of("lerobot_pi0.json", cut_json),
    "plugin file flipped": of("lerobot_pi0.json", flip_json),
    "plugin file replaced": of("lerobot_pi0.json", replace_json),
}  # fmt: skip
SHARDED = {
    "index edited": of(INDEX, edit_json), "index cut": of(INDEX, cut_json), "index flipped": of(INDEX, flip_json),
    "index replaced": of(INDEX, replace_json), "lose": lose,
}  # fmt: skip
CASES = (
    [("others'", name) for name in SEEN]
    + [("ours", name) for name in SEEN | OWN]
    + [("ours, trained weights alone", name) for name in ("drop", "rename", "retype", *OWN)]
    + [("shards", name) for name in SHARDED]
)
NEVER = {"retype", "pad header"}
"""What leaves a checkpoint as it was, when there are no digests that say otherwise."""
ALWAYS = {"reshape", "retype one", "not finite", "cut", "lengthen", "config cut", "swap by header", "index cut"}
"""What has to be refused each time."""


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, tuple[Path, Weights]]:
    """A checkpoint of each kind, and the weights that it means."""
    with pytest.MonkeyPatch.context() as patch:
        import conftest

        patch.setitem(conftest.configuration.PALIGEMMA_PRESETS, "tiny", conftest.MICRO_VLM)
        patch.setitem(conftest.configuration.EXPERT_PRESETS, "tiny", conftest.MICRO_EXPERT)
        root = tmp_path_factory.mktemp("originals")
        policy = micro_policy(flow_samples=2)
        weights = {name: p.detach().clone() for name, p in policy.named_parameters()}
        policy.save_pretrained(root / "ours")
        for name in ("others'", "shards"):
            shutil.copytree(root / "ours", root / name)
            (root / name / "lerobot_pi0.json").unlink()
        tensors = load_file(root / "ours" / WEIGHTS)
        save_file(tensors, root / "others'" / WEIGHTS, metadata={"format": "pt"})
        (root / "shards" / WEIGHTS).unlink()
        save_torch_state_dict(tensors, root / "shards", max_shard_size="8KB")
        config = policy.config
        config.train_expert_only = config.save_expert_only = True
        tuned = PI0Policy.from_pretrained(root / "ours", config=config)
        tuned.save_pretrained(root / "ours, trained weights alone")
    return {folder.name: (folder, weights) for folder in root.iterdir()}


def difference(policy: PI0Policy, expected: Weights, rounded: torch.dtype | None) -> list[str]:
    """Parameters that are not what the checkpoint meant, in the dtype that the configuration asks for."""
    found = dict(policy.named_parameters())
    assert found.keys() == expected.keys()
    wrong = []
    for name, x in expected.items():
        meant = x if rounded is None else x.to(rounded)
        if not torch.equal(found[name].detach(), meant.to(getattr(torch, policy.config.dtype))):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize(("origin", "kind"), CASES, ids=[" - ".join(case) for case in CASES])
def test_mutations(originals, tmp_path, origin, kind):
    """Catches weights that are silently others, and damage that ends in an error of Python's or a library's own."""
    source, expected = originals[origin]
    mutate = (SEEN | OWN | SHARDED)[kind]
    outcomes: Counter[str] = Counter()
    for seed in range(DRAWS):
        folder = tmp_path / str(seed)
        shutil.copytree(source, folder)
        rounded = mutate(folder, random.Random(f"{origin} {kind} {seed}"))
        try:
            policy = PI0Policy.from_pretrained(folder)
        except (
            CheckpointError,
            BoundsError,
        ) as error:  # BoundsError: the edited file asks for bounds, and cannot have them
            assert len(str(error)) > 20
            outcomes["refused"] += 1
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}")
        else:
            assert difference(policy, expected, rounded) == [], f"seed {seed}"
            outcomes["loaded"] += 1
        shutil.rmtree(folder)
    assert outcomes.total() == DRAWS
    if kind in ALWAYS:
        assert outcomes["loaded"] == 0
    elif kind in NEVER and (origin == "others'" or kind == "pad header"):
        assert outcomes["refused"] == 0


def test_there_are_enough():
    """Catches a run that shrinks below what was promised: 500 mutations."""
    assert len(CASES) * DRAWS >= 500


def test_heads_are_what_they_seem(originals):
    """Catches mutations that hit nothing but what is not read: the originals hold every weight, and one that is not."""
    for origin, (folder, expected) in originals.items():
        names = set().union(*(load_file(file) for file in folder.glob("*.safetensors")))
        if origin == "ours, trained weights alone":
            assert names < expected.keys()
        else:
            assert names - expected.keys() == {LM_HEAD, EXPERT_HEAD}
