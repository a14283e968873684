"""Training on cached contexts: the same losses and gradients as with the VLM, without it, and no others' contexts."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from cached_world import CHUNK, EPISODES, FRAMES, SIZES, batches, cache, norm, run_of, step, write_policy, write_world
from conftest import CAMERAS, PEFT_CLI, relative, tiny_config
from lerobot.datasets import EpisodeAwareSampler, LeRobotDataset
from lerobot.utils.constants import ACTION, OBS_STATE
from progress import bars

from lerobot_pi0 import PI0Policy
from lerobot_pi0.inputs.samples import IS_PAD, ObservationError
from lerobot_pi0.kernels import absent
from lerobot_pi0.kernels.cpu_linear import BFLOAT16_IS_SLOW
from lerobot_pi0.tools import main
from lerobot_pi0.tools.cache import fitting, spread
from lerobot_pi0.training.context_store import ContextCache, ContextCacheError, read_manifest

BATCH = 4


@pytest.fixture(autouse=True)
def logs(monkeypatch) -> None:
    """The command sets logging up anew, which would take it away from pytest."""
    monkeypatch.setattr("lerobot_pi0.tools.init_logging", lambda: None)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A policy, a dataset, and its contexts: as computed in float32, in bfloat16, in 8 bits, of every third frame."""
    folder = tmp_path_factory.mktemp("contexts")
    write_world(folder)
    assert cache(folder, "float32", f"--batch_size={BATCH}") == 0
    assert cache(folder, "bfloat16", f"--batch_size={BATCH}", "--policy.dtype=bfloat16") == 0
    assert cache(folder, "8bits", "--bits=8") == 0
    assert cache(folder, "third", "--every=3") == 0
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_steps(world, dtype):
    """Catches contexts of another frame, prompt, precision or padding: losses and gradients of every batch are
    equal bit for bit, as contexts were computed in these batches. K, known actions and masked steps go along."""
    options = {"dtype": dtype, "flow_samples": 3, "rtc_training_max_delay": 2, "mask_padded_actions": True}
    (own, dataset, before), (ours, cached, prepare) = (
        run_of(world / "base", world / "data", **options),
        run_of(world / "base", world / dtype / "dataset", context_cache=str(world / dtype), **options),
    )
    pairs = list(zip(batches(dataset, before, BATCH), batches(cached, prepare, BATCH), strict=True))
    assert len(pairs) == -(-EPISODES * FRAMES // BATCH)
    for theirs, mine in pairs:
        for key in (ACTION, OBS_STATE, IS_PAD, "index"):
            assert torch.equal(mine[key], theirs[key]), key
        (expected, wanted), (loss, found) = step(own, theirs), step(ours, mine)
        assert torch.equal(loss, expected)
        assert found.keys() == wanted.keys() and not any(".paligemma." in name for name in found)
        assert all(torch.equal(found[name], grad) for name, grad in wanted.items())


WIDENED = 6e-2  # a large batch is widened to float32 there, a small one is not: contexts differ by more roundings


@pytest.mark.parametrize(
    ("dtype", "name", "bound", "most"),
    [
        ("float32", "float32", 1e-5, 1e-5),
        ("bfloat16", "bfloat16", 2e-2, WIDENED if BFLOAT16_IS_SLOW else 4e-2),
        ("float32", "8bits", 2e-2, 0.1),
    ],
)
def test_other_batches(world, dtype, name, bound, most):
    """Catches contexts that depend on the batch in which they were computed, and 8 bits that cost too much.

    Weights are random here, with sharp attention, which makes more of a rounding than trained weights do.
    """
    options = {"dtype": dtype}
    own, dataset, before = run_of(world / "base", world / "data", **options)
    ours, cached, prepare = run_of(
        world / "base", world / name / "dataset", context_cache=str(world / name), **options
    )  # fmt: skip
    for theirs, mine in zip(batches(dataset, before, 3), batches(cached, prepare, 3), strict=True):
        (expected, wanted), (loss, found) = step(own, theirs), step(ours, mine)
        assert relative(loss, expected) < bound
        assert relative(norm(found), norm(wanted)) < bound
        error = norm({name: found[name] - grad for name, grad in wanted.items()}) / norm(wanted)
        assert error < most


def test_some_frames(world):
    """Catches a chunk whose steps are those of the cached frames, an index that finds another frame's context, and a
    sampler that meets frames that are not there."""
    recorded = LeRobotDataset(
        "test/tiny", root=world / "data", delta_timestamps={ACTION: [i / 10 for i in range(CHUNK)]}
    )
    some = LeRobotDataset("test/tiny", root=world / "third/dataset")
    rows = [0, 3, 6, 8, 11, 16, 19]
    assert len(some) == some.meta.total_frames == len(rows)
    for slot, row in enumerate(rows):
        ours, theirs = some[slot], recorded[row]
        for key in (ACTION, OBS_STATE, IS_PAD, "timestamp", "frame_index", "episode_index", "task_index", "task"):
            assert np.array_equal(np.asarray(ours[key]), np.asarray(theirs[key])), key
        assert ours["index"] == slot
    part = LeRobotDataset("test/tiny", root=world / "third/dataset", episodes=[1])  # as eval_split chooses episodes
    ends = (part.meta.episodes[f"dataset_{end}_index"] for end in ("from", "to"))
    sampler = EpisodeAwareSampler(*ends, [1], absolute_to_relative_idx=part.absolute_to_relative_idx)
    assert [int(part[i]["index"]) for i in sampler] == [3, 4]
    whole, third = ContextCache(world / "float32"), ContextCache(world / "third")
    device = torch.device("cpu")
    for mine, theirs in zip(third.read(range(7), 13, device), whole.read(rows, 13, device), strict=True):
        assert all(relative(a, b) < 1e-5 for a, b in zip(mine, theirs, strict=True))
    policy, dataset, prepare = run_of(world / "base", world / "third/dataset", context_cache=str(world / "third"))
    assert all(torch.isfinite(step(policy, batch)[0]) for batch in batches(dataset, prepare, 3))


def test_the_vlm_is_not_there(world, tmp_path):
    """Catches a VLM that is loaded after all, or moved, or written: a checkpoint has the expert alone."""
    policy, dataset, prepare = run_of(world / "base", world / "8bits/dataset", context_cache=str(world / "8bits"))
    left_out = absent.names(policy)
    assert left_out == {name for name, _ in policy.named_parameters() if ".paligemma." in name}
    assert all(p.is_meta == (name in left_out) for name, p in policy.to("cpu").named_parameters())
    other = copy.deepcopy(policy)
    batch = next(batches(dataset, prepare, 2))
    assert torch.equal(step(other, batch)[0], step(policy, batch)[0])
    policy.save_pretrained(tmp_path)
    loaded, base = PI0Policy.from_pretrained(tmp_path), PI0Policy.from_pretrained(world / "base")
    weights = {**base.state_dict(), **{name: x for name, x in policy.state_dict().items() if not x.is_meta}}
    assert all(torch.equal(x, weights[name]) for name, x in loaded.state_dict().items())
    assert loaded.config.context_cache is None
    assert not any(".paligemma." in name for name in _names(tmp_path / "model.safetensors"))


def _names(file: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return set(opened.keys())


def test_held_out(world):
    """Catches an evaluation during training that asks the VLM: losses and chunks of held-out samples are the same."""
    own, dataset, before = run_of(world / "base", world / "data")
    ours, cached, prepare = run_of(
        world / "base", world / "float32/dataset", context_cache=str(world / "float32")
    )  # fmt: skip
    batch, theirs = next(batches(cached, prepare, BATCH)), next(batches(dataset, before, BATCH))
    with torch.no_grad():
        (loss, out), (expected, wanted) = ours.eval().forward(batch), own.eval().forward(theirs)
    assert torch.equal(loss, expected) and out == wanted and out["chunk_error"] > 0


def test_lora(world):
    """Catches adapters in a VLM that is not there."""
    policy, dataset, prepare = run_of(
        world / "base", world / "float32/dataset", context_cache=str(world / "float32"), train_expert_only=None
    )
    policy.wrap_with_peft(peft_cli_overrides=dict(PEFT_CLI))
    trained = policy.get_optim_params()
    own = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert len(trained) == len(own) and any("lora_A" in name for name in own)
    assert not any(".paligemma." in name for name in own)
    assert step(policy, next(batches(dataset, prepare, 2)))[1]


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment_images": True}, "augment_images does not go together with context_cache"),
        ({"augment_shift": 0.02}, "augment_shift does not go together with context_cache"),
        ({"recipe": "openpi"}, "augment_images does not go together"),
        ({"vlm_quantization": "nf4"}, "vlm_quantization does not go together"),
        ({"train_expert_only": False}, "train_expert_only=false does not go together"),
        ({"save_expert_only": False}, "save_expert_only=false does not go together"),
        ({"dtype": "bfloat16"}, "dtype 'float32', wanted 'bfloat16'"),
        ({"image_resize": "openpi"}, "image_resize 'lerobot', wanted 'openpi'"),
        ({"chunk_size": 4, "n_action_steps": 4}, "chunk_size 5, wanted 4"),
    ],
)
def test_options_that_do_not_go_together(world, options, message):
    """Catches a run whose contexts are not what its options ask for."""
    with pytest.raises(ValueError, match=message):
        run_of(world / "base", world / "float32/dataset", context_cache=str(world / "float32"), **options)


