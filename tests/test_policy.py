"""LeRobot's contract for policies: the methods that its commands call, and what they may rely on."""

import json
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ACTION,
    CAMERAS,
    DIMS,
    BuiltinPI0Config,
    draws,
    gradients,
    make_batch,
    relative,
    shake,
    small_policy,
    stats,
    tiny_config,
)
from lerobot.rollout.inference.rtc import supports_rtc_inference

from lerobot_pi0 import PI0Config, PI0Policy
from lerobot_pi0.checkpoints.errors import CheckpointConfigError
from lerobot_pi0.inputs.observation import ObservationError
from lerobot_pi0.training.run import part_sizes

META = SimpleNamespace(stats=stats())
MODES = {
    "all": {},
    "expert only": {"train_expert_only": True},
    "frozen vision": {"freeze_vision_encoder": True},
}


def tiny_policy(**options) -> PI0Policy:
    """A policy of the tiny preset with one camera; equal options give equal weights."""
    torch.manual_seed(0)
    policy = PI0Policy(tiny_config(CAMERAS[:1], **options))
    shake(policy)
    return policy


def tiny_batch() -> dict:
    return make_batch(cameras=CAMERAS[:1], size=64)


def reload(policy: PI0Policy, folder, **options) -> PI0Policy:
    policy.save_pretrained(folder)
    return PI0Policy.from_pretrained(folder, **options)


def trained_names(policy: PI0Policy) -> set[str]:
    return {name for name, p in policy.named_parameters() if p.requires_grad}


# --- forward ------------------------------------------------------------------------------------------------


def test_forward(small):
    """Catches a loss that cannot be back-propagated, or tensors in the dictionary that LeRobot logs and adds up."""
    policy, batch, (noise, time) = small_policy(), make_batch(batch_size=3), draws(0, 3)
    loss, info = policy.forward(batch, noise=noise, time=time)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.requires_grad
    assert info["loss"] == loss.item()
    assert all(type(value) in (int, float) for value in info.values())


def test_forward_per_sample(small):
    """Catches a `reduction="none"` that mixes samples: LeRobot weighs samples with it."""
    policy, batch, (noise, time) = small_policy(flow_samples=2), make_batch(batch_size=3), draws(0, 3, 2)
    losses, info = policy.forward(batch, reduction="none", noise=noise, time=time)
    assert losses.shape == (3,)
    for i in range(3):
        alone = {key: value[i : i + 1] for key, value in batch.items()}
        loss, _ = policy.forward(alone, noise=noise[i : i + 1], time=time[i : i + 1])
        torch.testing.assert_close(losses[i], loss)
    mean, _ = policy.forward(batch, noise=noise, time=time)
    torch.testing.assert_close(losses.mean(), mean)
    assert info["loss"] == pytest.approx(mean.item())
    with pytest.raises(ValueError, match="sum"):
        policy.forward(batch, reduction="sum")


def test_forward_draws_follow_the_seed(small):
    """Catches draws from a generator that `set_seed` does not seed, and draws that are always the same."""
    policy, batch = small_policy(), make_batch()

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return policy.forward(batch)[1]["loss"]

    assert loss(3) == loss(3) != loss(4)


def test_training_lowers_the_loss(small):
    """Catches gradients of the wrong sign, or an optimizer without parameters, in 25 steps on one batch."""
    torch.manual_seed(0)
    policy, batch, (noise, time) = small_policy().train(), make_batch(cameras=CAMERAS[:1]), draws(0, 2)
    optimizer = torch.optim.Adam(policy.get_optim_params(), 3e-3)
    losses = []
    for _ in range(25):
        loss, info = policy.forward(batch, noise=noise, time=time)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(info["loss"])
    assert losses[-1] < losses[0] * 0.7


# --- what is trained ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_optim_params(small, mode):
    """Catches frozen weights in the optimizer, which weight decay would shrink, and weights that are forgotten."""
    policy = small_policy(**MODES[mode])
    model, everything = policy.model, {name for name, _ in policy.named_parameters()}
    unread = {id(p) for p in model.unread_parameters()}
    untrained = {name for name, p in policy.named_parameters() if id(p) in unread}
    if mode == "expert only":
        untrained |= {name for name in everything if ".paligemma." in name}
    if mode == "frozen vision":
        untrained |= {name for name in everything if ".vision_tower." in name}
    assert trained_names(policy) == everything - untrained
    optimised = policy.get_optim_params()
    assert [id(p) for p in optimised] == [id(p) for p in policy.parameters() if p.requires_grad]
    assert len(unread) == 7


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", ["small", "tiny"])
def test_every_trained_parameter_gets_a_gradient(small, mode, size):
    """Catches a parameter that is listed as trained but on which the loss does not depend."""
    policy = small_policy(**MODES[mode]) if size == "small" else tiny_policy(**MODES[mode])
    shake(policy)
    policy.train()
    batch = make_batch() if size == "small" else tiny_batch()
    policy.forward(batch)[0].backward()
    found = gradients(policy)
    assert found.keys() == trained_names(policy)
    for name, grad in found.items():
        assert grad.any() or name.endswith("k_proj.bias"), name  # a softmax does not see a constant


