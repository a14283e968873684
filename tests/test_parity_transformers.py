"""The network against transformers' `PI0ForConditionalGeneration`, in float32: velocities, losses, gradients, chunks.

A second reference, of other authors. Its time embedding is float32 where openpi's is float64, so the tight
comparisons give it a float64 one; what is left without the patch has a test of its own.
"""

import math

import pytest
import torch
from conftest import (
    CAMERAS,
    DIMS,
    SMALL_EXPERT,
    SMALL_VLM,
    assert_gradients_close,
    draws,
    gradients,
    make_batch,
    relative,
    shake,
    small_policy,
)
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from transformers import GemmaConfig, PaliGemmaConfig, PI0ForConditionalGeneration, SiglipVisionConfig
from transformers import PI0Config as TheirConfig
from transformers.models.pi0.modeling_pi0 import PI0TimestepEmbeddings

from lerobot_pi0.inputs.observation import pad_last
from lerobot_pi0.network.sizes import Gemma

IMAGE_TOKEN = SMALL_VLM.vocab_size  # beyond the vocabulary, as in the published configs
PATCHES = (SMALL_VLM.vision.image_size // SMALL_VLM.vision.patch_size) ** 2

OURS_TO_THEIRS = {
    "model.paligemma_with_expert.paligemma.model.": "model.vlm.",
    "model.paligemma_with_expert.gemma_expert.model.": "model.dit.",
    "model.state_proj.": "embed_action_time.state_proj.",
    "model.action_in_proj.": "embed_action_time.action_in_proj.",
    "model.action_time_mlp_in.": "embed_action_time.action_time_mlp_in.",
    "model.action_time_mlp_out.": "embed_action_time.action_time_mlp_out.",
    "model.action_out_proj.": "action_out_proj.",
}
NOT_OURS = {"model.dit.embed_tokens.weight"}

CASES = [
    pytest.param(0, 1, CAMERAS, (12,), id="one sample, all cameras, full prompt"),
    pytest.param(1, 3, CAMERAS[:1], (4, 9, 7), id="one camera, uneven prompts"),
    pytest.param(2, 2, CAMERAS[1:], (5, 11), id="first camera absent"),
]


def their_name(ours: str) -> str:
    """transformers' name of one of our parameters."""
    prefix = next(prefix for prefix in OURS_TO_THEIRS if ours.startswith(prefix))
    return OURS_TO_THEIRS[prefix] + ours.removeprefix(prefix)


def their_gemma(cfg: Gemma) -> GemmaConfig:
    """transformers' config of a stack of ours."""
    return GemmaConfig(
        hidden_size=cfg.width, num_hidden_layers=cfg.depth, intermediate_size=cfg.mlp_dim, head_dim=cfg.head_dim,
        num_attention_heads=cfg.heads, num_key_value_heads=1, vocab_size=SMALL_VLM.vocab_size,
    )  # fmt: skip


def their_model() -> PI0ForConditionalGeneration:
    """transformers' π₀ at the size of `small_policy`."""
    vision = SMALL_VLM.vision
    siglip = SiglipVisionConfig(
        hidden_size=vision.width, num_hidden_layers=vision.depth, intermediate_size=vision.mlp_dim,
        num_attention_heads=vision.heads, patch_size=vision.patch_size, image_size=vision.image_size,
        projection_dim=SMALL_VLM.gemma.width, hidden_act="gelu_pytorch_tanh", vision_use_head=False,
    )  # fmt: skip
    vlm = PaliGemmaConfig(
        text_config=their_gemma(SMALL_VLM.gemma), vision_config=siglip, image_token_id=IMAGE_TOKEN,
        projection_dim=SMALL_VLM.gemma.width,
    )  # fmt: skip
    config = TheirConfig(vlm_config=vlm, dit_config=their_gemma(SMALL_EXPERT), loss_reduction="none")
    return PI0ForConditionalGeneration(config).eval()


def pair(seed: int, **options):
    """Our policy and their model with equal weights; the map covers every tensor of both."""
    ours, theirs = small_policy(**options), their_model()
    shake(ours, seed)
    state = {their_name(name): p for name, p in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) == NOT_OURS
    return ours, theirs


def their_inputs(batch: dict) -> dict:
    """A batch in their form: image tokens before the prompt, cameras that exist, images in [-1, 1]."""
    images = torch.stack([batch[key] for key in CAMERAS if key in batch], dim=1) * 2 - 1
    tokens, mask = batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]
    size, count = images.shape[:2]
    placeholders = torch.full((size, count * PATCHES), IMAGE_TOKEN)
    return {
        "state": pad_last(batch[OBS_STATE], 32),
        "pixel_values": images,
        "pixel_attention_mask": torch.ones(size, count, dtype=torch.bool),
        "input_ids": torch.cat([placeholders, tokens], dim=1),
        "attention_mask": torch.cat([torch.ones_like(placeholders), mask.long()], dim=1),
    }


