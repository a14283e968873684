"""Common ground of the tests: a shrunken π₀ in our code and in LeRobot's, and batches for both."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices: threads only wait for each other

import lerobot.policies.pi0.modeling_pi0 as builtin
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi0.configuration_pi0 import PI0Config as BuiltinPI0Config
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE

import lerobot_pi0.configuration_pi0 as configuration
import lerobot_pi0.network as network
from lerobot_pi0 import PI0Config, PI0Policy
from lerobot_pi0.architecture import Gemma, PaliGemma, Vision

SMALL_VLM = PaliGemma(
    Vision(width=32, depth=2, mlp_dim=48, heads=4, patch_size=8, image_size=32),
    Gemma(width=48, depth=3, mlp_dim=64, heads=8, head_dim=16),
    vocab_size=300,
)
SMALL_EXPERT = Gemma(width=32, depth=3, mlp_dim=40, heads=8, head_dim=16)
"""Eight heads, because LeRobot's attention has that number written into it."""

CAMERAS = ("observation.images.front", "observation.images.left", "observation.images.wrist")
DIMS = 6


def features(cameras=CAMERAS, dims: int = DIMS, size: int = 32) -> dict:
    """Config arguments of a robot with these cameras and joints."""
    visual = {key: PolicyFeature(FeatureType.VISUAL, (3, size, size)) for key in cameras}
    return {
        "input_features": visual | {OBS_STATE: PolicyFeature(FeatureType.STATE, (dims,))},
        "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (dims,))},
    }


def make_batch(
    seed: int = 0, batch_size: int = 2, cameras=CAMERAS, prompt=(9, 5), dims: int = DIMS, size: int = 32,
    chunk: int = 50, length: int = 12,
) -> dict:  # fmt: skip
    """What the preprocessor would hand to the policy; `prompt` are the lengths of the prompts, in turn."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([prompt[i % len(prompt)] for i in range(batch_size)])
    batch = {key: torch.rand(batch_size, 3, size, size, generator=draw) for key in cameras}
    return batch | {
        OBS_STATE: torch.randn(batch_size, dims, generator=draw),
        ACTION: torch.randn(batch_size, chunk, dims, generator=draw),
        OBS_LANGUAGE_TOKENS: torch.randint(1, 300, (batch_size, length), generator=draw),
        OBS_LANGUAGE_ATTENTION_MASK: torch.arange(length) < lengths[:, None],
    }


def draws(seed: int, batch_size: int, samples: int = 1, chunk: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise (B, K, T, 32) and time (B, K)."""
    draw = torch.Generator().manual_seed(1000 + seed)
    noise = torch.randn(batch_size, samples, chunk, 32, generator=draw)
    return noise, torch.rand(batch_size, samples, generator=draw) * 0.99 + 0.005


@pytest.fixture
def small(monkeypatch) -> None:
    """Make gemma_2b and gemma_300m small in our presets and in LeRobot's."""
    make_small(monkeypatch)


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fixture `small` does, for a process of one's own."""
    for name in ("SHARPNESS", "LOUDNESS"):  # sharp attention to noise amplifies the rounding that is to be compared
        monkeypatch.setattr(network, name, 1.0)
    monkeypatch.setitem(configuration.PALIGEMMA_PRESETS, "gemma_2b", SMALL_VLM)
    monkeypatch.setitem(configuration.EXPERT_PRESETS, "gemma_300m", SMALL_EXPERT)
    stacks = {"gemma_2b": SMALL_VLM.gemma, "gemma_300m": SMALL_EXPERT}

    def config(variant: str) -> builtin.GemmaConfig:
        cfg = stacks[variant]
        return builtin.GemmaConfig(cfg.width, cfg.depth, cfg.mlp_dim, cfg.heads, 1, cfg.head_dim)

    paligemma, expert = builtin.PaliGemmaForConditionalGenerationWithPiGemma, builtin.PiGemmaForCausalLM

    def small_paligemma(config):
        vision, preset = config.vision_config, SMALL_VLM.vision
        vision.hidden_size, vision.num_hidden_layers = preset.width, preset.depth
        vision.intermediate_size, vision.num_attention_heads = preset.mlp_dim, preset.heads
        vision.patch_size, vision.projection_dim = preset.patch_size, SMALL_VLM.gemma.width
        config.text_config.vocab_size = SMALL_VLM.vocab_size
        return paligemma(config)

    def small_expert(config):
        config.vocab_size = SMALL_VLM.vocab_size
        return expert(config)

    monkeypatch.setattr(builtin, "get_gemma_config", config)
    monkeypatch.setattr(builtin, "PaliGemmaForConditionalGenerationWithPiGemma", small_paligemma)
    monkeypatch.setattr(builtin, "PiGemmaForCausalLM", small_expert)


@pytest.fixture
def double(small, monkeypatch) -> None:
    """The sizes of `small`; where either network asks for float32, it gets float64."""
    make_double(monkeypatch)


def make_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `double` does beside `small`, for a process of one's own."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)


def small_policy(cameras=CAMERAS, dims: int = DIMS, **options) -> PI0Policy:
    """Our policy at the size of the fixture `small`."""
    config = PI0Config(
        **features(cameras, dims), device="cpu", image_resolution=(32, 32), tokenizer_max_length=12, **options
    )
    return PI0Policy(config)


