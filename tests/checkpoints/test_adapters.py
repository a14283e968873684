"""Adapters and their base: a base that changed, and an adapter that is not the one that was saved, are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_batch, small_builtin, small_policy, without_plugin
from lerobot.configs import PreTrainedConfig
from lerobot.policies import make_policy
from safetensors.torch import load_file, save_file
from test_hub import hub, online  # noqa: F401  fixtures
from test_roundtrip import chunk, dataset, reload_adapter, save_adapter, wrapped

from lerobot_pi0 import PI0Policy
from lerobot_pi0.checkpoints.errors import (
    CheckpointConfigError,
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
)
from lerobot_pi0.inputs.features import set_cameras

pytestmark = pytest.mark.usefixtures("small")

MANIFEST, ADAPTER, CONFIG = "lerobot_pi0_manifest.json", "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def adapter(tmp_path) -> Path:
    """The folder of an adapter, over the checkpoint `base` beside it."""
    small_policy(train_expert_only=True).save_pretrained(tmp_path / "base")
    return adapted(tmp_path / "base", tmp_path / "adapter")


def adapted(base: Path | str, folder: Path) -> Path:
    save_adapter(wrapped(PI0Policy.from_pretrained(base), base), folder)
    return folder


def test_a_base_that_changed(adapter, tmp_path):
    """Catches an adapter that is put over other weights than it was trained with, without a word."""
    torch.manual_seed(5)
    small_policy(train_expert_only=True).save_pretrained(tmp_path / "base")
    with pytest.raises(CorruptCheckpointError, match=f"adapter {adapter} was trained over {tmp_path / 'base'}"):
        reload_adapter(adapter)


def test_one_weight_of_a_base_changed(adapter, tmp_path):
    """Catches a base of which a single number is another, with digests that were made anew."""
    policy = PI0Policy.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        next(policy.parameters()).view(-1)[3] += 1e-3
    policy.save_pretrained(tmp_path / "base")
    with pytest.raises(CorruptCheckpointError, match="was trained over"):
        reload_adapter(adapter)


def test_a_base_saved_again_or_moved_is_the_same(adapter, tmp_path):
    """Catches a refusal of the same weights: saved once more, or in another folder."""
    expected = chunk(reload_adapter(adapter), make_batch())
    PI0Policy.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "base")
    assert torch.equal(chunk(reload_adapter(adapter), make_batch()), expected)
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    with pytest.raises(CheckpointNotFoundError, match="base"):
        reload_adapter(adapter)
    content = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(content | {"base_model_name_or_path": str(tmp_path / "elsewhere")}))
    assert torch.equal(chunk(reload_adapter(adapter), make_batch()), expected)


def test_a_base_without_digests(tmp_path):
    """Catches a base of the built-in, whose files carry no digests, that is exchanged unnoticed."""
    with without_plugin():
        small_builtin().save_pretrained(tmp_path / "base")
    folder = adapted(tmp_path / "base", tmp_path / "adapter")
    policy = reload_adapter(folder).get_base_model()
    assert policy.origin.start == str(tmp_path / "base"), "a card would say that it began with random weights"
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "gemma_expert.model.layers.0" in name)
    save_file(tensors | {name: tensors[name] + 1}, weights, metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpointError, match="was trained over"):
        reload_adapter(folder)


def exchange(tensors: dict[str, torch.Tensor]) -> None:
    a, b = sorted(name for name in tensors if "lora_A" in name and "q_proj" in name)[:2]
    tensors[a], tensors[b] = tensors[b], tensors[a]


CHANGES = {
    "a number": lambda tensors: next(iter(tensors.values())).view(-1)[:1].add_(1e-3),
    "two tensors exchanged": exchange,
    "a tensor lost": lambda tensors: tensors.pop(next(iter(tensors))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_adapter_that_changed(adapter, change):
    """Catches tensors of an adapter, which PEFT loads without looking, that are not those that were saved."""
    tensors = load_file(adapter / ADAPTER)
    CHANGES[change](tensors)
    save_file(tensors, adapter / ADAPTER, metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpointError, match=f"{ADAPTER} of {adapter} is lost, or not the one"):
        reload_adapter(adapter)


def test_an_adapter_whose_weights_are_lost_or_cut(adapter, tmp_path):
    """Catches an error of PEFT's or of a library's, or the base alone, where the adapter's weights are broken."""
    data = (adapter / ADAPTER).read_bytes()
    for change in (lambda file: file.unlink(), lambda file: file.write_bytes(data[: len(data) // 2])):
        change(adapter / ADAPTER)
        with pytest.raises(CheckpointError, match=ADAPTER):
            reload_adapter(adapter)


@pytest.mark.parametrize("change", [{"lora_alpha": 64}, {"r": 2}, {"target_modules": ["q_proj"]}, {"use_rslora": True}])
def test_the_options_of_an_adapter(adapter, change):
    """Catches tensors that are as they were, and that PEFT multiplies by something else, or puts elsewhere."""
    content = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(content | change))
    with pytest.raises(CheckpointConfigError, match=f"{next(iter(change))} in {CONFIG} of {adapter}"):
        reload_adapter(adapter)


def test_an_adapter_trained_on(adapter, tmp_path):
    """Catches a second run over the first one's adapter whose checkpoint is held to the first one's tensors."""
    model = reload_adapter(adapter)
    before = (adapter / MANIFEST).read_text()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(1e-2)
    expected = chunk(model, make_batch())
    save_adapter(model, tmp_path / "again")
    assert torch.equal(chunk(reload_adapter(tmp_path / "again"), make_batch()), expected)
    assert json.loads((tmp_path / "again" / MANIFEST).read_text())["weights"] != json.loads(before)["weights"]
    assert (adapter / MANIFEST).read_text() == before


def test_the_cameras_of_an_adapter_keep_their_order(tmp_path):
    """Catches pictures that change places when an adapter is trained on with a dataset that lists its cameras in
    another order: the slots are those of the adapter's cameras, and its base has none of them."""
    small_policy(train_expert_only=True).save_pretrained(tmp_path / "base")
    names = [f"observation.images.{name}" for name in ("side", "hand", "above")]
    policy = PI0Policy.from_pretrained(tmp_path / "base")
    set_cameras(policy.config, dict(zip(names, policy.config.image_features.values(), strict=True)), names)
    save_adapter(wrapped(policy, tmp_path / "base"), tmp_path / "adapter")
    for order in (names, names[::-1]):
        config = PreTrainedConfig.from_pretrained(tmp_path / "adapter")
        config.pretrained_path = tmp_path / "adapter"
        assert list(make_policy(config, ds_meta=dataset(cameras=order)).config.image_features) == names


def test_the_revision_of_a_base_is_pinned(hub, tmp_path):  # noqa: F811
    """Catches a base on the Hub that its owner moves on: the adapter would sit on weights that it never saw."""
    policy = small_policy(train_expert_only=True)
    policy.push_to_hub("me/base", token="hf_of_the_tests")
    first = hub.repos["me/base"].refs["main"]
    folder = adapted("me/base", tmp_path / "adapter")
    noted = json.loads((folder / MANIFEST).read_text())["base"]
    assert (noted["id"], noted["revision"]) == ("me/base", first)
    expected = chunk(reload_adapter(folder), make_batch())
    torch.manual_seed(9)
    small_policy(train_expert_only=True).push_to_hub("me/base", token="hf_of_the_tests")
    assert torch.equal(chunk(reload_adapter(folder), make_batch()), expected)
    save_adapter(reload_adapter(folder), tmp_path / "again")
    assert torch.equal(chunk(reload_adapter(tmp_path / "again"), make_batch()), expected)
    content = json.loads((folder / CONFIG).read_text())
    assert content["revision"] == first
    (folder / CONFIG).write_text(json.dumps(content | {"revision": None}))  # as adapters of earlier versions have it
    with pytest.raises(CorruptCheckpointError, match=f"revision {first}.*name its commit as `revision`"):
        reload_adapter(folder)
