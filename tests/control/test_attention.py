"""Attention of the action tokens: the weights that are read, where they lie in pictures and prompts, and that nothing
remains of the reading."""

import functools

import graph_recorder
import pytest
import torch
from conftest import CAMERAS, draws, make_batch, relative, shake, small_policy
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from transformers import ByT5Tokenizer

from lerobot_pi0.control import sampling
from lerobot_pi0.control.attention import is_recorded, mean_weights, on_picture, parts, recorded, words
from lerobot_pi0.kernels import compiled_layers, cuda_layers
from lerobot_pi0.kernels.cuda_graphs import CudaGraphs
from lerobot_pi0.network import solvers
from lerobot_pi0.network.attention import KVCache, additive_mask, attention
from lerobot_pi0.network.pi0 import block_mask

pytestmark = pytest.mark.usefixtures("small")


def own(policy) -> list[dict]:
    """What the layers of the expert have of their own: attributes and hooks."""
    expert = policy.model.expert
    return [
        {name: dict(x) if isinstance(x, dict) else x for name, x in vars(module).items()}
        for module in (expert, *(m for layer in expert.layers for m in (layer, layer.self_attn)))
    ]


@pytest.fixture
def policy():
    torch.manual_seed(0)
    made = small_policy(num_inference_steps=3)
    shake(made)
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("guide", [None, "identity", "vjp", "trained"])
def test_the_chunk_is_the_same(guide, dtype):
    """Catches a recording that changes a bit of the chunk, is lost in autograd's or RTC's wrappers, counts keys twice
    or leaves some out, or stays in the model."""
    options = {"rtc_config": RTCConfig(), "rtc_guidance": guide, "rtc_training_max_delay": 9} if guide else {}
    left = {"prev_chunk_left_over": torch.randn(20, 6), "inference_delay": 3} if guide else {}
    policy = small_policy(dtype=dtype, num_inference_steps=3, **options)
    shake(policy)
    batch, (noise, _) = make_batch(), draws(0, 2)
    plain, before = policy.predict_action_chunk(batch, noise=noise[:, 0], **left), own(policy)
    with recorded(policy.model) as seen:
        assert torch.equal(policy.predict_action_chunk(batch, noise=noise[:, 0], **left), plain)
        assert is_recorded(policy.model)
    assert own(policy) == before and not is_recorded(policy.model)
    assert torch.allclose(seen.weights().sum(dim=1), torch.ones(2)) and (seen.weights() >= 0).all()
    found = parts(seen.weights(), policy.observe(batch, torch.device("cpu")), policy.model)
    shares = found.shares([*CAMERAS])
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5) and min(shares.values()) > 0
    padding = ~policy.observe(batch, torch.device("cpu")).token_mask_BL
    assert padding.any() and (found.prompt_BL[padding] == 0).all() and (found.prompt_BL[~padding] > 0).all()


@pytest.mark.parametrize("where", ["in the block", "in the network"])
def test_nothing_remains_after_an_error(policy, where, monkeypatch):
    """Catches layers that go on recording, or listen to the state's token, after a chunk that failed."""
    before = own(policy)
    with pytest.raises(ZeroDivisionError), recorded(policy.model) as seen:
        if where == "in the block":
            raise ZeroDivisionError
        monkeypatch.setattr(policy.model.expert.layers[1].mlp, "forward", lambda x: 1 / 0)
        obs = policy.observe(make_batch(), torch.device("cpu"))
        context = policy.model.context(obs, with_state=False)
        policy.model.velocity(draws(0, 2)[0], policy.model.embed_time(torch.ones(1, 1, 1)), context)
    assert own(policy) == before and not seen.listens