def small_builtin(cameras=CAMERAS, dims: int = DIMS, **options) -> builtin.PI0Policy:
    """LeRobot's policy at the size of the fixture `small`, with norms that are not the identity."""
    config = BuiltinPI0Config(
        **features(cameras, dims), device="cpu", image_resolution=(32, 32), tokenizer_max_length=12, **options
    )
    policy = builtin.PI0Policy(config)
    with torch.no_grad():
        for p in policy.parameters():  # LeRobot starts norms at 0 and biases too: nothing would be compared
            p.add_(torch.randn_like(p) * 0.05)
    return policy


def copy_weights(theirs: torch.nn.Module, ours: torch.nn.Module) -> None:
    """Ours takes LeRobot's weights; the two heads that we do not have are left out."""
    state = {k: v for k, v in theirs.state_dict().items() if "lm_head" not in k}
    ours.load_state_dict(state, strict=True)


def shake(module: torch.nn.Module, seed: int = 0) -> None:
    """Move every parameter a little: fresh norms and biases are the identity, and would hide their absence."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=draw) * 0.05)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """‖ours - theirs‖ / ‖theirs‖."""
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by parameter name, where there are any."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_gradients_close(ours: dict, theirs: dict, tolerance: float = 1e-5) -> None:
    """Every gradient equal to `tolerance` of its own norm, or to rounding at the network's scale."""
    assert ours.keys() == theirs.keys()
    floor = tolerance / 10 * max(grad.norm() for grad in theirs.values())
    for name, expected in theirs.items():  # keys' biases have gradients of zero but for rounding
        assert (ours[name] - expected).norm() <= tolerance * expected.norm() + floor, name


def stats(dims: int = DIMS, cameras=CAMERAS) -> dict:
    """Statistics as a LeRobotDataset has them."""
    draw = torch.Generator().manual_seed(5)
    spread = {key: torch.rand(dims, generator=draw) + 0.5 for key in (OBS_STATE, ACTION)}
    vectors = {key: {"mean": std * 3 - 1, "std": std, "min": -std, "max": std} for key, std in spread.items()}
    images = {"mean": torch.full((3, 1, 1), 0.5), "std": torch.full((3, 1, 1), 0.2)}
    return vectors | dict.fromkeys(cameras, images)


def tiny_config(cameras=CAMERAS, dims: int = DIMS, **options) -> PI0Config:
    """Config of the preset that needs no network and no patching."""
    return PI0Config(
        **features(cameras, dims, 64), paligemma_variant="tiny", action_expert_variant="tiny",
        device="cpu", **options,
    )  # fmt: skip


def write_dataset(root, episodes: int = 2, frames: int = 6, cameras=CAMERAS[:2], dims: int = DIMS) -> None:
    """A LeRobotDataset of random images and joints, with a task per episode, as images (no video codec)."""
    from lerobot.datasets import LeRobotDataset

    names = [f"joint_{i}" for i in range(dims)]
    vector = {"dtype": "float32", "shape": (dims,), "names": names}
    image = {"dtype": "image", "shape": (64, 64, 3), "names": ["height", "width", "channels"]}
    columns = dict.fromkeys((OBS_STATE, ACTION), vector) | dict.fromkeys(cameras, image)
    dataset = LeRobotDataset.create("test/tiny", fps=10, features=columns, root=root, use_videos=False)
    draw = torch.Generator().manual_seed(0)
    for episode in range(episodes):
        for _ in range(frames):
            pictures = {
                key: torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=draw).numpy() for key in cameras
            }
            joints = {key: torch.randn(dims, generator=draw).numpy() * 30 for key in (OBS_STATE, ACTION)}
            dataset.add_frame(pictures | joints | {"task": f"reach cube {episode}"})
        dataset.save_episode()
    dataset.finalize()


MICRO_VLM = PaliGemma(
    Vision(width=8, depth=1, mlp_dim=8, heads=1, patch_size=8, image_size=16),
    Gemma(width=8, depth=2, mlp_dim=16, heads=2, head_dim=8),
    vocab_size=24,
)
MICRO_EXPERT = Gemma(width=8, depth=2, mlp_dim=12, heads=2, head_dim=8)
"""So small that a checkpoint is written and read in 20 ms."""


@pytest.fixture
def micro(monkeypatch) -> None:
    """Make the preset `tiny` smaller still, for tests that load hundreds of checkpoints."""
    monkeypatch.setitem(configuration.PALIGEMMA_PRESETS, "tiny", MICRO_VLM)
    monkeypatch.setitem(configuration.EXPERT_PRESETS, "tiny", MICRO_EXPERT)


def micro_policy(seed: int = 0, **options) -> PI0Policy:
    """A policy at the size of the fixture `micro`; equal seeds give equal weights, others give others everywhere."""
    sizes = {"max_state_dim": 8, "max_action_dim": 8, "chunk_size": 4, "n_action_steps": 2}
    config = PI0Config(
        **features(CAMERAS[:1], DIMS, 16), paligemma_variant="tiny", action_expert_variant="tiny", device="cpu",
        **sizes | options,
    )  # fmt: skip
    torch.manual_seed(seed)
    policy = PI0Policy(config)
    shake(policy, seed)
    return policy
