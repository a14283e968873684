"""openpi's recipe: its schedule against optax's, its numbers against openpi's source, and who wins over it; and the
recipe for small networks."""

import optax
import pytest
import torch
from conftest import CAMERAS, stats, tiny_config
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_STATE

from lerobot_pi0 import PI0Policy
from lerobot_pi0.training.optimizers import AveragedAdamWConfig, WarmupCosineConfig


@pytest.mark.parametrize(("warmup", "end", "steps"), [(100, 1000, 1200), (3, 20, 30), (0, 10, 12)])
def test_schedule(warmup, end, steps):
    """Catches a warm-up from another start, a decay that begins early, and LeRobot's rescaling to the run's length."""
    peak, last = 2.5e-5, 2.5e-6
    theirs = optax.warmup_cosine_decay_schedule(peak / (warmup + 1), peak, warmup, end, last)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], peak)
    schedule = WarmupCosineConfig(warmup, end, peak, last).build(optimizer, num_training_steps=end // 2)
    for step in range(steps):
        if step % max(steps // 100, 1) == 0:
            assert schedule.get_last_lr()[0] == pytest.approx(float(theirs(step)), rel=1e-5), step
        optimizer.step()
        schedule.step()


def test_numbers():
    """Catches numbers of another recipe than the one that is asked for."""
    plain, openpi = tiny_config(), tiny_config(recipe="openpi")
    assert type(plain.get_optimizer_preset()) is AdamWConfig
    assert type(plain.get_scheduler_preset()) is CosineDecayWithWarmupSchedulerConfig
    assert plain.get_optimizer_preset().weight_decay == 0.01
    optimizer, schedule = openpi.get_optimizer_preset(), openpi.get_scheduler_preset()
    assert isinstance(optimizer, AveragedAdamWConfig)
    assert isinstance(schedule, WarmupCosineConfig)
    assert (optimizer.lr, optimizer.betas, optimizer.eps) == (2.5e-5, (0.9, 0.95), 1e-8)
    assert (optimizer.weight_decay, optimizer.grad_clip_norm) == (1e-10, 1.0)
    assert (schedule.num_warmup_steps, schedule.num_decay_steps) == (1000, 30_000)
    assert (schedule.peak_lr, schedule.decay_lr) == (2.5e-5, 2.5e-6)
    assert (openpi.ema_decay, openpi.augment_images, openpi.clean_prompts) == (0.99, True, True)


def test_who_wins():
    """Catches a recipe that overrides what was asked for by name."""
    config = tiny_config(recipe="openpi", ema_decay=0, augment_images=False, optimizer_weight_decay=0.1)
    assert (config.ema_decay, config.augment_images) == (0, False)
    assert type(config.get_optimizer_preset()) is AdamWConfig
    assert config.get_optimizer_preset().weight_decay == 0.1
    with pytest.raises(ValueError, match=r"recipe='jax'.*openpi"):
        tiny_config(recipe="jax")


def test_small():
    """Catches a small recipe that leaves LeRobot's numbers, overrules the user's, or pads the data's dims."""
    config = tiny_config(recipe="small", max_state_dim=32, max_action_dim=32)
    optimizer, schedule = config.get_optimizer_preset(), config.get_scheduler_preset()
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (8e-4, (0.9, 0.999), 0.01)
    assert (schedule.peak_lr, schedule.decay_lr) == (8e-4, 8e-6)
    assert (config.augment_shift, config.time_sampling_warmup_steps, config.noise_temperature) == (0.02, 1500, 0.5)
    features = {OBS_STATE: {"shape": (7,)}, ACTION: {"shape": (6,)}}
    config.set_dataset_feature_metadata(features)
    assert (config.max_state_dim, config.max_action_dim) == (7, 6)
    told = features | {OBS_ENV_STATE: {"shape": (9,)}}
    for reads in (False, True):  # an environment state that the user leaves out would be padding, which is noise
        config = tiny_config(recipe="small", max_state_dim=32, max_action_dim=32)
        if reads:
            config.input_features[OBS_ENV_STATE] = PolicyFeature(FeatureType.ENV, (9,))
        config.set_dataset_feature_metadata(told)
        assert config.max_action_dim == (15 if reads else 6)
    asked = tiny_config(
        recipe="small", optimizer_lr=1e-3, augment_shift=0, time_sampling_warmup_steps=0, max_state_dim=16
    )
    asked.set_dataset_feature_metadata(features)
    assert (asked.optimizer_lr, asked.augment_shift, asked.time_sampling_warmup_steps) == (1e-3, 0, 0)
    assert asked.max_state_dim == 16
    for other in (tiny_config(), tiny_config(recipe="small", pretrained_path="there")):  # weights have their own dims
        before = other.max_state_dim, other.max_action_dim
        other.set_dataset_feature_metadata(features)
        assert (other.max_state_dim, other.max_action_dim) == before


def test_who_needs_the_small_recipe_is_told(caplog):
    """Catches a small network that hardly learns, in silence; and a word to those who have chosen."""
    for options, told in (({}, True), ({"recipe": "small"}, False), ({"optimizer_lr": 1e-3}, False)):
        caplog.clear()
        tiny_config(**options).resolve({}, vlm_is_pretrained=False)
        assert ("--policy.recipe=small" in caplog.text) is told, options
    caplog.clear()
    tiny_config().resolve({}, vlm_is_pretrained=True)
    assert "recipe" not in caplog.text


def test_a_checkpoint_does_not_hand_its_recipe_on(tmp_path):
    """Catches a fine-tuning run that averages and augments because the run before it did."""
    config = tiny_config(CAMERAS[:1], recipe="openpi", mask_padded_actions=True)
    PI0Policy(config, dataset_stats=stats(cameras=CAMERAS[:1])).save_pretrained(tmp_path)
    found = PI0Policy.from_pretrained(tmp_path).config
    assert (found.recipe, found.ema_decay, found.augment_images) == ("lerobot", 0, False)
    assert found.mask_padded_actions is False
