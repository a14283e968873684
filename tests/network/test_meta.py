"""The full size, on the `meta` device: names, shapes and counts, without the weights."""

import pytest
from conftest import features
from full_size import OnMeta, theirs  # noqa: F401  a fixture

from lerobot_pi0 import PI0Config, PI0Policy

HEADS = {  # of published checkpoints, and not ours
    "model.paligemma_with_expert.paligemma.lm_head.weight",  # the embedding's matrix
    "model.paligemma_with_expert.gemma_expert.lm_head.weight",  # read by nothing
}


@pytest.fixture(scope="module")
def ours() -> OnMeta:
    return OnMeta()


def test_names_and_shapes(ours, theirs):  # noqa: F811
    """Catches a parameter that published checkpoints, PEFT adapters or FSDP states do not have under its name."""
    expected = {name: tuple(x.shape) for name, x in theirs.state_dict().items()}
    found = {name: tuple(x.shape) for name, x in ours.state_dict().items()}
    assert expected.keys() - found.keys() == HEADS
    assert found == {name: shape for name, shape in expected.items() if name not in HEADS}


def test_parameters_are_the_whole_state(ours):
    """Catches a buffer in the state dict, which a published checkpoint lacks, and shared parameters."""
    assert {name for name, _ in ours.named_parameters(remove_duplicate=False)} == set(ours.state_dict())
    assert len({id(p) for p in ours.parameters()}) == len(ours.state_dict())


def test_sizes(ours):
    """Catches a dimension that is wrong in our presets and in the reference alike: the paper's model has 3.3 B."""
    counts = {
        part: sum(p.numel() for p in getattr(ours.model, part).parameters()) for part in ("vision", "vlm", "expert")
    }
    assert counts == {"vision": 412_442_352, "vlm": 2_508_531_712, "expert": 311_464_960}
    assert sum(p.numel() for p in ours.parameters()) == 3_238_048_528


# By hand: 18 layers of width 1024 and a norm; the five projections around them with their biases.
EXPERT = 18 * (2 * 1024 * 2048 + 2 * 1024 * 256 + 3 * 1024 * 4096 + 2 * 1024) + 1024
PROJECTIONS = 2 * 33 * 1024 + 2049 * 1024 + 1025 * 1024 + 1025 * 32
# The VLM's last layer: queries, output, MLP and the norm before it; and the norm after all layers.
UNREAD = 2 * 2048 * 2048 + 3 * 2048 * 16_384 + 2 * 2048
TOTAL, VISION = 3_238_048_528, 412_442_352


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"train_expert_only": True}, EXPERT + PROJECTIONS),
        ({"freeze_vision_encoder": True}, TOTAL - UNREAD - VISION),
        ({}, TOTAL - UNREAD),
    ],
    ids=["expert only", "frozen vision", "all"],
)
def test_trained_sizes(options, trained):
    """Catches a mode in which a matrix too many is trained, 16 bytes a number in AdamW, or one too few."""
    policy = PI0Policy.empty(PI0Config(**features(size=224), device="cpu", **options))
    assert {p.device.type for p in policy.parameters()} == {"meta"}
    assert sum(p.numel() for p in policy.get_optim_params()) == trained
