"""The vision tower against transformers' own, from equal weights: features and gradients."""

import pytest
import torch
from conftest import assert_gradients_close, gradients, relative, shake
from transformers import SiglipVisionConfig, SiglipVisionModel

from lerobot_pi0 import PI0Config
from lerobot_pi0.network.siglip import VisionTower
from lerobot_pi0.network.sizes import PALIGEMMA_PRESETS, SO400M, VisionSize

SIZE = VisionSize(width=48, depth=3, mlp_dim=72, heads=6, patch_size=8, image_size=32)


def theirs(size: VisionSize) -> SiglipVisionModel:
    """transformers' tower without the pooling head."""
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=size.width, num_hidden_layers=size.depth, intermediate_size=size.mlp_dim,
            num_attention_heads=size.heads, patch_size=size.patch_size, image_size=size.image_size,
            hidden_act="gelu_pytorch_tanh", vision_use_head=False,
        )
    ).eval()  # fmt: skip


def published(name: str) -> str:
    """The published name of a parameter; some versions of transformers have no `vision_model` in their module tree."""
    return name if name.startswith("vision_model.") else f"vision_model.{name}"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_features_and_gradients(checkpointing):
    """Catches a norm with another eps, the other GELU, heads that are mixed up, positions in another order, and a
    layer that gradient checkpointing leaves out."""
    torch.manual_seed(0)
    reference = theirs(SIZE)
    shake(reference)
    tower = VisionTower(SIZE, 32)
    tower.load_state_dict({published(name): x for name, x in reference.state_dict().items()})
    tower.gradient_checkpointing = checkpointing
    tower.train()
    images, weight = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 16, 48)
    found, expected = tower(images), reference(images).last_hidden_state
    assert relative(found, expected) < 1e-6
    for features in (found, expected):
        (features * weight).sum().backward()
    assert_gradients_close(gradients(tower), {published(name): x for name, x in gradients(reference).items()})


def test_names_and_order_at_full_size():
    """Catches a parameter with another name, shape or place: optimizer states are saved by number."""
    with torch.device("meta"):
        ours, reference = VisionTower(SO400M, 224), theirs(SO400M)
    expected = [(published(name), p.shape) for name, p in reference.named_parameters()]
    assert [(name, p.shape) for name, p in ours.named_parameters()] == expected


@pytest.mark.parametrize("side", range(16, 52))
def test_a_stem_makes_whole_patches(side):
    """Catches a size at which the stem makes more patches than there are places for, which fails at the first image."""
    size = PALIGEMMA_PRESETS["tiny"].vision
    if side % 16 < 4:
        tower = VisionTower(size, side)
        assert tower(torch.rand(1, 3, side, side)).shape[1] == (side // 16) ** 2
        return
    fits = f"take {side // 16 * 16} or {side // 16 * 16 + 16}"
    with pytest.raises(ValueError, match=f"not made of whole patches of 16: {fits}"):
        VisionTower(size, side)
    with pytest.raises(ValueError, match=rf"{fits} \(image_resolution\)"):
        PI0Config(paligemma_variant="tiny", action_expert_variant="tiny", image_resolution=(side, side))


def test_images_smaller_than_a_patch():
    """Catches a tower without a single patch, which would answer with nothing."""
    with pytest.raises(ValueError, match="images of 7 pixels are smaller than one patch of 8"):
        VisionTower(SIZE, 7)