def test_frozen_parameters_stay(small):
    """Catches a frozen VLM that changes: it has to be bitwise equal after an optimizer step with weight decay."""
    policy = small_policy(train_expert_only=True).train()
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    policy.forward(make_batch())[0].backward()
    torch.optim.AdamW(policy.get_optim_params(), lr=0.1, weight_decay=0.1).step()
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained_names(policy)


@pytest.mark.parametrize(
    ("mode", "parts"),
    [("all", "111"), ("expert only", "001"), ("frozen vision", "011")],
)
def test_the_log_says_what_is_trained(caplog, mode, parts):
    """Catches a log line whose counts are those of another mode, and one that is logged never or at every step."""
    policy = tiny_policy(**MODES[mode])
    with caplog.at_level("INFO", "lerobot_pi0"):
        trained = sum(p.numel() for p in policy.get_optim_params())  # before the weights may be spread
        policy.train().eval()
        policy.train()
    (line,) = (r.getMessage() for r in caplog.records if r.getMessage().startswith("trained: "))
    sizes = part_sizes(policy.model)
    assert all(f"{name} {own / 1e6:.2f} of {n / 1e6:.2f} M" in line for name, (n, own) in sizes.items())
    vision, vlm, expert, projections = (own for _, own in sizes.values())
    assert [vision > 0, vlm > 0, expert > 0] == [part == "1" for part in parts] and projections > 0
    assert vision + vlm + expert + projections == trained
    card = policy.generate_model_card(None).content
    for p in policy.parameters():
        p.data = p.data.flatten()[:1]  # what FSDP leaves of it here
    assert policy.generate_model_card(None).content == card


# --- train_expert_only, automatic ---------------------------------------------------------------------------


def test_a_random_vlm_is_trained(caplog):
    """Catches a policy from scratch whose random VLM is never trained."""
    with caplog.at_level("INFO"):
        policy = PI0Policy(tiny_config())
    assert policy.config.train_expert_only is False
    assert any(p.requires_grad for p in policy.model.paligemma.parameters())
    assert "train_expert_only=False: the VLM starts from random weights" in caplog.text


def test_a_pretrained_vlm_is_frozen(tmp_path, caplog):
    """Catches a fine-tuning of all 3 B parameters that nobody asked for."""
    tiny_policy().save_pretrained(tmp_path)
    with caplog.at_level("INFO"):
        policy = PI0Policy.from_pretrained(tmp_path, config=tiny_config())
    assert policy.config.train_expert_only is True
    assert not any(p.requires_grad for p in policy.model.paligemma.parameters())
    assert "train_expert_only=True: the VLM starts from pretrained weights" in caplog.text


def test_a_random_vlm_that_is_frozen(caplog):
    """Catches a run that trains the expert over a frozen random VLM, because the checkpoint was forgotten."""
    tiny_policy(train_expert_only=True)
    assert "the VLM that is frozen is random: give it weights with --policy.pretrained_path" in caplog.text


@pytest.mark.parametrize("frozen", [False, True])
def test_an_explicit_choice_stays(tmp_path, frozen):
    """Catches an automatic choice that overrules the user's, in the config or through the checkpoint."""
    policy = tiny_policy(train_expert_only=frozen)
    assert policy.config.train_expert_only is frozen
    assert reload(policy, tmp_path).config.train_expert_only is frozen
    chosen = PI0Policy.from_pretrained(tmp_path, config=tiny_config(train_expert_only=not frozen))
    assert chosen.config.train_expert_only is not frozen


def test_the_saved_config_holds_the_answer(tmp_path):
    """Catches a saved null, which the built-in would read as False, and for which a resumed run would decide again."""
    tiny_policy().save_pretrained(tmp_path / "scratch")
    PI0Policy.from_pretrained(tmp_path / "scratch", config=tiny_config()).save_pretrained(tmp_path / "tuned")
    saved = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("scratch", "tuned")]
    assert [config["train_expert_only"] for config in saved] == [False, True]


