"""`vlm_path`: a VLM that comes from a PaliGemma checkpoint is transformers' PaliGemma, number for number."""

import logging

import pytest
import torch
from conftest import SMALL_VLM, relative, shake, small_policy
from safetensors.torch import load_file, save_file
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from lerobot_pi0 import PI0Policy
from lerobot_pi0.checkpoints.errors import CheckpointError, CheckpointNotFoundError, MismatchedCheckpointError
from lerobot_pi0.network.attention import additive_mask
from lerobot_pi0.network.pi0 import Observation

pytestmark = pytest.mark.usefixtures("small")

IMAGE_TOKEN = 7
PATCHES = 16


@pytest.fixture(scope="module")
def paligemma() -> PaliGemmaForConditionalGeneration:
    """transformers' PaliGemma with random weights, with rows for padding after our vocabulary, as the real one has."""
    vision, text = SMALL_VLM.vision, SMALL_VLM.gemma
    torch.manual_seed(0)
    config = PaliGemmaConfig(
        vision_config={
            "hidden_size": vision.width, "num_hidden_layers": vision.depth, "intermediate_size": vision.mlp_dim,
            "num_attention_heads": vision.heads, "patch_size": vision.patch_size, "image_size": vision.image_size,
            "vision_use_head": False, "projection_dim": text.width,
        },
        text_config={
            "model_type": "gemma", "hidden_size": text.width, "num_hidden_layers": text.depth,
            "intermediate_size": text.mlp_dim, "num_attention_heads": text.heads, "num_key_value_heads": 1,
            "head_dim": text.head_dim, "vocab_size": 320,
        },
        projection_dim=text.width, image_token_id=IMAGE_TOKEN,
    )  # fmt: skip
    model = PaliGemmaForConditionalGeneration(config).eval()
    shake(model)
    return model


def canonical_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Its tensors under the names of the module tree, each once."""
    return {k: v.clone() for k, v in model.state_dict().items() if "lm_head" not in k}


LAYOUTS = {
    "as saved": None,
    "old": lambda name: name.removeprefix("model.").replace("language_model.", "language_model.model."),
    "new": lambda name: name,
}


def write(model: PaliGemmaForConditionalGeneration, folder, layout: str) -> str:
    if LAYOUTS[layout] is None:
        model.save_pretrained(folder)
    else:
        tensors = {LAYOUTS[layout](k): v for k, v in canonical_tensors(model).items()}
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def assert_same_prefix(policy: PI0Policy, paligemma: PaliGemmaForConditionalGeneration) -> None:
    """Keys, values and final hidden states of two images' and a prompt's tokens, all seeing all."""
    draw = torch.Generator().manual_seed(3)
    image = torch.rand(2, 3, 32, 32, generator=draw) * 2 - 1
    prompt = torch.randint(10, 300, (2, 9), generator=draw)
    obs = Observation(image[:, None], prompt, torch.ones_like(prompt, dtype=torch.bool), torch.zeros(2, 32))
    tokens = torch.cat([torch.full((2, PATCHES), IMAGE_TOKEN), prompt], dim=1)
    with torch.no_grad():
        theirs = paligemma.model(
            input_ids=tokens, pixel_values=image, attention_mask=torch.ones_like(tokens),
            token_type_ids=torch.zeros_like(tokens), position_ids=torch.arange(tokens.shape[1])[None], use_cache=True,
        )  # fmt: skip  # transformers counts positions from 1 if not told, π₀ from 0: seen in rotated keys alone
        x, mask = policy.model.prefix(obs)
        args = (x, policy.model.vlm.rope(mask.cumsum(dim=1) - 1), additive_mask(mask[:, None], x.dtype))
        hidden, cache = policy.model.vlm(*args), policy.model.vlm.cache(*args)
    assert relative(hidden, theirs.last_hidden_state) < 1e-5
    for (keys, values), layer in zip(cache, theirs.past_key_values.layers, strict=True):
        assert relative(keys, layer.keys[:, 0]) < 1e-5
        assert relative(values, layer.values[:, 0]) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefix_is_paligemmas(paligemma, tmp_path, layout):
    """A transposed or swapped matrix, a projector without its bias, an image scaled twice, a causal mask; every
    layout of names that transformers has written."""
    policy = small_policy(vlm_path=write(paligemma, tmp_path / "vlm", layout))
    assert_same_prefix(policy, paligemma)


def test_shards(paligemma, tmp_path):
    """An index that is not followed, or the first shard taken for the whole."""
    paligemma.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_prefix(small_policy(vlm_path=str(tmp_path)), paligemma)


def test_expert_is_random_and_the_vlm_frozen(paligemma, tmp_path):
    """A VLM that counts as random would be trained; an expert left on `meta` or at zero would not learn."""
    policy = small_policy(vlm_path=write(paligemma, tmp_path, "new"))
    assert policy.config.train_expert_only is True
    assert not any(p.requires_grad for p in policy.model.paligemma.parameters())
    experts = [p for name, p in policy.model.expert.named_parameters() if p.ndim == 2]
    assert all(p.device.type == "cpu" and p.std() > 0 for p in experts)
    assert small_policy(vlm_path=str(tmp_path), train_expert_only=False).config.train_expert_only is False


def test_saved_checkpoint_stands_alone(paligemma, tmp_path, caplog):
    """A robot's machine has no PaliGemma: loading must not ask for it, and still say where the VLM came from."""
    vlm = tmp_path / "vlm"
    policy = small_policy(vlm_path=write(paligemma, vlm, "new"))
    policy.save_pretrained(tmp_path / "saved")
    (vlm / "model.safetensors").unlink()
    loaded = PI0Policy.from_pretrained(tmp_path / "saved")
    assert loaded.config.vlm_path == str(vlm)
    assert_same_prefix(loaded, paligemma)
    config = loaded.config
    config.vlm_path = "another/paligemma"
    with caplog.at_level(logging.WARNING):
        assert PI0Policy.from_pretrained(tmp_path / "saved", config=config).config.vlm_path == str(vlm)
    assert "vlm_path=another/paligemma is not read" in caplog.text


