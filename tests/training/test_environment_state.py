"""The second loss: what the state's token has to tell, and that nothing else of a policy or a checkpoint changes."""

import pytest
import torch
from conftest import CAMERAS, DIMS, make_batch, stats, tiny_config, train
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_STATE
from safetensors.torch import load_file

from lerobot_pi0 import PI0Policy
from lerobot_pi0.inputs.samples import ObservationError

MEAN, STD = torch.tensor([0.0, 2.0, -1.0, 5.0]), torch.tensor([1.0, 0.5, 0.0, 1e-7])
"""Of four numbers of an environment, two of which do not vary."""

STATISTICS = stats(cameras=CAMERAS[:1]) | {OBS_ENV_STATE: {"mean": MEAN, "std": STD}}


def config_of(known: bool = True, **options):
    """A small policy's config, for data that has an environment state or has none."""
    config = tiny_config(CAMERAS[:1], recipe="small", max_state_dim=32, max_action_dim=32, chunk_size=6,
                         n_action_steps=3, **options)  # fmt: skip
    shapes = {OBS_STATE: {"shape": (DIMS,)}, ACTION: {"shape": (DIMS,)}}
    if known:
        config.input_features[OBS_ENV_STATE] = PolicyFeature(FeatureType.ENV, (len(MEAN),))
        shapes[OBS_ENV_STATE] = {"shape": (len(MEAN),)}
    config.set_dataset_feature_metadata(shapes)
    return config


def batch_of(size: int = 4) -> dict:
    batch = make_batch(batch_size=size, cameras=CAMERAS[:1], size=64, chunk=6, vocab_size=250)
    seen = MEAN + STD * torch.randn(size, len(MEAN), generator=torch.Generator().manual_seed(1))
    return batch | {OBS_ENV_STATE: seen, "index": torch.arange(size)}


def make(**options) -> PI0Policy:
    torch.manual_seed(0)
    return PI0Policy(config_of(**options), dataset_stats=STATISTICS)


def test_the_loss_is_what_the_states_token_says():
    """Another token, numbers that are not normalised or do not vary, or a weight that is not applied."""
    policy, batch = make(environment_state_weight=0.5), batch_of()
    tokens = []
    policy.model.expert.register_forward_hook(lambda module, args, found: tokens.append(found[:, 0]))
    policy.train()
    loss, info = policy(batch)
    said = policy.model.action_out_proj(tokens[0])[:, DIMS : DIMS + 2]
    expected = (said - ((batch[OBS_ENV_STATE] - MEAN) / STD)[:, :2]).square().mean()
    assert info["loss_environment_state"] == pytest.approx(expected.item(), rel=1e-5)
    flow = sum(x for name, x in info.items() if name.startswith("loss_") and "environment" not in name) / DIMS
    assert loss.item() == pytest.approx(flow + 0.5 * expected.item(), rel=1e-5)
    per_sample, _ = policy(batch, reduction="none")
    assert per_sample.shape == (4,)
    assert per_sample.mean().item() == pytest.approx(loss.item(), rel=1e-5)


def test_it_is_learned_and_padding_stays_unread():
    """A loss without a gradient; and noise in the padding of actions that a small network would read."""
    policy, batch = make(), batch_of()
    _, told = train(policy, batch, 60)
    assert told[-1]["loss_environment_state"] < 0.3 * told[0]["loss_environment_state"]
    assert not policy.model.action_in_proj.weight[:, DIMS:].any()
    assert policy.model.action_in_proj.weight[:, :DIMS].all()
    policy.eval()
    noise = torch.randn(4, 6, policy.config.max_action_dim)
    other = torch.cat([noise[..., :DIMS], torch.randn(4, 6, policy.config.max_action_dim - DIMS)], dim=-1)
    assert torch.equal(policy.predict_action_chunk(batch, noise), policy.predict_action_chunk(batch, other))


