"""A checkpoint is either right or refused; it loads without a random number, and a crash never leaves half of one."""

import contextlib
import gc
import json
import logging
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import micro_policy
from huggingface_hub import save_torch_state_dict
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lerobot_pi0 import PI0Policy
from lerobot_pi0.checkpoints import errors, source, writing
from lerobot_pi0.checkpoints.checkpoint import Checkpoint
from lerobot_pi0.checkpoints.errors import (
    CheckpointConfigError,
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    MismatchedCheckpointError,
    WrongPolicyError,
)
from lerobot_pi0.checkpoints.names import EMBEDDING, EXPERT_HEAD, LM_HEAD, canonical_name
from lerobot_pi0.checkpoints.writing import finish_interrupted_save

pytestmark = pytest.mark.usefixtures("micro")

WEIGHTS = "model.safetensors"
Q_PROJ = "model.paligemma_with_expert.gemma_expert.model.layers.0.self_attn.q_proj.weight"

# A config.json as LeRobot wrote it before 0.4.
BEFORE_04 = json.loads("""
{"type": "pi0", "n_obs_steps": 1,
 "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
 "input_features": {}, "output_features": {}, "chunk_size": 50, "n_action_steps": 50, "max_state_dim": 32,
 "max_action_dim": 32, "resize_imgs_with_padding": [224, 224], "empty_cameras": 0, "adapt_to_pi_aloha": false,
 "use_delta_joint_actions_aloha": false, "tokenizer_max_length": 48, "proj_width": 1024, "num_steps": 10,
 "use_cache": true, "freeze_vision_encoder": true, "train_expert_only": false, "optimizer_lr": 2.5e-05,
 "optimizer_betas": [0.9, 0.95], "optimizer_eps": 1e-08, "optimizer_weight_decay": 1e-10,
 "scheduler_warmup_steps": 1000, "scheduler_decay_steps": 30000, "scheduler_decay_lr": 2.5e-06}
""")