@pytest.mark.parametrize("embedding", [torch.zeros(299, 48), torch.zeros(320, 64)], ids=["few rows", "wide"])
def test_wrong_vocabulary_is_refused(paligemma, tmp_path, embedding):
    """Fewer rows than tokens would index out of range at some prompt, far from here."""
    tensors = canonical_tensors(paligemma)
    tensors["model.language_model.embed_tokens.weight"] = embedding
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(MismatchedCheckpointError, match="embed_tokens"):
        small_policy(vlm_path=str(tmp_path))


def test_embedding_stored_as_head(paligemma, tmp_path):
    """Some exports of tied weights keep the head and drop the embedding."""
    tensors = canonical_tensors(paligemma)
    tensors["lm_head.weight"] = tensors.pop("model.language_model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_prefix(small_policy(vlm_path=str(tmp_path)), paligemma)


def test_other_checkpoints_are_refused(paligemma, tmp_path):
    """PaliGemma 2 (more norms), a π₀ checkpoint, a cut file, no folder: none may leave a half-random VLM behind."""
    tensors = canonical_tensors(paligemma)
    norm = "model.language_model.layers.0.pre_feedforward_layernorm.weight"
    save_file(tensors | {norm: torch.zeros(48)}, tmp_path / "model.safetensors")
    with pytest.raises(MismatchedCheckpointError, match="pre_feedforward_layernorm"):
        small_policy(vlm_path=str(tmp_path))
    small_policy().save_pretrained(tmp_path / "pi0")
    with pytest.raises(MismatchedCheckpointError, match="missing"):
        small_policy(vlm_path=str(tmp_path / "pi0"))
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="complete"):
        small_policy(vlm_path=str(tmp_path))
    with pytest.raises(CheckpointNotFoundError):
        small_policy(vlm_path=str(tmp_path / "nothing"))


def test_files_reloaded_equal(paligemma, tmp_path):
    """The rows that are left out are the last ones, and no other number changes on the way through."""
    policy = small_policy(vlm_path=write(paligemma, tmp_path / "vlm", "as saved"))
    policy.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    embedding = paligemma.get_input_embeddings().weight
    assert torch.equal(saved["model.paligemma_with_expert.paligemma.lm_head.weight"], embedding[:300])