def test_another_vlm(world, tmp_path):
    """Catches contexts of other weights."""
    write_policy(tmp_path / "other", seed=1)
    with pytest.raises(ContextCacheError, match="vlm_digest"):
        run_of(tmp_path / "other", world / "float32/dataset", context_cache=str(world / "float32"))


def test_another_dataset(world):
    """Catches samples whose numbers are those of other contexts: the recorded dataset, or that of another cache."""
    for root in ("data", "third/dataset"):
        with pytest.raises(ContextCacheError, match=r"--dataset.root=.*float32/dataset"):
            run_of(world / "base", world / root, context_cache=str(world / "float32"))


def test_other_cameras_and_prompts(world):
    """Catches pictures in another order, and prompts of another tokenizer or task."""
    policy, dataset, prepare = run_of(world / "base", world / "float32/dataset", context_cache=str(world / "float32"))
    batch = next(batches(dataset, prepare, 2))
    step(policy, batch)
    with pytest.raises(ContextCacheError, match="cameras"):
        policy.forward({key: x for key, x in batch.items() if key != CAMERAS[0]})
    other = prepare({**dataset[0], "task": "reach cuba 0"})
    with pytest.raises(ContextCacheError, match="the prompt of sample 0 has the tokens"):
        policy.observe(other | {"index": torch.tensor([0])}, torch.device("cpu"))
    with pytest.raises(ObservationError, match="no 'index'"):
        policy.forward({key: x for key, x in batch.items() if key != "index"})
    with pytest.raises(ContextCacheError, match="sample 99 is not among the 21 contexts"):
        policy.observe.contexts.read([99], 3, torch.device("cpu"))