def test_evaluation_needs_and_counts_none():
    """A held-out loss that cannot be compared, or a policy that needs in use what only training has."""
    policy, batch = make(), batch_of()
    del batch[OBS_ENV_STATE]
    with torch.no_grad():
        _, info = policy.eval()(batch)
    assert "loss_environment_state" not in info
    assert policy.predict_action_chunk(batch).shape == (4, 6, DIMS)


def test_a_checkpoint_has_no_weight_more(tmp_path):
    """A tensor that other π₀ do not know; or a run that is resumed with another second loss."""
    policy, batch = make(), batch_of()
    train(policy, batch, 3)
    policy.save_pretrained(tmp_path / "with")
    make(known=False).save_pretrained(tmp_path / "without")
    saved, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "without"))
    assert saved.keys() == plain.keys()
    assert saved["model.action_out_proj.bias"].shape == (DIMS + len(MEAN),)
    assert plain["model.action_out_proj.bias"].shape == (DIMS,)
    config = config_of()
    config.max_action_dim, config.pretrained_path = policy.config.max_action_dim, str(tmp_path / "with")
    again = PI0Policy.from_pretrained(tmp_path / "with", config=config, dataset_stats=STATISTICS)
    policy.train(), again.train()
    again.config.updates = policy.config.updates
    assert again(batch)[0] == policy(batch)[0]


def test_weights_that_read_padding_keep_their_noise():
    """A base that was trained with noise in the padding, fine-tuned without, acts on what it has not seen."""
    policy, batch = make(), batch_of()
    with torch.no_grad():
        policy.model.action_in_proj.weight[:, DIMS:] = 0.5
    policy.train()
    loss = policy(batch, noise=torch.randn(4, 1, 6, policy.config.max_action_dim), time=torch.full((4, 1), 0.5))[0]
    loss.backward()
    assert policy.model.action_in_proj.weight.grad[:, DIMS:].any()


@pytest.mark.parametrize(("known", "weight", "dims"), [(True, None, DIMS + 4), (True, 0, DIMS), (False, None, DIMS)])
def test_room_is_made_where_it_is_needed(known, weight, dims):
    """Padding without a use, or no row for what has to be told."""
    options = {} if weight is None else {"environment_state_weight": weight}
    policy = make(known=known, **options)
    assert policy.config.max_action_dim == dims
    batch = batch_of() if known else {key: x for key, x in batch_of().items() if key != OBS_ENV_STATE}
    policy.train()
    assert ("loss_environment_state" in policy(batch)[1]) == (dims > DIMS)


def test_errors_name_the_remedy():
    """A shape error of torch's, or a loss against numbers that were not normalised."""
    with pytest.raises(ValueError, match=r"mean and std of.*recompute_stats.*environment_state_weight=0"):
        PI0Policy(config_of(), dataset_stats=stats(cameras=CAMERAS[:1]))
    narrow = config_of()
    narrow.max_action_dim = DIMS + 1
    with pytest.raises(ValueError, match=rf"max_action_dim={DIMS + 4}"):
        PI0Policy(narrow, dataset_stats=STATISTICS)
    policy, batch = make().train(), batch_of()
    with pytest.raises(ObservationError, match="expected"):
        policy(batch | {OBS_ENV_STATE: torch.zeros(4, 7)})
    del batch[OBS_ENV_STATE]
    with pytest.raises(ObservationError, match=r"environment_state_weight.*set it to 0"):
        policy(batch)


def test_processors_leave_it_as_it_is():
    """Numbers that are normalised twice."""
    config = config_of()
    preprocess, _ = make_pre_post_processors(config, dataset_stats=STATISTICS)
    raw = {CAMERAS[0]: torch.rand(1, 3, 64, 64), OBS_STATE: torch.zeros(1, DIMS), ACTION: torch.zeros(1, 6, DIMS),
           OBS_ENV_STATE: MEAN[None] + 1, "task": ["reach"]}  # fmt: skip
    assert torch.equal(preprocess(raw)[OBS_ENV_STATE], MEAN[None] + 1)