def their_losses(model, batch: dict, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """Their loss per element for given draws, (B, T, dims)."""
    actions = pad_last(batch[ACTION], 32)
    return model(**their_inputs(batch), actions=actions, noise=noise[:, 0], timestep=time[:, 0]).loss[..., :DIMS]


@pytest.fixture
def float64_time(monkeypatch) -> None:
    """Compute their sin-cos time embedding in float64, as openpi does."""

    def forward(self, time):
        cfg = self.config
        fraction = torch.linspace(0, 1, cfg.dit_config.hidden_size // 2, dtype=torch.float64)
        period = cfg.min_period * (cfg.max_period / cfg.min_period) ** fraction
        angle = time[:, None].double() * 2 * math.pi / period
        return torch.cat([angle.sin(), angle.cos()], dim=1).float()

    monkeypatch.setattr(PI0TimestepEmbeddings, "forward", forward)


@pytest.mark.parametrize(("seed", "batch_size", "cameras", "prompt"), CASES)
def test_velocity_and_loss(small, float64_time, seed, batch_size, cameras, prompt):
    """Catches an equation, a mask or a position that LeRobot's π₀ has wrong and ours would have copied."""
    ours, theirs = pair(seed)
    batch, (noise, time) = make_batch(seed, batch_size, cameras, prompt), draws(seed, batch_size)
    with torch.no_grad():
        context = ours.model.context(ours.observe(batch, torch.device("cpu")))
        velocity = ours.model.velocity(noise, ours.model.embed_time(time)[:, :, None], context)
        expected = theirs(**their_inputs(batch), noise=noise[:, 0], timestep=time[:, 0]).logits
        assert relative(velocity[:, 0], expected) < 1e-5
        assert relative(ours.losses(batch, noise, time)[:, 0], their_losses(theirs, batch, noise, time)) < 1e-5


@pytest.mark.parametrize("frozen", [False, True], ids=["everything trained", "VLM frozen"])
@pytest.mark.parametrize(("seed", "batch_size", "cameras", "prompt"), CASES)
def test_gradients(small, float64_time, seed, batch_size, cameras, prompt, frozen):
    """Catches a cut or doubled path of autograd, also through the keys and values that are computed once."""
    ours, theirs = pair(seed, train_expert_only=frozen)
    batch, (noise, time) = make_batch(seed, batch_size, cameras, prompt), draws(seed, batch_size)
    ours.losses(batch, noise, time).mean().backward()
    their_losses(theirs, batch, noise, time).mean().backward()
    all_theirs, trained = gradients(theirs), gradients(ours)
    assert trained.keys() == {name for name, p in ours.named_parameters() if p.requires_grad}
    assert_gradients_close(trained, {name: all_theirs[their_name(name)] for name in trained})


@pytest.mark.parametrize(("seed", "batch_size", "cameras", "prompt"), CASES)
def test_chunk(small, float64_time, seed, batch_size, cameras, prompt):
    """Catches an integration that differs: times, step, direction, or a cache that a step has changed."""
    ours, theirs = pair(seed)
    batch, (noise, _) = make_batch(seed, batch_size, cameras, prompt), draws(seed, batch_size)
    expected = theirs.sample_actions(**their_inputs(batch), noise=noise[:, 0])[..., :DIMS]
    assert relative(ours.predict_action_chunk(batch, noise=noise[:, 0]), expected) < 1e-5


def test_without_the_patch(small):
    """Catches a time embedding of ours that is only right beside the patched one; float32 angles reach 1 600."""
    ours, theirs = pair(0)
    batch, (noise, time) = make_batch(), draws(0, 2)
    with torch.no_grad():
        assert relative(ours.losses(batch, noise, time)[:, 0], their_losses(theirs, batch, noise, time)) < 1e-4