# --- chunks and the queue -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_chunk_shape(small, batch_size):
    """Catches a chunk with padded dims in it, or one that needs gradients."""
    chunk = small_policy().predict_action_chunk(make_batch(batch_size=batch_size))
    assert chunk.shape == (batch_size, 50, DIMS)
    assert chunk.dtype == torch.float32
    assert not chunk.requires_grad


def test_inference_needs_no_actions(small):
    """Catches a chunk that needs the recorded actions: on a robot there is no 'action' in the batch."""
    policy, batch = small_policy(), make_batch()
    del batch[ACTION]
    assert policy.select_action(batch).shape == (2, DIMS)
    with pytest.raises(ObservationError, match="'action'"):
        policy.forward(batch)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_contexts_of_the_callers(small, context):
    """Catches code that fails under inference_mode, or after which the policy cannot be trained."""
    policy, batch = small_policy(), make_batch()
    with context():
        assert policy.select_action(batch).shape == (2, DIMS)
    policy.train()
    policy.forward(batch)[0].backward()
    assert policy.model.action_in_proj.weight.grad.any()


def counted_chunks(policy: PI0Policy, monkeypatch) -> list[torch.Tensor]:
    """A list that collects the chunks that `select_action` computes from now on."""
    chunks: list[torch.Tensor] = []
    predict = policy.predict_action_chunk

    def counted(*args, **kwargs):
        chunks.append(predict(*args, **kwargs))
        return chunks[-1]

    monkeypatch.setattr(policy, "predict_action_chunk", counted)
    return chunks


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_queue(small, monkeypatch, steps, batch_size):
    """Catches a queue that skips, repeats or transposes actions, or that runs past `n_action_steps`."""
    policy, batch = small_policy(n_action_steps=steps, num_inference_steps=2), make_batch(batch_size=batch_size)
    chunks = counted_chunks(policy, monkeypatch)
    ticks = 2 * steps + 1
    actions = [policy.select_action(batch) for _ in range(ticks)]
    assert len(chunks) == 3
    for i, action in enumerate(actions):
        assert torch.equal(action, chunks[i // steps][:, i % steps])


def test_reset(small, monkeypatch):
    """Catches an episode that begins with the rest of the last one's chunk."""
    policy, batch = small_policy(num_inference_steps=2), make_batch()
    chunks = counted_chunks(policy, monkeypatch)
    policy.select_action(batch)
    policy.reset()
    assert torch.equal(policy.select_action(batch), chunks[1][:, 0])


def test_another_number_of_environments(small):
    """Catches actions of one environment that are sent to another; the error says to call reset()."""
    policy = small_policy(num_inference_steps=2)
    policy.select_action(make_batch(batch_size=2))
    with pytest.raises(RuntimeError, match=r"3 observations .* made for 2: call reset\(\)"):
        policy.select_action(make_batch(batch_size=3))
    policy.reset()
    assert policy.select_action(make_batch(batch_size=3)).shape == (3, DIMS)


def test_a_popped_tick_touches_no_module(small, monkeypatch):
    """Catches a walk over all modules at every tick, as in the built-in (`eval()`). It is counted, not timed."""
    policy, batch = small_policy(num_inference_steps=2), make_batch()
    policy.select_action(batch)
    touched: list[str] = []
    for name in ("__call__", "train", "eval", "modules", "named_modules", "children", "parameters", "to"):
        original = getattr(torch.nn.Module, name)

        def counted(self, *args, name=name, original=original, **kwargs):
            touched.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.nn.Module, name, counted)
    for _ in range(49):
        policy.select_action(batch)
    assert touched == []
    policy.select_action(batch)
    assert "__call__" in touched


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_non_finite_leaves(small, value):
    """Catches NaN that is sent to motors: both methods have to raise an error, and leave nothing in the queue."""
    policy, batch = small_policy(), make_batch()
    with torch.no_grad():
        policy.model.action_out_proj.bias[2] = value
    for method in (policy.predict_action_chunk, policy.select_action, policy.select_action):
        with pytest.raises(FloatingPointError, match="check the weights"):
            method(batch)


def test_padded_dims_may_be_anything(small):
    """Catches an error about values in padded dims, which nobody reads."""
    policy = small_policy()
    with torch.no_grad():
        policy.model.action_out_proj.weight[DIMS:] = 0
    assert policy.predict_action_chunk(make_batch()).isfinite().all()


def test_callers_pass_what_lerobot_passes(small):
    """Catches an error about keyword arguments that LeRobot's loops pass, a misspelt one that is silently accepted,
    and a policy that LeRobot's real-time loop refuses as unable."""
    policy, batch = small_policy(num_inference_steps=2), make_batch()
    chunk = policy.predict_action_chunk(batch, inference_delay=3, prev_chunk_left_over=None)
    assert chunk.shape == (2, 50, DIMS)
    with pytest.raises(TypeError, match="did you mean inference_delay"):
        policy.predict_action_chunk(batch, inference_delays=3)
    assert supports_rtc_inference(policy)


def test_train_and_eval_return_the_policy(small):
    """Catches a `train()` that returns None, as in the built-in's network: chained calls would fail."""
    policy = small_policy()
    assert not policy.training
    assert policy.train() is policy
    assert policy.training
    assert policy.model.expert.training
    assert policy.train() is policy
    assert policy.eval() is policy
    assert not policy.model.expert.training
    policy.model.expert.train()  # as an adapter is hung in, whatever the policy is doing
    assert not policy.eval().model.expert.training


def test_options_that_do_not_go_together(tmp_path):
    """Catches an error that does not name the checkpoint whose saved option contradicts an option of the run."""
    PI0Policy(tiny_config(CAMERAS[:1], rtc_training_max_delay=7)).save_pretrained(tmp_path)
    config = PI0Config.from_pretrained(tmp_path)
    config.chunk_size = config.n_action_steps = 4
    with pytest.raises(CheckpointConfigError, match=r"lerobot_pi0.json.* do not go together: rtc_training_max_delay=7"):
        PI0Policy.from_pretrained(tmp_path, config=config)


@pytest.mark.parametrize(("shapes", "problem"), [
    ({"noise": (2, 1, 50, 1), "time": (2, 1)}, "noise has shape"),
    ({"noise": (1, 1, 50, 32), "time": (2, 1)}, "noise has shape"),
    ({"noise": (2, 3, 50, 32), "time": (2, 1)}, "noise has shape"),
    ({"noise": (2, 1, 50, 32), "time": (2,)}, "noise has shape"),
    ({"index": (1,)}, "1 numbers for 2 samples"),
])  # fmt: skip
def test_draws_of_other_shapes(small, shapes, problem):
    """Catches noise, times or indices that are silently broadcast: several samples would share one draw."""
    given = {name: torch.ones(shape) for name, shape in shapes.items()}
    batch = make_batch(0, 2) | {name: given.pop(name) for name in ("index",) if name in given}
    with pytest.raises(ValueError, match=problem):
        small_policy().train().forward(batch, **given)


def test_noise_temperature(small):
    """Catches an option that is not read, that scales more than the noise, or that a solver of its own goes around."""
    policy, batch = small_policy().eval(), make_batch(0, 2)
    first, second = torch.randn(2, 2, policy.config.chunk_size, 32, generator=torch.Generator().manual_seed(0))

    def chunk(temperature, noise):
        policy.config.noise_temperature = temperature
        return policy.predict_action_chunk(batch, noise=noise)

    assert torch.equal(chunk(0.5, first), chunk(1.0, first / 2))
    assert torch.equal(chunk(0.0, first), chunk(0.0, second))
    assert torch.equal(chunk(0.0, None), chunk(1.0, torch.zeros_like(first)))
    assert not torch.allclose(chunk(0.5, first), chunk(0.5, second))


def test_noise_of_another_shape(small):
    """Catches a chunk of another length than the queue expects."""
    with pytest.raises(ValueError, match="noise has shape"):
        small_policy().predict_action_chunk(make_batch(0, 2), noise=torch.zeros(2, 40, 32))


# --- saving -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_and_load(tmp_path, dtype):
    """Catches a weight that is not saved, not loaded, or rounded: chunks have to be bitwise equal."""
    policy, batch, (noise, _) = tiny_policy(dtype=dtype), tiny_batch(), draws(0, 2)
    again = reload(policy, tmp_path)
    assert type(again) is PI0Policy
    chunks = [p.predict_action_chunk(batch, noise=noise[:, 0]) for p in (policy, again)]
    assert torch.equal(*chunks)
    assert {p.dtype for p in again.parameters()} == {getattr(torch, dtype)}
    assert not again.training


def test_options_survive(tmp_path):
    """Catches an option of this plugin that a checkpoint does not keep, or that overrides the command line."""
    policy = tiny_policy(flow_samples=3, tokenizer_max_length=20, n_action_steps=7)
    again = reload(policy, tmp_path).config
    assert (again.flow_samples, again.tokenizer_max_length, again.n_action_steps) == (3, 20, 7)
    chosen = PI0Policy.from_pretrained(tmp_path, config=tiny_config(flow_samples=2))
    assert chosen.config.flow_samples == 2


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_config_json_is_the_built_ins(tmp_path, options):
    """Catches a key in config.json that LeRobot's own class does not know, for which it would refuse the whole file."""
    tiny_policy(**options).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    known = {field.name for field in fields(BuiltinPI0Config)}
    assert saved.pop("type") == "pi0"
    assert saved.keys() == known
    assert all(saved[key] is not None for key in ("image_resolution", "tokenizer_max_length", "train_expert_only"))
    BuiltinPI0Config(**saved | {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"})


def test_a_config_of_another_class():
    """Catches the built-in's config in our policy: options would be missing in the middle of a run."""
    with pytest.raises(TypeError, match=r"expected lerobot_pi0\.PI0Config"):
        PI0Policy(BuiltinPI0Config(device="cpu"))


# --- dtypes -------------------------------------------------------------------------------------------------


def dtypes(policy: PI0Policy, trained: bool) -> set[torch.dtype]:
    return {p.dtype for p in policy.parameters() if p.requires_grad is trained}


def in_both_dtypes(**options) -> tuple[PI0Policy, PI0Policy]:
    """The same weights in bfloat16 and in float32."""
    half, full = tiny_policy(dtype="bfloat16", **options), tiny_policy(**options)
    half.load_state_dict(full.state_dict())
    return half, full


def test_bfloat16_is_for_what_is_frozen():
    """Catches trained weights in bfloat16, in which small updates are lost, or frozen weights in float32."""
    options = {"dtype": "bfloat16", "train_expert_only": True}
    for policy in (
        PI0Policy(tiny_config(**options), dataset_meta=META),
        PI0Policy(tiny_config(**options), dataset_stats=META.stats),
        PI0Policy(tiny_config(**options)).train(),
    ):
        assert dtypes(policy, trained=True) == {torch.float32}
        assert dtypes(policy, trained=False) == {torch.bfloat16}


def test_inference_is_all_bfloat16(tmp_path):
    """Catches float32 weights on a robot, which take twice the memory and run at half the speed."""
    policy = PI0Policy(tiny_config(CAMERAS[:1], dtype="bfloat16"), dataset_meta=META)
    again = reload(policy, tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert again.predict_action_chunk(tiny_batch()).dtype == torch.float32


def test_loading_for_training_is_float32(tmp_path):
    """Catches fine-tuning of weights in bfloat16 when the checkpoint is loaded with a dataset."""
    tiny_policy(dtype="bfloat16", train_expert_only=True).save_pretrained(tmp_path)
    policy = PI0Policy.from_pretrained(tmp_path, dataset_meta=META)
    assert dtypes(policy, trained=True) == {torch.float32}
    assert dtypes(policy, trained=False) == {torch.bfloat16}


@pytest.mark.parametrize("autocast", [True, False], ids=["accelerate's autocast", "no autocast around"])
@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_training(mode, autocast):
    """Catches a dtype mismatch in mixed precision, and gradients or losses that are not float32."""
    policies = [p.train() for p in in_both_dtypes(**MODES[mode])]
    batch, (noise, time) = tiny_batch(), draws(0, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = policies[0].forward(batch, noise=noise, time=time)
    loss.backward()
    expected, _ = policies[1].forward(batch, noise=noise, time=time)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    found = gradients(policies[0])
    assert found.keys() == trained_names(policies[0])
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in found.values())


def test_bfloat16_chunks():
    """Catches a chunk that is inaccurate because a sum or a time is in bfloat16, in storage and in mixed precision."""
    batch, (noise, _) = tiny_batch(), draws(0, 2)
    half, full = in_both_dtypes()
    exact = full.predict_action_chunk(batch, noise=noise[:, 0])
    for policy in (half, half.train().eval()):
        assert relative(policy.predict_action_chunk(batch, noise=noise[:, 0]), exact) < 0.03


# --- statistics ---------------------------------------------------------------------------------------------


def test_missing_statistics(tmp_path):
    """Catches training on raw units: LeRobot does not call the processor factory if a pretrained path is set."""
    broken = {key: value for key, value in META.stats.items() if key != ACTION}
    tiny_policy().save_pretrained(tmp_path)
    for given in ({"dataset_stats": broken}, {"dataset_meta": SimpleNamespace(stats=broken)}):
        with pytest.raises(ValueError, match=r"'action'.*recompute_stats"):
            PI0Policy(tiny_config(), **given)
        with pytest.raises(ValueError, match=r"'action'.*recompute_stats"):
            PI0Policy.from_pretrained(tmp_path, **given)
    with pytest.raises(ValueError, match="statistics"):
        PI0Policy(tiny_config(), dataset_meta=SimpleNamespace(stats=None))