def test_one_block_at_a_time(policy):
    """Catches a second block that records the first one's recording, and whose end ends both."""
    with recorded(policy.model):
        with pytest.raises(RuntimeError, match="already"), recorded(policy.model):
            pass
        assert is_recorded(policy.model)
    with recorded(policy.model) as seen, pytest.raises(RuntimeError, match="no attention was recorded"):
        seen.weights()


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("samples", [1, 3])
def test_the_weights_are_those_of_the_network(samples, with_state):
    """Catches another scale, mask or order of keys than the network's, or the state's queries among the actions'.
    Values of which each is a direction of its own make the network's attention return its weights."""
    heads, steps, before = 2, 4, 7
    draw = torch.Generator().manual_seed(0)
    tokens = samples * steps + with_state
    q, k, past = (torch.randn(2, n, 8, generator=draw) * 2 for n in (tokens * heads, tokens, before))
    seen = torch.rand(2, before, generator=draw) > 0.3
    mask = additive_mask(block_mask(seen, samples, steps, heads, with_state), q.dtype, samples, int(with_state))
    eye = torch.eye(before + tokens).expand(2, -1, -1)
    expected = attention(q, KVCache(k, eye[:, before:]), mask, KVCache(past, eye[:, :before]))
    expected = expected[:, with_state * heads :].mean(dim=1)
    found = mean_weights(q, KVCache(k, k), mask, KVCache(past, past))
    assert torch.allclose(found, expected, atol=1e-6)
    assert (found[:, :before][~seen] == 0).all()
    bare = attention(q, KVCache(k, torch.eye(tokens).expand(2, -1, -1))).mean(dim=1)
    assert torch.allclose(mean_weights(q, KVCache(k, k), None, None), bare, atol=1e-6)


def test_what_is_averaged(policy):
    """Catches an average that leaves steps or layers out, or takes in the attention of the state's token."""
    batch, (noise, _) = make_batch(), draws(0, 2)
    with recorded(policy.model) as whole:
        policy.predict_action_chunk(batch, noise=noise[:, 0])
    obs, x, each = policy.observe(batch, torch.device("cpu")), noise[:, :1], []
    with torch.no_grad():
        context = policy.model.context(obs)
        for time in solvers.fixed_times("euler", 3, x.device):
            with recorded(policy.model) as step:
                x = x - policy.model.velocity(x, policy.model.embed_time(time[None, None, None]), context) / 3
            each.append(step.by_layer())
    assert len(each[0]) == policy.model.expert.cfg.depth
    assert relative(whole.by_layer(), torch.stack(each).mean(dim=0)) < 1e-5
    assert relative(whole.weights(), torch.stack(each).mean(dim=(0, 1))) < 1e-5


def test_several_draws_and_the_state_beside_them(policy):
    """Catches draws of noise that see each other's actions, and weights that depend on where the state's token is
    computed."""
    obs, (noise, _) = policy.observe(make_batch(), torch.device("cpu")), draws(0, 2, samples=3)
    time = policy.model.embed_time(torch.full((1, 1, 1), 0.5))
    found = {}
    with torch.no_grad():
        for with_state in (True, False):
            context = policy.model.context(obs, with_state=with_state)
            for name, x in (("all", noise), *((k, noise[:, k : k + 1]) for k in range(3))):
                with recorded(policy.model) as seen:
                    policy.model.velocity(x, time, context)
                found[name, with_state] = parts(seen.weights(), obs, policy.model)
    for with_state in (True, False):
        alone = [torch.stack(x).mean(dim=0) for x in zip(*(found[k, with_state] for k in range(3)), strict=True)]
        assert all(relative(a, b) < 1e-5 for a, b in zip(found["all", with_state], alone, strict=True))
    assert all(relative(a, b) < 1e-5 for a, b in zip(found["all", True], found["all", False], strict=True))