def test_damage(world, tmp_path):
    """Catches a byte that changed, a file that is cut, and a cache that was not finished."""
    folder = tmp_path / "damaged"
    shutil.copytree(world / "float32", folder)
    size = read_manifest(folder).record_bytes
    with (folder / "contexts.bin").open("r+b") as file:
        file.seek(2 * size + 100)
        file.write(b"\xff")
    contexts = ContextCache(folder)
    contexts.read([0, 1], 13, torch.device("cpu"))
    with pytest.raises(ContextCacheError, match=r"context 2 .* is not what was written"):
        contexts.read([1, 2], 13, torch.device("cpu"))
    with (folder / "digests.bin").open("r+b") as file:
        file.write(bytes(16))
    with pytest.raises(ContextCacheError, match=r"2 of the 21 contexts .* are missing"):
        ContextCache(folder)
    (folder / "tokens.bin").write_bytes(b"1234")
    with pytest.raises(ContextCacheError, match=r"tokens.bin is missing or cut"):
        ContextCache(folder)
    content = json.loads((folder / "contexts.json").read_text())
    (folder / "contexts.json").write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(ContextCacheError, match="have format 2"):
        ContextCache(folder)
    (folder / "contexts.json").write_text("{")
    with pytest.raises(ContextCacheError, match="cannot be read"):
        ContextCache(folder)
    with pytest.raises(ContextCacheError, match=r"`lerobot-pi0 cache --output=.*` makes it"):
        ContextCache(tmp_path)


def test_without_a_checkpoint(world):
    """Catches a random VLM whose contexts nobody has."""
    with pytest.raises(ValueError, match="context_cache goes with the VLM of a checkpoint"):
        PI0Policy(tiny_config(CAMERAS[:2], context_cache=str(world / "float32"), **SIZES))


def test_it_cannot_act(world):
    """Catches a policy that acts on numbers that are not there."""
    policy, *_ = run_of(world / "base", world / "float32/dataset", context_cache=str(world / "float32"))
    obs = torch.zeros(1, 2, 3, 64, 64)
    with pytest.raises(RuntimeError, match="the VLM is not in memory"):
        policy.model.vision(obs[0])