def weights(policy: PI0Policy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


def assert_same_weights(policy: PI0Policy, expected: dict[str, torch.Tensor]) -> None:
    found = weights(policy)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.fixture
def saved(tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint that ours wrote, and its weights."""
    policy = micro_policy()
    policy.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", weights(policy)


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Weights as somebody else stores them: without digests."""
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- refusals -----------------------------------------------------------------------------------------------


def changed(**changes):
    """Spoil a checkpoint by tensors that take the place of others; None takes them out."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS) | changes
        rewrite(folder, {name: x for name, x in tensors.items() if x is not None})

    return spoil


def renamed(*pairs: tuple[str, str], without: str = "no such part"):
    def spoil(folder: Path) -> None:
        tensors = {}
        for name, x in load_file(folder / WEIGHTS).items():
            for old, new in pairs:
                name = name.replace(old, new)
            if without not in name:
                tensors[name] = x
        rewrite(folder, tensors)

    return spoil


def written(name: str, content: str | bytes | dict):
    def spoil(folder: Path) -> None:
        text = json.dumps(content) if isinstance(content, dict) else content
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)

    return spoil


def cut(name: str, part: float):
    def spoil(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * part)])

    return spoil


def without(*names: str):
    def spoil(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return spoil


def edited(name: str, **changes):
    return lambda folder: edit_json(folder / name, **changes)


def adapter(*gone: str):
    def spoil(folder: Path) -> None:
        without(WEIGHTS, "lerobot_pi0.json", *gone)(folder)
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        save_file({"base_model.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")

    return spoil


def only_a_vlm(folder: Path) -> None:
    rewrite(folder, {name: x for name, x in load_file(folder / WEIGHTS).items() if ".paligemma." in name})


PI05 = (("action_time_mlp", "time_mlp"), ("input_layernorm.weight", "input_layernorm.dense.weight"))
NAN, INF, HUGE = (torch.full((8,), value) for value in (float("nan"), float("inf"), 1.0))
BIAS = "model.state_proj.bias"

REFUSALS = {
    "missing": (changed(**{BIAS: None}), MismatchedCheckpointError, f"1 missing: {BIAS}.*strict=False"),
    "many missing": (renamed(without=".vision_tower."), MismatchedCheckpointError, r"missing: .* and \d+ more"),
    "unexpected": (
        changed(**{"model.more.weight": torch.ones(2)}), MismatchedCheckpointError, "1 unexpected: model.more.weight"
    ),
    "shape": (
        changed(**{BIAS: torch.ones(9)}), MismatchedCheckpointError, rf"{BIAS} is F32 \(9,\), expected \(8,\)"
    ),
    "transposed": (changed(**{Q_PROJ: torch.ones(8, 16)}), MismatchedCheckpointError, r"\(8, 16\), expected \(16, 8\)"),
    "integers": (changed(**{BIAS: torch.ones(8, dtype=torch.int32)}), MismatchedCheckpointError, "I32.*floating-point"),
    "eight bits": (changed(**{BIAS: torch.ones(8).to(torch.float8_e4m3fn)}), MismatchedCheckpointError, "F8_E4M3"),
    "a scalar": (changed(**{BIAS: torch.ones(())}), MismatchedCheckpointError, r"\(\), expected \(8,\)"),
    "the same twice": (
        changed(**{"state_proj.bias": torch.ones(8)}), MismatchedCheckpointError, "are the same tensor"
    ),
    "NaN": (changed(**{BIAS: NAN}), CorruptCheckpointError, f"{BIAS} .* holds NaN or infinity"),
    "infinity": (changed(**{BIAS: INF}), CorruptCheckpointError, "holds NaN or infinity"),
    "infinite in float32": (changed(**{BIAS: HUGE.double() * 1e300}), CorruptCheckpointError, "NaN or infinity"),
    "cut": (cut(WEIGHTS, 0.5), CorruptCheckpointError, r"\d+ bytes.*not a complete safetensors.* again"),
    "cut by a byte": (cut(WEIGHTS, 0.99999), CorruptCheckpointError, "not a complete safetensors"),
    "empty": (cut(WEIGHTS, 0), CorruptCheckpointError, r"0 bytes.*not a complete safetensors"),
    "a pointer to a large file": (
        written(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 8\n"),
        CorruptCheckpointError, "not a complete safetensors",
    ),
    "no tensors": (lambda folder: rewrite(folder, {}), WrongPolicyError, "72 missing"),
    "another policy": (edited("config.json", type="act"), WrongPolicyError, "type='act', expected 'pi0'"),
    "π₀.₅": (edited("config.json", type="pi05"), WrongPolicyError, "π₀.₅, another network"),
    "π₀-FAST": (edited("config.json", type="pi0_fast"), WrongPolicyError, "π₀-FAST, another network"),
    "weights of π₀.₅": (renamed(*PI05, without="state_proj"), WrongPolicyError, "weights of π₀.₅.*policy.type=pi05"),
    "weights of π₀-FAST": (only_a_vlm, WrongPolicyError, "no action expert: .* VLM, or of π₀-FAST"),
    "an adapter": (adapter(), WrongPolicyError, "PEFT adapter, not a model.*merge_adapter.py"),
    "an adapter without a config": (adapter("config.json"), WrongPolicyError, "PEFT adapter, not a model"),
    "before 0.4": (written("config.json", BEFORE_04), WrongPolicyError, r"before 0\.4 .*proj_width.*lerobot/pi0_base"),
    "no config": (without("config.json"), CheckpointNotFoundError, "holds no config.json.*pretrained_model"),
    "no weights": (without(WEIGHTS), CheckpointNotFoundError, "holds no model.safetensors"),
    "cut config": (cut("config.json", 0.5), CorruptCheckpointError, "config.json is no JSON"),
    "a list": (written("config.json", "[1]"), CorruptCheckpointError, "a list where an object"),
    "no text": (written("config.json", b"\xff\xfe{"), CorruptCheckpointError, "is no JSON"),
    "endless nesting": (written("config.json", "[" * 100_000), CorruptCheckpointError, "is no JSON"),
    "a preset that is none": (
        edited("config.json", paligemma_variant="gemma_9b"), CheckpointConfigError, "gemma_9b.*is not one of"
    ),
    "an unknown option": (edited("config.json", speed=9), CheckpointConfigError, "speed"),
    "an option of another type": (edited("config.json", chunk_size="many"), CheckpointConfigError, "chunk_size"),
    "features that are none": (edited("config.json", input_features=None), CheckpointConfigError, "does not describe"),
    "another preset": (
        edited("config.json", max_action_dim=9), MismatchedCheckpointError, r"misfits.*max_action_dim"
    ),
    "a newer plugin": (edited("lerobot_pi0.json", wings=2), CheckpointConfigError, "wings.*pip install --upgrade"),
    "cut plugin file": (cut("lerobot_pi0.json", 0.5), CorruptCheckpointError, "lerobot_pi0.json is no JSON"),
    "plugin option of another type": (
        edited("lerobot_pi0.json", flow_samples="few"), CheckpointConfigError, "flow_samples"
    ),
    "plugin option out of range": (edited("lerobot_pi0.json", flow_samples=0), CheckpointConfigError, "at least 1"),
    "half a base": (edited("lerobot_pi0.json", base={"id": "a"}), CheckpointConfigError, "lerobot_pi0.json.*revision"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_refusals(saved, case, strict):
    """Catches wrong weights that load, and an error that does not say what was found and what to do."""
    spoil, kind, message = REFUSALS[case]
    forgiven = ("missing", "many missing", "unexpected")
    folder, _ = saved
    spoil(folder)
    if not strict and case in forgiven:
        assert isinstance(PI0Policy.from_pretrained(folder, strict=False), PI0Policy)
        return
    with pytest.raises(kind, match=f"(?s){message}") as caught:
        PI0Policy.from_pretrained(folder, strict=strict)
    assert type(caught.value) is kind
    assert str(folder) in str(caught.value)


def test_a_config_at_hand_hides_nothing(saved):
    """Catches a check of config.json that is skipped when LeRobot has parsed a config already (`make_policy`)."""
    folder, _ = saved
    config = micro_policy().config
    edit_json(folder / "config.json", type="act")
    with pytest.raises(WrongPolicyError, match="type='act'"):
        PI0Policy.from_pretrained(folder, config=config)


@pytest.mark.parametrize("source", ["nothing/here", "no/such/folder/at/all", "nothing"])
def test_a_path_that_is_not_there(source, tmp_path):
    """Catches random weights, or a traceback of the Hub's client, where a path is misspelt."""
    with pytest.raises(CheckpointNotFoundError) as caught:
        PI0Policy.from_pretrained(source, cache_dir=tmp_path)
    assert source in str(caught.value)
    with pytest.raises(FileNotFoundError):  # what callers who know nothing of this plugin expect
        PI0Policy.from_pretrained(tmp_path / "nothing", cache_dir=tmp_path)


@pytest.mark.parametrize("options", [{}, {"local_files_only": True}], ids=["offline mode", "local files only"])
def test_no_network(tmp_path, options):
    """Catches a robot without a network that starts with random weights: what to do is said."""
    with pytest.raises(CheckpointNotFoundError, match=r"(?s)not in the local cache.*downloaded folder"):
        PI0Policy.from_pretrained("lerobot/pi0_base", cache_dir=tmp_path, **options)


@pytest.mark.parametrize("stage", ["first tensor", "last tensor"])
def test_no_policy_is_left(saved, stage):
    """Catches a policy that was half loaded when the error came, and lives on."""
    folder, _ = saved
    name = list(load_file(folder / WEIGHTS))[0 if stage == "first tensor" else -1]
    changed(**{name: load_file(folder / WEIGHTS)[name] * float("nan")})(folder)
    found = None
    with contextlib.suppress(CorruptCheckpointError):  # pytest.raises would keep the frames alive
        found = PI0Policy.from_pretrained(folder)
    assert found is None
    gc.collect()
    assert [x for x in gc.get_objects() if type(x) is PI0Policy] == []


def test_what_is_not_strict_is_listed(saved, caplog):
    """Catches `strict=False` that hides what is random, that leaves zeros or `meta`, or that spoils what was there."""
    folder, expected = saved
    gone = [BIAS, Q_PROJ, EMBEDDING, Q_PROJ.replace("self_attn.q_proj", "input_layernorm")]
    gone += [name for name in expected if name.endswith("position_embedding.weight")]
    changed(**dict.fromkeys([*gone, LM_HEAD]))(folder)
    with caplog.at_level(logging.WARNING):
        policy = PI0Policy.from_pretrained(folder, strict=False)
    (line,) = [r.getMessage() for r in caplog.records if "strict=False" in r.getMessage()]
    assert f"{len(gone)} missing" in line
    assert all(name in line for name in gone)
    found = weights(policy)
    assert {name for name in expected if not torch.equal(found[name], expected[name])} == set(gone)
    assert all(x.isfinite().all() for x in found.values())
    assert all(found[name].std() > 0 for name in (Q_PROJ, EMBEDDING, gone[-1]))


# --- layouts ------------------------------------------------------------------------------------------------


def moved(*pairs: tuple[str, str]):
    """Tensors under the names of another writer."""

    def rename(name: str) -> str:
        for old, new in pairs:
            name = name.replace(old, new)
        return name

    return lambda tensors: {rename(name): x for name, x in tensors.items()}


def dropped(*names: str):
    return lambda tensors: {name: x for name, x in tensors.items() if name not in names}


OLD_NESTING = (
    (".paligemma.model.language_model.", ".paligemma.language_model.model."),
    (".paligemma.lm_head.", ".paligemma.language_model.lm_head."),
    (".paligemma.model.vision_tower.", ".paligemma.vision_tower."),
    (".paligemma.model.multi_modal_projector.", ".paligemma.multi_modal_projector."),
)
LAYOUTS = {
    "as saved": dropped(),
    "embedding under its own name": moved((LM_HEAD, EMBEDDING)),
    "embedding under both names": lambda tensors: tensors | {EMBEDDING: tensors[LM_HEAD].clone()},
    "without the expert's head": dropped(EXPERT_HEAD),
    "without `model.`": lambda tensors: {name.removeprefix("model."): x for name, x in tensors.items()},
    "transformers before 4.52": moved(*OLD_NESTING),
    "transformers 5.5": moved((".paligemma.model.language_model.", ".paligemma.model.language_model.model.")),
    "openpi's, of transformers before 4.52": lambda tensors: {
        name.removeprefix("model."): x for name, x in moved(*OLD_NESTING)(dropped(EXPERT_HEAD)(tensors)).items()
    },
    "float64": lambda tensors: {name: x.double() for name, x in tensors.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_known_layouts(saved, layout):
    """Catches a spelling that is refused though it is known, and one that loads into the wrong place."""
    folder, expected = saved
    rewrite(folder, LAYOUTS[layout](load_file(folder / WEIGHTS)))
    (folder / "lerobot_pi0.json").unlink()
    assert_same_weights(PI0Policy.from_pretrained(folder), expected)


def test_names_of_today_stay():
    """Catches a rule for old names that also turns a name of today into another."""
    names = [*dict(micro_policy().named_parameters()), LM_HEAD, EXPERT_HEAD]
    assert [canonical_name(name) for name in names] == names


@pytest.fixture
def sharded(saved) -> tuple[Path, dict[str, torch.Tensor]]:
    folder, expected = saved
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_torch_state_dict(tensors, folder, max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder, expected


def test_shards(sharded):
    """Catches an index that is not followed, or the first shard taken for the whole."""
    assert_same_weights(PI0Policy.from_pretrained(sharded[0]), sharded[1])


@pytest.mark.parametrize("strict", [True, False])
def test_a_missing_shard(sharded, strict):
    """Catches a download that stopped between two files: not even strict=False makes it random weights."""
    folder, _ = sharded
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointNotFoundError, match=f"lacks {shard.name}, which its index names"):
        PI0Policy.from_pretrained(folder, strict=strict)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{"])
def test_an_index_that_is_none(sharded, index):
    """Catches an AttributeError from the depths where an index is broken."""
    folder, _ = sharded
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CorruptCheckpointError, match=r"index\.json"):
        PI0Policy.from_pretrained(folder)


def test_a_new_save_replaces_shards(sharded):
    """Catches a folder in which the old shards outlive, and win over, the weights that were saved last."""
    folder, _ = sharded
    policy = micro_policy(seed=1)
    policy.save_pretrained(folder)
    assert_same_weights(PI0Policy.from_pretrained(folder), weights(policy))


# --- how it loads -------------------------------------------------------------------------------------------


def test_nothing_is_drawn(saved):
    """Catches random weights that are made to be overwritten: no random number is drawn, nothing stays on `meta`."""
    folder, expected = saved
    torch.manual_seed(3)
    before = torch.get_rng_state()
    policy = PI0Policy.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert {x.device.type for x in [*policy.parameters(), *policy.buffers()]} == {"cpu"}
    assert_same_weights(policy, expected)


def test_parameters_are_not_views_of_the_file(saved):
    """Catches weights that change when the file does, and memory that is held for more than a parameter."""
    folder, expected = saved
    policy = PI0Policy.from_pretrained(folder)
    for p in policy.parameters():
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()
    with (folder / WEIGHTS).open("r+b") as opened:
        opened.write(bytes((folder / WEIGHTS).stat().st_size))
    assert_same_weights(policy, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_log_line(saved, caplog, dtype):
    """Catches a user who cannot tell what was loaded, in which dtype, and how long it took."""
    folder, _ = saved
    edit_json(folder / "config.json", dtype=dtype)
    with caplog.at_level(logging.INFO):
        policy = PI0Policy.from_pretrained(folder)
    assert {str(p.dtype) for p in policy.parameters()} == {f"torch.{dtype}"}
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("loaded")]
    assert line.startswith(f"loaded 72 of 72 tensors (0.00 B parameters, {dtype}) from {folder} in ")
    assert line.endswith(" s")


# --- digests ------------------------------------------------------------------------------------------------


def test_flipped_bytes_are_found(saved):
    """Catches a bad disk or cable: one bit anywhere in the numbers of a checkpoint that ours wrote."""
    folder, _ = saved
    data = (folder / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    unread = load_file(folder / WEIGHTS)[EXPERT_HEAD].numel() * 4  # zeros that nothing reads, so nothing checks
    draw = random.Random(0)
    loaded = 0
    for _ in range(60):
        flipped = bytearray(data)
        flipped[draw.randrange(start, len(data))] ^= 1 << draw.randrange(8)
        (folder / WEIGHTS).write_bytes(flipped)
        try:
            PI0Policy.from_pretrained(folder)
            loaded += 1
        except CorruptCheckpointError as error:
            assert "is not what was written" in str(error) or "holds NaN" in str(error)
    assert loaded / 60 < 3 * unread / (len(data) - start)


@pytest.mark.parametrize(
    ("one", "other"), [("k_proj", "v_proj"), ("gate_proj", "up_proj"), ("input_layernorm", "post_attention_layernorm")]
)
def test_swapped_tensors_are_found(saved, one, other):
    """Catches two tensors of equal shape in each other's place: names, shapes and sums are all right then."""
    folder, _ = saved
    tensors = load_file(folder / WEIGHTS)
    with safe_open(folder / WEIGHTS, "pt") as opened:
        metadata = opened.metadata()
    first = next(name for name in tensors if one in name and "gemma_expert" in name)
    second = first.replace(one, other)
    tensors[first], tensors[second] = tensors[second], tensors[first]
    save_file(tensors, folder / WEIGHTS, metadata=metadata)
    with pytest.raises(CorruptCheckpointError, match="its digest differs"):
        PI0Policy.from_pretrained(folder)


# --- saving -------------------------------------------------------------------------------------------------


def test_a_gathered_state(tmp_path):
    """Catches FSDP's gathered state dict being ignored for the shards that a rank holds itself."""
    policy = micro_policy(dtype="bfloat16")
    gathered = {name: x.float() + 1 for name, x in policy.state_dict().items()}
    policy.save_pretrained(tmp_path, state_dict=gathered)
    stored = load_file(tmp_path / WEIGHTS)
    assert torch.equal(stored[BIAS], gathered[BIAS])
    assert_same_weights(PI0Policy.from_pretrained(tmp_path), {k: x.bfloat16() for k, x in gathered.items()})


def test_nothing_else_is_left(tmp_path):
    """Catches temporary files that are pushed to the Hub with the checkpoint, or found by `*.json`."""
    for seed in range(2):
        micro_policy(seed).save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "config.json",
        "lerobot_pi0.json",
        "lerobot_pi0_manifest.json",
        WEIGHTS,
    }


# --- save_expert_only ---------------------------------------------------------------------------------------

EXPERT_ONLY = {"train_expert_only": True, "save_expert_only": True}


def load(folder: Path | str, **options) -> PI0Policy:
    """As `make_policy` does it with options of the command line."""
    config = Checkpoint.open(folder).config() if Path(folder).is_dir() else micro_policy().config
    for name, value in options.items():
        setattr(config, name, value)
    return PI0Policy.from_pretrained(folder, config=config)


def train(policy: PI0Policy) -> dict[str, torch.Tensor]:
    """Move what is trained, and return all weights."""
    with torch.no_grad():
        for p in policy.get_optim_params():
            p.add_(torch.randn_like(p))
    return weights(policy)


@pytest.fixture
def tuned(saved, tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of the trained weights alone, and all the weights of its policy."""
    policy = load(saved[0], **EXPERT_ONLY)
    expected = train(policy)
    policy.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned", expected


def test_expert_only(saved, tuned):
    """Catches a file that holds the frozen 2.9 B too, one that lacks what was trained, or one that cannot be loaded."""
    folder, expected = tuned
    trained = {name for name in expected if ".paligemma." not in name}
    assert set(load_file(folder / WEIGHTS)) == trained
    base = json.loads((folder / "lerobot_pi0.json").read_text())["base"]
    assert base.keys() == {"id", "revision", "digest"}
    assert base["id"] == str(saved[0].resolve())
    policy = PI0Policy.from_pretrained(folder)
    assert_same_weights(policy, expected)
    assert policy.config.save_expert_only is True


def test_options_saved_over_an_expert(tuned):
    """Catches a config that is saved into the checkpoint's folder and forgets the base of its weights."""
    policy = PI0Policy.from_pretrained(tuned[0])
    policy.config.num_inference_steps = 3
    policy.config.save_pretrained(tuned[0])
    again = PI0Policy.from_pretrained(tuned[0])
    assert_same_weights(again, tuned[1])
    assert again.config.num_inference_steps == 3


def test_expert_only_again(tuned, tmp_path):
    """Catches a second fine-tuning whose base would be the first one's file, which holds no VLM."""
    policy = PI0Policy.from_pretrained(tuned[0])
    expected = train(policy)
    policy.save_pretrained(tmp_path / "again")
    assert_same_weights(PI0Policy.from_pretrained(tmp_path / "again"), expected)
    policy.save_pretrained(tuned[0])  # as a resumed run may
    assert_same_weights(PI0Policy.from_pretrained(tuned[0]), expected)


def test_expert_only_becomes_whole(saved, tuned, tmp_path):
    """Catches save_expert_only=False that is refused as a changed base, or a whole checkpoint that still needs one."""
    policy = load(tuned[0], save_expert_only=False)
    policy.save_pretrained(tmp_path / "whole")
    shutil.rmtree(saved[0])
    assert_same_weights(PI0Policy.from_pretrained(tmp_path / "whole"), tuned[1])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"train_expert_only": True}, {"train_expert_only": False}),
        ({"train_expert_only": False, "freeze_vision_encoder": True}, {"train_expert_only": True}),
    ],
    ids=["thawed", "frozen later"],
)
def test_expert_only_with_other_parts_frozen(saved, tmp_path, first, second):
    """Catches weights that were trained once and frozen later: the base has other ones under their names."""
    policy = load(saved[0], **first, save_expert_only=True)
    train(policy)
    policy.save_pretrained(tmp_path / "first")
    policy = load(tmp_path / "first", **second)
    expected = train(policy)
    policy.save_pretrained(tmp_path / "second")
    assert_same_weights(PI0Policy.from_pretrained(tmp_path / "second"), expected)


def test_a_changed_base_is_refused(saved, tuned):
    """Catches an expert that is run on a VLM it was not trained with, or on none."""
    base, folder = saved[0], tuned[0]
    micro_policy(seed=1).save_pretrained(base)
    with pytest.raises(CorruptCheckpointError, match="the base has changed since"):
        PI0Policy.from_pretrained(folder)
    shutil.rmtree(base)
    with pytest.raises(CheckpointNotFoundError, match=str(base)):
        PI0Policy.from_pretrained(folder)


def test_a_trained_weight_is_not_taken_from_the_base(tuned):
    """Catches a tensor that was lost from the file, and for which the base has an untrained one."""
    changed(**{Q_PROJ: None})(tuned[0])
    with pytest.raises(CorruptCheckpointError, match="or weights were taken out"):
        PI0Policy.from_pretrained(tuned[0])


def test_expert_only_needs_a_base(saved, tmp_path):
    """Catches frozen weights that are written nowhere: the policy is from scratch, or would overwrite its base."""
    with pytest.raises(ValueError, match="save_expert_only=False"):
        micro_policy(**EXPERT_ONLY).save_pretrained(tmp_path / "scratch")
    with pytest.raises(ValueError, match="save_expert_only=False"):
        micro_policy(**EXPERT_ONLY).get_optim_params()  # before a step that would be lost
    with pytest.raises(ValueError, match="save to another folder"):
        load(saved[0], **EXPERT_ONLY).save_pretrained(saved[0])
    assert_same_weights(PI0Policy.from_pretrained(saved[0]), saved[1])


def test_a_base_on_the_hub(saved, tmp_path, monkeypatch):
    """Catches a base that is fetched by name alone: its owner pushes other weights, and the expert sits on them."""
    hub = tmp_path / "hub"
    shutil.copytree(saved[0], hub / "one")

    def download(repo, filename, revision=None, **kwargs):
        if repo != "someone/base":
            raise LocalEntryNotFoundError("offline")
        file = hub / (revision or (hub / "main").read_text()) / filename
        if not file.parent.is_dir():
            raise RepositoryNotFoundError("no such revision")
        if not file.is_file():
            raise EntryNotFoundError(filename)
        return str(file)

    monkeypatch.setattr(source, "hf_hub_download", download)
    (hub / "main").write_text("one")
    policy = load("someone/base", **EXPERT_ONLY)
    expected = train(policy)
    policy.save_pretrained(tmp_path / "tuned")
    base = json.loads((tmp_path / "tuned" / "lerobot_pi0.json").read_text())["base"]
    assert (base["id"], base["revision"]) == ("someone/base", "one")
    micro_policy(seed=1).save_pretrained(hub / "two")
    (hub / "main").write_text("two")
    assert_same_weights(PI0Policy.from_pretrained(tmp_path / "tuned"), expected)


# --- a crash in the middle ----------------------------------------------------------------------------------

DIED, DONE = 9, 0
Identity = tuple[int, int, float]


def versions() -> list[PI0Policy]:
    """Policies that differ in weights, in config.json and in the plugin's file."""
    return [micro_policy(seed, n_action_steps=seed + 1, flow_samples=seed + 1) for seed in range(3)]


def identity(policy: PI0Policy) -> Identity:
    """What tells the versions apart; all parts of it come from different files."""
    total = sum(x.double().sum().item() for x in weights(policy).values())
    return policy.config.n_action_steps, policy.config.flow_samples or 1, total


def in_a_child(action) -> int:
    """Run in a forked process; its exit status."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(DONE)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def save_and_die(policy: PI0Policy, folder: Path, step: int, torn: bool) -> None:
    """Save, and end the process at a step: before an operation on files, or when a file is half written."""
    count = 0

    def dying(owner, name: str, position: int | None = None) -> None:
        original = getattr(owner, name)

        def operation(*args, **kwargs):
            nonlocal count
            count += 1
            if count > step:
                if torn and position is not None:
                    original(*args, **kwargs)
                    os.truncate(args[position], Path(args[position]).stat().st_size // 2)
                os._exit(DIED)
            return original(*args, **kwargs)

        setattr(owner, name, operation)

    for name in ("unlink", "replace"):
        dying(Path, name)
    dying(Path, "write_text", 0)
    dying(writing, "write_tensors", 1)
    policy.save_pretrained(folder)


def crash(policy: PI0Policy, folder: Path, step: int, torn: bool = False) -> bool:
    """Whether the save died at the step; it ends by itself where there are no more."""
    status = in_a_child(lambda: save_and_die(policy, folder, step, torn))
    assert status in (DIED, DONE)
    return status == DIED


@pytest.mark.parametrize("torn", [False, True], ids=["between two operations", "in the middle of a file"])
@pytest.mark.parametrize("same_config", [False, True], ids=["another config", "the same config"])
def test_a_crash_at_every_step(tmp_path, torn, same_config):
    """Catches an order of operations with a moment in which weights, config and options are not of one version."""
    old, new = (micro_policy(seed) for seed in (0, 1)) if same_config else versions()[:2]
    expected = [identity(old), identity(new)]
    old.save_pretrained(tmp_path / "old")
    found: list[Identity] = []
    for step in range(100):
        folder = tmp_path / str(step)
        shutil.copytree(tmp_path / "old", folder)
        died = crash(new, folder, step, torn)
        found.append(identity(PI0Policy.from_pretrained(folder)))
        if not died:
            break
    assert 12 < len(found) < 40
    changes = [expected.index(x) for x in found]
    assert changes == sorted(changes)
    assert (changes[0], changes[-1]) == (0, 1)


@pytest.mark.parametrize("torn", [False, True], ids=["between two operations", "in the middle of a file"])
def test_a_crash_of_the_first_save(tmp_path, torn):
    """Catches a folder that never held a checkpoint and looks like one."""
    new = versions()[1]
    found = []
    for step in range(100):
        folder = tmp_path / str(step)
        folder.mkdir()
        died = crash(new, folder, step, torn)
        try:
            found.append(identity(PI0Policy.from_pretrained(folder)) == identity(new))
        except CheckpointNotFoundError:
            found.append(None)
        if not died:
            break
    assert found == sorted(found, key=bool)
    assert set(found) == {None, True}


def test_a_crash_after_a_crash(tmp_path):
    """Catches a save that begins by deleting what the one before had committed but not finished."""
    old, new, newest = versions()
    old.save_pretrained(tmp_path / "old")
    crashed: list[Path] = []
    for step in range(100):
        folder = tmp_path / f"first {step}"
        shutil.copytree(tmp_path / "old", folder)
        if not crash(new, folder, step):
            break
        crashed.append(folder)
    for folder in crashed[-5::2]:  # the commit is among the last operations
        shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)
        before = identity(PI0Policy.from_pretrained(tmp_path / "copy"))
        shutil.rmtree(tmp_path / "copy")
        for step in range(100):
            work = tmp_path / "work"
            shutil.copytree(folder, work)
            died = crash(newest, work, step)
            assert identity(PI0Policy.from_pretrained(work)) in (before, identity(newest))
            shutil.rmtree(work)
            if not died:
                break


def test_kill_at_random_moments(tmp_path):
    """Catches a torn checkpoint that no list of operations foresees: SIGKILL while a process saves again and again."""
    policies = versions()[:2]
    expected = [identity(policy) for policy in policies]
    folder, draw = tmp_path / "saved", random.Random(0)
    policies[0].save_pretrained(folder)
    started = time.perf_counter()
    policies[0].save_pretrained(folder)
    took = time.perf_counter() - started

    def save_for_ever() -> None:
        while True:
            for policy in policies:
                policy.save_pretrained(folder)

    seen = []
    while len(seen) < 40 or (len(set(seen)) < 2 and len(seen) < 200):  # however slow other work makes the saves
        child = os.fork()
        if child == 0:
            try:
                save_for_ever()
            finally:
                os._exit(1)
        time.sleep(took * draw.uniform(0.1, 10))  # a process that has just been forked saves more slowly
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        seen.append(expected.index(identity(PI0Policy.from_pretrained(folder))))
    assert set(seen) == {0, 1}


def leave_unfinished(folder: Path) -> PI0Policy:
    """A save that was committed, and cut off before its files had their names; returns the policy that it is of."""
    old, new = versions()[:2]
    for step in range(100):
        old.save_pretrained(folder)
        crash(new, folder, step)
        if json.loads((folder / "config.json").read_text())["n_action_steps"] == new.config.n_action_steps:
            break
    assert (folder / f"{WEIGHTS}.new").exists()
    return new


def test_two_processes_finish_the_same_save(tmp_path, monkeypatch):
    """Catches ranks that start from a folder with an unfinished save, and take each other's files away."""
    folder = tmp_path / "saved"
    new = leave_unfinished(folder)
    opened = writing.metadata_of

    def late(file):
        writing.metadata_of = opened
        finish_interrupted_save(folder)  # the other process, between our look and our reading
        return opened(file)

    monkeypatch.setattr(writing, "metadata_of", late)
    assert identity(PI0Policy.from_pretrained(folder)) == identity(new)


def test_every_error_is_a_checkpoint_error():
    """Catches an error kind that a caller who catches CheckpointError does not get."""
    kinds = [x for x in vars(errors).values() if isinstance(x, type) and issubclass(x, Exception)]
    assert len(kinds) == 7
    assert all(issubclass(kind, CheckpointError) for kind in kinds)