@pytest.mark.parametrize("shape", [(32, 32), (48, 64), (64, 32)], ids=str)
def test_patches_lie_where_they_were_seen(policy, shape):
    """Catches rows for columns, cameras in another order, and a picture without its black borders: what is changed
    under a patch of the heat changes this patch's token and no other."""
    for layer in policy.model.vision.vision_model.encoder.layers:  # so that each patch keeps to itself
        for last in (layer.self_attn.out_proj, layer.mlp.fc2):
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.zeros_(last.bias)
    draw = torch.Generator().manual_seed(0)
    batch = make_batch() | {key: torch.rand(2, 3, *shape, generator=draw) for key in CAMERAS}
    cpu = torch.device("cpu")
    with torch.no_grad():
        obs = policy.observe(batch, cpu)
        before, _ = policy.model.prefix(obs)
        for camera, row, column in ((0, 1, 0), (1, 2, 3), (2, 1, 2)):
            heat = torch.zeros(4, 4)
            heat[row, column] = 1
            under = on_picture(heat, 8, 32, *shape) > 0
            changed = batch | {CAMERAS[camera]: torch.where(under, 1 - batch[CAMERAS[camera]], batch[CAMERAS[camera]])}
            after, _ = policy.model.prefix(policy.observe(changed, cpu))
            moved = (after != before).any(dim=2).float()
            (expected := torch.zeros(2, 3, 4, 4))[:, camera, row, column] = float(under.any())
            found = parts(torch.cat([moved, torch.zeros(2, 51)], dim=1), obs, policy.model).patches_BNHW
            assert torch.equal(found, expected)
    whole = on_picture(torch.ones(4, 4), 8, 32, *shape)
    assert whole.shape == shape and (whole == 1).all()


def test_words_of_a_prompt():
    """Catches a weight at the neighbouring word, a word that is cut at a letter of several bytes, and a line break or
    the end of the prompt that disappears in a word."""
    tokenizer = ByT5Tokenizer()
    tokens = tokenizer("go to the röd cube\n")["input_ids"]
    found = words(tokenizer, tokens, [1.0] * len(tokens))
    assert found == [("go", 2), ("to", 3), ("the", 4), ("röd", 5), ("cube", 5), ("\n", 1), ("</s>", 1)]


@pytest.fixture
def gpu(monkeypatch) -> list:
    """The CPU in the place of a GPU, a recorder in that of CUDA graphs, and no compiler: what would be compiled runs as
    it is, and its first arguments are in this list."""
    monkeypatch.setattr(cuda_layers, "ON", ("cuda", "cpu"))
    monkeypatch.setattr(sampling, "CudaGraphs", functools.partial(CudaGraphs, graph_recorder.Recorder))
    monkeypatch.setattr(graph_recorder.Recorder, "made", 0)
    compiled: list = []
    monkeypatch.setattr(torch, "compile", lambda run, **_: lambda *args: (compiled.append(args[0]), run(*args))[1])
    compiled_layers._compiled.cache_clear()
    yield compiled
    compiled_layers._compiled.cache_clear()


@pytest.mark.parametrize("compiles", [False, True])
def test_on_a_gpu(gpu, monkeypatch, compiles):
    """Catches a recording that misses the layers of CUDA, in which the state's token runs with the first actions, or is
    captured in a graph or compiled, and never sees another chunk."""
    torch.manual_seed(0)
    policy = small_policy(num_inference_steps=3, compile_model=compiles)
    shake(policy)
    batch, (noise, _), before = make_batch(0, 1, prompt=(9,)), draws(0, 1), own(policy)
    with recorded(policy.model) as seen:
        chunk = policy.predict_action_chunk(batch, noise=noise[:, 0])
    assert graph_recorder.Recorder.made == 0 and own(policy) == before
    assert bool(gpu) == compiles and not {*map(id, gpu)} & {*map(id, policy.model.expert.layers)}
    monkeypatch.setattr(cuda_layers, "ON", ("cuda",))
    with recorded(policy.model) as expected:
        assert relative(chunk, policy.predict_action_chunk(batch, noise=noise[:, 0])) < 1e-4
    assert relative(seen.by_layer(), expected.by_layer()) < 1e-4