def test_check(world, tmp_path, capsys):
    """Catches a check before training that passes contexts of other options or other words."""
    command = [
        "check", f"--policy.path={world / 'base'}", f"--policy.context_cache={world / 'float32'}",
        "--dataset.repo_id=test/tiny", f"--dataset.root={world / 'data'}", "--images=4", "--json",
    ]  # fmt: skip
    said = []
    for more in ([], ["--policy.dtype=bfloat16"]):
        main([*command, *more])
        said += [x for x in json.loads(capsys.readouterr().out)["findings"] if x["about"] == "contexts"]
    assert [x["grade"] for x in said] == ["fine", "error"]
    assert "21 contexts, every=1, are this policy's" in said[0]["message"]
    assert "dtype 'float32', wanted 'bfloat16'" in said[1]["message"]
    shutil.copytree(world / "data", tmp_path / "data")
    tasks = pandas.read_parquet(tmp_path / "data/meta/tasks.parquet")
    tasks.rename({"reach cube 2": "reach cube 3"}).to_parquet(tmp_path / "data/meta/tasks.parquet")
    main([*command, f"--dataset.root={tmp_path / 'data'}"])  # the last one counts
    said = [x for x in json.loads(capsys.readouterr().out)["findings"] if x["about"] == "contexts"]
    assert [x["grade"] for x in said] == ["error"]
    assert "the prompt of sample 14 has the tokens" in said[0]["message"]


# --- caching -------------------------------------------------------------------------------------------------------


def test_which_frames():
    """Catches a phase of the episodes of which no frame is there, an episode without one, and more than fit."""
    episode = np.repeat([0, 1, 2, 5], [7, 2, 9, 1])
    assert spread(episode, 1).tolist() == list(range(19))
    assert spread(episode, 3).tolist() == [0, 3, 6, 8, 11, 14, 17, 18]
    assert spread(episode, 50).tolist() == [0, 8, 11, 18]
    assert [fitting(episode, most) for most in (19, 18, 8, 4)] == [1, 2, 3, 7]
    with pytest.raises(RuntimeError, match="room for 3 frames"):
        fitting(episode, 3)


def test_going_on(world, tmp_path, caplog, capsys):
    """Catches a second run that begins anew, trusts a damaged record, mixes two caches, or says nothing."""
    shutil.copytree(world / "float32", tmp_path / "float32")
    files = {file: (tmp_path / "float32" / file).read_bytes() for file in ("contexts.bin", "tokens.bin", "digests.bin")}
    size = read_manifest(tmp_path / "float32").record_bytes
    with (tmp_path / "float32/contexts.bin").open("r+b") as file:
        file.seek(5 * size)
        file.write(bytes(size))
    with (tmp_path / "float32/digests.bin").open("r+b") as file:
        file.seek(8 * 20)
        file.write(bytes(8))
    for name in ("base", "data"):
        (tmp_path / name).symlink_to(world / name)
    assert cache(tmp_path, "float32", f"--batch_size={BATCH}") == 0
    assert {file: (tmp_path / "float32" / file).read_bytes() for file in files} == files
    assert "contexts" in bars(capsys.readouterr().err)
    assert cache(tmp_path, "float32", f"--batch_size={BATCH}", "--bits=8") == 1
    assert "bits None, wanted 8" in caplog.text


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--policy.vlm_quantization=int8"], "contexts are those of the VLM itself"),
        (["--dataset.episodes=[0]"], "choose among them with lerobot-train --dataset.episodes"),
        (["--bits=4"], "--bits=4: give 8"),
        (["--every=0"], "--every=0 has to be at least 1"),
        (["--gb=0.0001"], "room for 2 frames"),
    ],
)
def test_what_cannot_be_cached(world, caplog, more, said):
    """Catches a command that begins with what it cannot finish."""
    assert cache(world, "none", *more) == 1
    assert said in caplog.text
    assert not (world / "none/contexts.json").exists()


def test_a_full_disk(world, caplog, monkeypatch):
    """Catches hours of computing that end with the disk."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))
    assert cache(world, "none") == 1
    assert "GB more, and 0.0 are free" in caplog.text


def test_other_processes(world):
    """Catches a memory map that cannot be sent to another process."""
    contexts = ContextCache(world / "float32")
    other = pickle.loads(pickle.dumps(contexts))
    device = torch.device("cpu")
    for mine, theirs in zip(contexts.read([3], 5, device), other.read([3], 5, device), strict=True):
        assert all(map(torch.equal, mine, theirs))
