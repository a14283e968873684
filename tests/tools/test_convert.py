"""`lerobot-pi0 convert`: what comes out moves a robot as openpi's checkpoint would.

The JAX side is π₀ written a second time, on openpi's parameter tree: SigLIP with flax's own layers, the two Gemmas
as one joint attention over all tokens. It shares no line and no idea with the network that it is compared to.
"""

import asyncio
import dataclasses
import gc
import json
import logging
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CAMERAS, DIMS, SMALL_EXPERT, SMALL_VLM, draws, make_batch, relative, shake, small_policy
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi0.configuration_pi0 import PI0Config as BuiltinPI0Config
from lerobot.policies.pi0.modeling_pi0 import PI0Policy as BuiltinPI0Policy
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_TOKENS, OBS_STATE
from progress import bars
from safetensors.torch import load_file, save_file

from lerobot_pi0 import PI0Config, PI0Policy
from lerobot_pi0.checkpoints.checkpoint import Checkpoint
from lerobot_pi0.checkpoints.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    MismatchedCheckpointError,
    WrongPolicyError,
)
from lerobot_pi0.tools import main

pytestmark = [
    pytest.mark.usefixtures("small"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # Orbax' threads, on broken files
]

jax = pytest.importorskip("jax")
nn = pytest.importorskip("flax.linen")
ocp = pytest.importorskip("orbax.checkpoint")
jnp = jax.numpy
jax.config.update("jax_disable_most_optimizations", True)  # compiling is what takes time here


@pytest.fixture(autouse=True)
def logs(monkeypatch, caplog) -> None:
    """The command sets logging up anew, which would take it away from pytest."""
    monkeypatch.setattr("lerobot_pi0.tools.init_logging", lambda: None)
    caplog.set_level(logging.INFO, "lerobot_pi0")


BARE_CAMERAS = [key.removeprefix("observation.images.") for key in CAMERAS]


# ---------------------------------------------------------------- π₀ in JAX


class MlpBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.gelu(nn.Dense(SMALL_VLM.vision.mlp_dim)(x))  # flax numbers layers in the order they are made
        return nn.Dense(x.shape[-1])(hidden)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=SMALL_VLM.vision.heads)(y, y)
        return x + MlpBlock()(nn.LayerNorm()(x)), None


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=SMALL_VLM.vision.depth
        )
        return nn.LayerNorm(name="encoder_norm")(scanned(name="encoderblock")(x, None)[0])


class Siglip(nn.Module):
    @nn.compact
    def __call__(self, image_BHWC):
        cfg = SMALL_VLM.vision
        patch = (cfg.patch_size,) * 2
        x = nn.Conv(cfg.width, patch, strides=patch, padding="VALID", name="embedding")(image_BHWC)
        x = x.reshape(len(x), -1, cfg.width)
        x = x + self.param("pos_embedding", nn.initializers.normal(), (1, *x.shape[1:]))
        return nn.Dense(SMALL_VLM.gemma.width, name="head")(Encoder(name="Transformer")(x))


def gemma_tree(draw, cfg, suffix: str) -> dict:
    """Parameters of one stack, as openpi's scan stacks them."""
    L, W, F, N, D = cfg.depth, cfg.width, cfg.mlp_dim, cfg.heads, cfg.head_dim
    return {
        "attn": {
            f"q_einsum{suffix}": {"w": draw(L, N, W, D, scale=W)},
            f"kv_einsum{suffix}": {"w": draw(L, 2, 1, W, D, scale=W)},
            f"attn_vec_einsum{suffix}": {"w": draw(L, N, D, W, scale=N * D)},
        },
        f"mlp{suffix}": {"gating_einsum": draw(L, 2, W, F, scale=W), "linear": draw(L, F, W, scale=F)},
        f"pre_attention_norm{suffix}": {"scale": draw(L, W, scale=25)},
        f"pre_ffw_norm{suffix}": {"scale": draw(L, W, scale=25)},
    }


def openpi_tree(seed: int = 0) -> dict:
    """A random π₀ of openpi."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int, scale: float) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(scale)).astype(np.float32)

    vlm, expert = SMALL_VLM.gemma, SMALL_EXPERT
    side = SMALL_VLM.vision.image_size
    img = jax.eval_shape(Siglip().init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]
    img = jax.tree.map(lambda x: draw(*x.shape, scale=25), img)
    tree = {
        "PaliGemma": {
            "img": img,
            "llm": {
                "embedder": {"input_embedding": draw(SMALL_VLM.vocab_size, vlm.width, scale=vlm.width)},
                "layers": {},
                "final_norm": {"scale": draw(vlm.width, scale=25)},
                "final_norm_1": {"scale": draw(expert.width, scale=25)},
            },
        }
    }
    for stack in (gemma_tree(draw, vlm, ""), gemma_tree(draw, expert, "_1")):
        for name, part in stack.items():
            tree["PaliGemma"]["llm"]["layers"].setdefault(name, {}).update(part)
    W = expert.width
    sizes = {"state_proj": (32, W), "action_in_proj": (32, W), "action_time_mlp_in": (2 * W, W),
             "action_time_mlp_out": (W, W), "action_out_proj": (W, 32)}  # fmt: skip
    for name, (rows, columns) in sizes.items():
        tree[name] = {"kernel": draw(rows, columns, scale=rows), "bias": draw(columns, scale=25)}
    return tree


def add_lora(tree: dict, suffixes=("", "_1"), rank: int = 4, seed: int = 9) -> None:
    """openpi's LoRA parameters beside every einsum and MLP of the stacks."""
    rng = np.random.default_rng(seed)
    layers = tree["PaliGemma"]["llm"]["layers"]

    def factors(shape) -> tuple[np.ndarray, np.ndarray]:
        shapes = (*shape[:-1], rank), (*shape[:-2], rank, shape[-1])
        return tuple(rng.standard_normal(s).astype(np.float32) * 0.1 for s in shapes)

    for suffix in suffixes:
        for name in ("q_einsum", "kv_einsum", "attn_vec_einsum"):
            part = layers["attn"][name + suffix]
            part["lora_a"], part["lora_b"] = factors(part["w"].shape)
        mlp = layers["mlp" + suffix]
        for name in ("gating_einsum", "linear"):
            mlp[f"{name}_lora_a"], mlp[f"{name}_lora_b"] = factors(mlp[name].shape)


def einsum(equation: str, x, p: dict, scaling: float):
    """openpi's LoRA: the two factors take the weight's place in its equation, rank for one of its last two axes."""
    out = jnp.einsum(equation, x, p["w"])
    if "lora_a" not in p:
        return out
    inputs, rest = equation.split(",")
    weight, result = rest.split("->")
    a, b = weight[-2:]
    between = result.replace(b, "L")
    low = jnp.einsum(f"{inputs},{weight.replace(b, 'L')}->{between}", x, p["lora_a"])
    return out + scaling * jnp.einsum(f"{between},{weight.replace(a, 'L')}->{result}", low, p["lora_b"])


def dense(x, p: dict, name: str, index=()):
    """x·w, with LoRA unscaled as openpi's MLP has it; `index` chooses one of two matrices."""
    out = x @ p[name][index]
    if name + "_lora_a" in p:
        out = out + x @ p[name + "_lora_a"][index] @ p[name + "_lora_b"][index]
    return out


def rms_norm(x, p: dict):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + p["scale"])


def rope(x_BTND, positions_BT):
    half = x_BTND.shape[-1] // 2
    angle = positions_BT[:, :, None, None] / 10_000.0 ** (jnp.arange(half) / half)
    a, b = x_BTND[..., :half], x_BTND[..., half:]
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1)


def joint_layer(xs, p: dict, mask, positions, scaling: float):
    """All tokens attend together; each token's matrices are those of its expert."""
    qs, ks, vs = [], [], []
    for suffix, x in zip(("", "_1"), xs, strict=True):
        h = rms_norm(x, p["pre_attention_norm" + suffix])
        qs.append(einsum("BTD,NDH->BTNH", h, p["attn"]["q_einsum" + suffix], scaling))
        k, v = einsum("BSD,CKDH->CBSKH", h, p["attn"]["kv_einsum" + suffix], scaling)
        ks.append(k)
        vs.append(v)
    q, k, v = (jnp.concatenate(y, axis=1) for y in (qs, ks, vs))
    q, k = rope(q, positions) * q.shape[-1] ** -0.5, rope(k, positions)
    logits = jnp.einsum("BTNH,BSKH->BNTS", q, k)
    probs = jax.nn.softmax(jnp.where(mask[:, None], logits, -2e38), axis=-1)
    mixed = jnp.einsum("BNTS,BSKH->BTNH", probs, v)
    split = xs[0].shape[1]
    out = []
    for suffix, x, y in zip(("", "_1"), xs, (mixed[:, :split], mixed[:, split:]), strict=True):
        x = x + einsum("BTNH,NHD->BTD", y, p["attn"]["attn_vec_einsum" + suffix], scaling)
        mlp, h = p["mlp" + suffix], rms_norm(x, p["pre_ffw_norm" + suffix])
        gated = nn.gelu(dense(h, mlp, "gating_einsum", 0)) * dense(h, mlp, "gating_einsum", 1)
        out.append(x + dense(gated, mlp, "linear"))
    return out


def linear(x, p: dict):
    return x @ p["kernel"] + p["bias"]


def time_embedding(time_B, width: int):
    """In float64: openpi's float32 is off by 1e-4 at its shortest period, which no conversion could repair."""
    period = 4e-3 * (4.0 / 4e-3) ** np.linspace(0, 1, width // 2)
    angle = np.asarray(time_B, np.float64)[:, None] * 2 * np.pi / period
    return jnp.asarray(np.concatenate([np.sin(angle), np.cos(angle)], axis=1), jnp.float32)


@jax.jit
def velocity(tree, obs: dict, x_t, time_BW, scaling: float = 1.0):
    """Velocity of noisy actions: the loss's forward pass of openpi, all tokens at once."""
    llm = tree["PaliGemma"]["llm"]
    images = Siglip().apply({"params": tree["PaliGemma"]["img"]}, jnp.concatenate(obs["images"]))
    images = jnp.split(images, len(obs["images"]))
    prompt = llm["embedder"]["input_embedding"][obs["tokens"]] * np.sqrt(SMALL_VLM.gemma.width)
    prefix = jnp.concatenate([*images, prompt], axis=1)
    batch, patches = len(prompt), images[0].shape[1]
    valid = [jnp.full((batch, patches), present) for present in obs["present"]] + [obs["token_mask"]]
    steps = x_t.shape[1]
    state = linear(obs["state"], tree["state_proj"])[:, None]
    actions = linear(x_t, tree["action_in_proj"])
    actions = jnp.concatenate([actions, jnp.repeat(time_BW[:, None], steps, axis=1)], axis=-1)
    actions = linear(jax.nn.swish(linear(actions, tree["action_time_mlp_in"])), tree["action_time_mlp_out"])
    xs = [prefix, jnp.concatenate([state, actions], axis=1)]
    valid = jnp.concatenate([*valid, jnp.ones((batch, 1 + steps), bool)], axis=1)
    block = jnp.asarray([0] * prefix.shape[1] + [1] + [2] * steps)
    mask = (block[None, None, :] <= block[None, :, None]) & valid[:, None, :] & valid[:, :, None]
    positions = jnp.cumsum(valid, axis=1) - 1

    def layer(xs, p):
        return joint_layer(xs, p, mask, positions, scaling), None

    xs, _ = jax.lax.scan(layer, xs, llm["layers"])
    return linear(rms_norm(xs[1], llm["final_norm_1"])[:, -steps:], tree["action_out_proj"])


def jax_observation(batch: dict) -> dict:
    """A preprocessed batch as openpi's network sees it: an absent camera is a black image that nobody attends to."""
    size = SMALL_VLM.vision.image_size
    present = [key in batch for key in CAMERAS]
    black = torch.zeros(len(batch[OBS_STATE]), 3, size, size)
    images = [batch.get(key, black).permute(0, 2, 3, 1).numpy() * 2 - 1 for key in CAMERAS]
    return {
        "images": images,
        "present": jnp.asarray(present),
        "tokens": batch[OBS_LANGUAGE_TOKENS].numpy(),
        "token_mask": batch["observation.language.attention_mask"].numpy(),
        "state": np.pad(batch[OBS_STATE].numpy(), ((0, 0), (0, 32 - DIMS))),
    }


def assert_acts_as(policy: PI0Policy, tree: dict, scaling: float = 1.0, cameras=CAMERAS) -> None:
    """The loss per element and a chunk of ten Euler steps, both to 1e-5."""
    batch = make_batch(3, cameras=cameras, chunk=policy.config.chunk_size)
    noise, time = draws(3, 2, chunk=policy.config.chunk_size)
    obs = jax_observation(batch)
    step = partial(velocity, tree, obs, scaling=scaling)

    actions = np.pad(batch[ACTION].numpy(), ((0, 0), (0, 0), (0, 32 - DIMS)))
    eps, t = noise[:, 0].numpy(), time[:, 0].numpy()
    x_t = t[:, None, None] * eps + (1 - t[:, None, None]) * actions
    errors = np.asarray(step(x_t, time_embedding(t, SMALL_EXPERT.width)) - (eps - actions)) ** 2
    with torch.no_grad():
        assert relative(policy.losses(batch, noise, time)[:, 0], torch.tensor(errors[..., :DIMS])) < 1e-5

    x = eps
    for i in range(10):
        x = x - step(x, time_embedding(np.full(2, 1 - i / 10), SMALL_EXPERT.width)) / 10
    chunk = policy.predict_action_chunk(batch, noise=noise[:, 0])
    assert relative(chunk, torch.tensor(np.asarray(x)[..., :DIMS])) < 1e-5


# ---------------------------------------------------------------- checkpoints on the disk


def write_stats(folder: Path, dims: int = DIMS, pad: int = 0) -> dict:
    """openpi's norm_stats.json, of float64, possibly computed after padding."""
    rng = np.random.default_rng(2)
    stats = {}
    for key in ("state", "actions"):
        mean, std = rng.standard_normal(dims), rng.random(dims) + 0.1
        columns = {"mean": mean, "std": std, "q01": mean - 2 * std, "q99": mean + 2 * std}
        stats[key] = {name: [*x.tolist(), *[0.0] * pad] for name, x in columns.items()}
    folder.mkdir(parents=True)
    (folder / "norm_stats.json").write_text(json.dumps({"norm_stats": stats}))
    return stats


def write_jax(folder: Path, tree: dict, value: bool = False) -> Path:
    """A step of an openpi run; `value` is the level that its training loop adds."""
    if value:
        tree = jax.tree.map(lambda x: {"value": x}, tree)
    with ocp.PyTreeCheckpointer() as writer:
        writer.save(folder.absolute() / "params", {"params": tree})
    write_stats(folder / "assets" / "me" / "my_robot")
    return folder


def convert(source: Path, output: Path, *options: str) -> int:
    return main(
        ["convert", f"--source={source}", f"--output={output}", "--text_tokenizer_name=bytes", "--chunk_size=50",
         f"--cameras=[{','.join(BARE_CAMERAS)}]", *options]
    )  # fmt: skip


def convert_and_load(source: Path, output: Path, *options: str) -> PI0Policy:
    assert convert(source, output, *options) == 0
    return PI0Policy.from_pretrained(output)


@pytest.fixture(scope="module")
def tree() -> dict:
    return openpi_tree()


@pytest.fixture(scope="module")
def jax_source(tree, tmp_path_factory) -> Path:
    return write_jax(tmp_path_factory.mktemp("openpi") / "29999", tree, value=True)


# ---------------------------------------------------------------- JAX


def test_jax_checkpoint_acts_as_openpi(jax_source, tree, tmp_path):
    """Any transposed, swapped, misnamed or forgotten leaf; a wrong order of heads; gate and up exchanged."""
    policy = convert_and_load(jax_source, tmp_path / "out")
    assert policy.config.dtype == "float32"
    assert_acts_as(policy, tree)
    assert_acts_as(policy, tree, cameras=CAMERAS[:2])


def test_jax_released_layout(tree, tmp_path):
    """Releases have no level `value` under the leaves, and none of the files that Orbax has added since; a path to
    `params` itself means its checkpoint."""
    source = write_jax(tmp_path / "pi0_small", tree)
    for name in ("_CHECKPOINT_METADATA", "_sharding", "commit_success.txt", "array_metadatas/process_0"):
        (source / "params" / name).unlink(missing_ok=True)
    assert_acts_as(convert_and_load(source / "params", tmp_path / "out"), tree)


@pytest.mark.parametrize(("suffixes", "scaling"), [(("",), 1.0), (("", "_1"), 0.5)], ids=["VLM", "both, scaled"])
def test_jax_lora_is_merged(suffixes, scaling, tmp_path):
    """LoRA that is dropped, scaled where openpi does not scale, or multiplied per head where openpi sums over heads."""
    lora = openpi_tree(1)
    add_lora(lora, suffixes)
    policy = convert_and_load(write_jax(tmp_path / "lora", lora), tmp_path / "out", f"--lora_scaling={scaling}")
    assert_acts_as(policy, lora, scaling)


def test_jax_lora_over_bfloat16_is_merged_in_float32(tmp_path):
    """openpi keeps frozen weights in bfloat16; rounding the sum to that would undo small updates."""
    lora = openpi_tree(1)
    llm = lora["PaliGemma"]["llm"]
    lora["PaliGemma"]["llm"] = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), llm)
    add_lora(lora)
    policy = convert_and_load(write_jax(tmp_path / "lora", lora), tmp_path / "out")
    assert policy.config.dtype == "float32"
    assert_acts_as(policy, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), lora))


def test_jax_bfloat16_is_kept(tree, tmp_path):
    """bfloat16 that goes through NumPy must come out bit for bit, under its own dtype."""
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree)
    source = write_jax(tmp_path / "half", half)
    assert convert(source, tmp_path / "out") == 0
    saved = load_file(tmp_path / "out" / "model.safetensors")
    kernel = np.asarray(half["state_proj"]["kernel"]).astype(np.float32)
    assert saved["model.state_proj.weight"].dtype == torch.bfloat16
    assert torch.equal(saved["model.state_proj.weight"].float(), torch.tensor(kernel.T))


def test_full_size_names_and_shapes(tmp_path):
    """The table at the size of the releases: every published tensor, and none else, in its shape."""
    from lerobot_pi0.network.pi0 import PI0
    from lerobot_pi0.network.sizes import GEMMA_2B, GEMMA_300M, PALIGEMMA_VOCAB, SO400M, Architecture, PaliGemmaSize
    from lerobot_pi0.tools.openpi_jax import _parts, table

    N, D, L = 8, 256, 18
    shapes = {"PaliGemma/llm/embedder/input_embedding": (PALIGEMMA_VOCAB, 2048)}
    for s, w, f in (("", 2048, 16_384), ("_1", 1024, 4096)):
        llm = "PaliGemma/llm/layers/"
        shapes |= {
            f"{llm}attn/q_einsum{s}/w": (L, N, w, D), f"{llm}attn/kv_einsum{s}/w": (L, 2, 1, w, D),
            f"{llm}attn/attn_vec_einsum{s}/w": (L, N, D, w), f"{llm}mlp{s}/gating_einsum": (L, 2, w, f),
            f"{llm}mlp{s}/linear": (L, f, w), f"{llm}pre_attention_norm{s}/scale": (L, w),
            f"{llm}pre_ffw_norm{s}/scale": (L, w), f"PaliGemma/llm/final_norm{s}/scale": (w,),
        }  # fmt: skip
    img, block = "PaliGemma/img/", "PaliGemma/img/Transformer/encoderblock/"
    attention = block + "MultiHeadDotProductAttention_0/"
    shapes |= {
        img + "embedding/kernel": (14, 14, 3, 1152), img + "embedding/bias": (1152,),
        img + "pos_embedding": (1, 256, 1152), img + "head/kernel": (1152, 2048), img + "head/bias": (2048,),
        block + "MlpBlock_0/Dense_0/kernel": (27, 1152, 4304), block + "MlpBlock_0/Dense_0/bias": (27, 4304),
        block + "MlpBlock_0/Dense_1/kernel": (27, 4304, 1152), block + "MlpBlock_0/Dense_1/bias": (27, 1152),
        attention + "out/kernel": (27, 16, 72, 1152), attention + "out/bias": (27, 1152),
    }  # fmt: skip
    for leaf in ("scale", "bias"):
        shapes[f"{img}Transformer/encoder_norm/{leaf}"] = (1152,)
        shapes |= {f"{block}LayerNorm_{i}/{leaf}": (27, 1152) for i in (0, 1)}
    for name in ("query", "key", "value"):
        shapes |= {f"{attention}{name}/kernel": (27, 1152, 16, 72), f"{attention}{name}/bias": (27, 16, 72)}
    for name, rows, columns in (
        ("state_proj", 32, 1024), ("action_in_proj", 32, 1024), ("action_time_mlp_in", 2048, 1024),
        ("action_time_mlp_out", 1024, 1024), ("action_out_proj", 1024, 32),
    ):  # fmt: skip
        shapes |= {f"{name}/kernel": (rows, columns), f"{name}/bias": (columns,)}

    rows = table()
    assert rows.keys() == shapes.keys()
    made = {
        name: part.shape
        for path, row in rows.items()
        for name, part in _parts(path, row, torch.empty(shapes[path], device="meta"))
    }
    with torch.device("meta"):
        network = PI0(Architecture(PaliGemmaSize(SO400M, GEMMA_2B, PALIGEMMA_VOCAB), GEMMA_300M), 224)
    assert made == {f"model.{name}": p.shape for name, p in network.named_parameters()}


# ---------------------------------------------------------------- PyTorch


def openpi_pytorch(folder: Path, dtype: torch.dtype = torch.float32, **config) -> PI0Policy:
    """A checkpoint with openpi's PyTorch names, tied head included, and the policy that it is made of."""
    policy = small_policy()
    shake(policy)
    tensors = {k.removeprefix("model."): v.to(dtype) for k, v in policy.state_dict().items()}
    embedding = tensors.pop("paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight")
    tensors["paligemma_with_expert.paligemma.lm_head.weight"] = embedding
    tensors["paligemma_with_expert.gemma_expert.lm_head.weight"] = torch.randn(300, 32).to(dtype)
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    write_stats(folder / "assets" / "trossen")
    return policy


def test_pytorch_round_trip(tmp_path, capsys):
    """Names without LeRobot's prefix, the tied embedding under its head's name; action_horizon from config.json; and
    minutes without a word."""
    options = {"action_dim": 32, "action_horizon": 16, "paligemma_variant": "gemma_2b", "precision": "float32"}
    source = openpi_pytorch(tmp_path / "openpi", **options)
    assert main(["convert", f"--source={tmp_path / 'openpi'}", f"--output={tmp_path / 'out'}",
                 "--text_tokenizer_name=bytes", f"--cameras=[{','.join(BARE_CAMERAS)}]"]) == 0  # fmt: skip
    assert "parameters" in bars(capsys.readouterr().err)
    policy = PI0Policy.from_pretrained(tmp_path / "out")
    assert (policy.config.chunk_size, policy.config.n_action_steps) == (16, 16)
    for name, p in source.named_parameters():
        assert torch.equal(policy.get_parameter(name), p), name


def test_dtype(tmp_path):
    """bfloat16 stays bfloat16 unless asked: a file twice as large for nothing, or rounding that nobody ordered."""
    openpi_pytorch(tmp_path / "openpi", torch.bfloat16)
    assert convert(tmp_path / "openpi", tmp_path / "out") == 0
    assert convert(tmp_path / "openpi", tmp_path / "wide", "--dtype=float32") == 0
    kept, wide = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "wide"))
    assert {x.dtype for x in kept.values()} == {torch.bfloat16}
    assert all(torch.equal(wide[name], x.float()) for name, x in kept.items())
    assert Checkpoint.open(tmp_path / "out").config().dtype == "bfloat16"


# ---------------------------------------------------------------- what is around the weights


def test_checkpoint_is_complete_for_the_builtin(jax_source, tmp_path):
    """LeRobot's π₀ swallows a missing key or an unknown option and runs on random weights."""
    assert convert(jax_source, tmp_path / "out") == 0
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    known = {f.name for f in dataclasses.fields(BuiltinPI0Config)}
    assert content.pop("type") == "pi0"
    assert content.keys() <= known
    assert content["device"] is None
    config = Checkpoint.open(tmp_path / "out").config()
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(BuiltinPI0Config)}
    builtin = BuiltinPI0Policy.from_pretrained(tmp_path / "out", config=BuiltinPI0Config(**options), strict=True)
    theirs = dict(builtin.named_parameters())
    for name, p in PI0Policy.from_pretrained(tmp_path / "out").named_parameters():
        assert torch.equal(theirs[name], p), name
    assert not list((tmp_path / "out").glob("*.new"))


def test_processors_normalise_as_openpi(jax_source, tmp_path):
    """Statistics of the wrong key, mean and std exchanged, LeRobot's epsilon, a lost chunk axis on the way back."""
    assert convert(jax_source, tmp_path / "out") == 0
    stats = json.loads((jax_source / "assets" / "me" / "my_robot" / "norm_stats.json").read_text())["norm_stats"]
    config = Checkpoint.open(tmp_path / "out").config()
    assert (config.max_state_dim, config.max_action_dim) == (32, 32)
    assert config.input_features[OBS_STATE].shape == config.output_features[ACTION].shape == (DIMS,)
    assert list(config.image_features) == list(CAMERAS)
    pre, post = make_pre_post_processors(config, str(tmp_path / "out"))
    state, actions = torch.randn(DIMS), torch.randn(1, 50, DIMS)
    image = torch.rand(3, 32, 32)
    batch = pre({OBS_STATE: state, "task": "fold the cloth", **dict.fromkeys(CAMERAS, image)})
    mean, std = (torch.tensor(stats["state"][name], dtype=torch.float64) for name in ("mean", "std"))
    torch.testing.assert_close(batch[OBS_STATE][0].double(), (state - mean) / (std + 1e-6), rtol=1e-6, atol=1e-6)
    assert torch.equal(batch[CAMERAS[0]][0], image)
    tokens = batch[OBS_LANGUAGE_TOKENS][0]
    assert bytes(int(x) - 3 for x in tokens if x > 2) == b"fold the cloth\n"
    assert len(tokens) == config.tokenizer_max_length == 128
    mean, std = (torch.tensor(stats["actions"][name], dtype=torch.float64) for name in ("mean", "std"))
    expected = actions.double() * (std + 1e-6) + mean
    torch.testing.assert_close(post(actions).double(), expected, rtol=1e-5, atol=1e-5)
    assert PI0Policy.from_pretrained(tmp_path / "out").predict_action_chunk(batch).shape == (1, 50, DIMS)


def test_epsilon_is_openpis(tmp_path, jax_source):
    """A joint that never moved in the data: LeRobot's 1e-8 would make a hundred times openpi's number of it."""
    stats = {key: {"mean": [0.5] * DIMS, "std": [0.1] * (DIMS - 1) + [0.0]} for key in ("state", "actions")}
    (tmp_path / "norm_stats.json").write_text(json.dumps({"norm_stats": stats}))
    assert convert(jax_source, tmp_path / "out", f"--norm_stats={tmp_path}") == 0
    pre, _ = make_pre_post_processors(Checkpoint.open(tmp_path / "out").config(), str(tmp_path / "out"))
    batch = pre({OBS_STATE: torch.full((DIMS,), 0.5 + 2**-20), "task": "x", CAMERAS[0]: torch.rand(3, 32, 32)})
    assert batch[OBS_STATE][0, -1].item() == pytest.approx(2**-20 / 1e-6, rel=1e-3)


def test_padded_statistics(jax_source, tmp_path, caplog):
    """Statistics computed after padding would make a robot of 32 joints out of one of six."""
    write_stats(tmp_path / "padded", pad=32 - DIMS)
    args = (jax_source, tmp_path / "out", f"--norm_stats={tmp_path / 'padded' / 'norm_stats.json'}")
    assert convert(*args) == 0
    assert Checkpoint.open(tmp_path / "out").config().output_features[ACTION].shape == (DIMS,)
    assert "taken for padding" in caplog.text
    assert convert(*args, "--overwrite=true", "--state_dim=8", "--action_dim=7") == 0
    config = Checkpoint.open(tmp_path / "out").config()
    assert (config.input_features[OBS_STATE].shape, config.output_features[ACTION].shape) == ((8,), (7,))


def test_relative_actions(jax_source, tmp_path, caplog):
    """openpi's delta actions come back as absolute ones, but for the gripper."""
    names = "--action_feature_names=[a,b,c,d,e,gripper]"
    assert convert(jax_source, tmp_path / "no", "--use_relative_actions=true") == 1
    assert "action_feature_names" in caplog.text
    assert convert(jax_source, tmp_path / "out", "--use_relative_actions=true", names) == 0
    assert convert(jax_source, tmp_path / "absolute") == 0
    state, actions, out = torch.arange(DIMS) + 1.0, torch.randn(1, 50, DIMS), {}
    for folder in ("out", "absolute"):
        pre, post = make_pre_post_processors(Checkpoint.open(tmp_path / folder).config(), str(tmp_path / folder))
        pre({OBS_STATE: state, "task": "x", CAMERAS[0]: torch.rand(3, 32, 32)})
        out[folder] = post(actions)
    offset = torch.cat([state[:-1], torch.zeros(1)])
    torch.testing.assert_close(out["out"], out["absolute"] + offset)


def test_tokenizer_that_is_not_here(jax_source, tmp_path, caplog):
    """Converting on a machine without access to the gated tokenizer: its name is written, and said to be."""
    assert convert(jax_source, tmp_path / "out", "--text_tokenizer_name=no/such-tokenizer") == 0
    assert "Only its name is written" in caplog.text
    steps = json.loads((tmp_path / "out" / "policy_preprocessor.json").read_text())["steps"]
    step = next(s for s in steps if s["registry_name"] == "tokenizer_processor")
    assert step["config"]["tokenizer_name"] == "no/such-tokenizer"
    assert step["config"]["max_length"] == 48


# ---------------------------------------------------------------- refusals


def test_source_is_refused(jax_source, tmp_path, caplog):
    """Not there, a run of many steps, a LeRobot checkpoint, an output that holds something."""
    run = tmp_path / "run"
    (run / "1000" / "params").mkdir(parents=True)
    (run / "29999" / "params").mkdir(parents=True)
    assert convert(run, tmp_path / "out") == 1
    assert "--source=" in caplog.text
    assert "29999" in caplog.text
    assert convert(tmp_path / "nothing", tmp_path / "out") == 1
    assert convert(run / "1000", tmp_path / "out") == 1
    assert CheckpointNotFoundError.__name__ in caplog.text
    assert not (tmp_path / "out").exists()
    assert convert(jax_source, tmp_path / "out") == 0
    assert convert(jax_source, tmp_path / "out") == 1
    assert "not empty" in caplog.text
    assert convert(tmp_path / "out", tmp_path / "again") == 1
    assert "of LeRobot already" in caplog.text


def test_other_networks_are_refused(tmp_path, caplog):
    """π₀.₅ and π₀-FAST have leaves of the same names: half of them would fit."""
    pi05 = openpi_tree()
    for name in ("state_proj", "action_time_mlp_in", "action_time_mlp_out"):
        del pi05[name]
    W = SMALL_EXPERT.width
    for name in ("time_mlp_in", "time_mlp_out"):
        pi05[name] = {"kernel": np.zeros((W, W), np.float32), "bias": np.zeros(W, np.float32)}
    assert convert(write_jax(tmp_path / "pi05", pi05), tmp_path / "out") == 1
    assert WrongPolicyError.__name__ in caplog.text
    assert "π₀.₅" in caplog.text
    fast = {"PaliGemma": openpi_tree()["PaliGemma"]}
    llm = fast["PaliGemma"]["llm"]
    del llm["final_norm_1"]
    llm["layers"] = {k: v for k, v in llm["layers"].items() if not k.endswith("_1")}
    llm["layers"]["attn"] = {k: v for k, v in llm["layers"]["attn"].items() if not k.endswith("_1")}
    assert convert(write_jax(tmp_path / "fast", fast), tmp_path / "out") == 1
    assert "π₀-FAST" in caplog.text
    assert not (tmp_path / "out").exists()


def damage_shape(tree: dict) -> None:
    tree["PaliGemma"]["llm"]["layers"]["attn"]["kv_einsum"]["w"] = np.zeros((3, 2, 2, 48, 16), np.float32)


def damage_width(tree: dict) -> None:
    tree["PaliGemma"]["llm"]["embedder"]["input_embedding"] = np.zeros((300, 50), np.float32)


def damage_missing(tree: dict) -> None:
    del tree["PaliGemma"]["llm"]["layers"]["mlp_1"]["linear"]


def damage_lora(tree: dict) -> None:
    tree["PaliGemma"]["llm"]["layers"]["attn"]["q_einsum"]["lora_a"] = np.zeros((3, 8, 48, 4), np.float32)


def damage_lora_shape(tree: dict) -> None:
    add_lora(tree)
    tree["PaliGemma"]["llm"]["layers"]["attn"]["q_einsum"]["lora_b"] = np.zeros((3, 1, 4, 16), np.float32)


def damage_dora(tree: dict) -> None:
    add_lora(tree)
    tree["PaliGemma"]["llm"]["layers"]["attn"]["q_einsum"]["dora_scale"] = np.zeros((3, 8), np.float32)


def damage_nan(tree: dict) -> None:
    tree["state_proj"]["kernel"][3, 4] = np.nan


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (damage_shape, MismatchedCheckpointError), (damage_width, MismatchedCheckpointError),
        (damage_missing, MismatchedCheckpointError), (damage_lora, MismatchedCheckpointError),
        (damage_lora_shape, MismatchedCheckpointError), (damage_dora, MismatchedCheckpointError),
        (damage_nan, CorruptCheckpointError),
    ],
)  # fmt: skip
def test_damaged_trees_are_refused(damage, error, tmp_path, caplog):
    """Two key/value heads, another width, a lost leaf, LoRA that cannot be merged, NaN: nothing is written."""
    tree = openpi_tree()
    damage(tree)
    assert convert(write_jax(tmp_path / "source", tree), tmp_path / "out") == 1
    assert error.__name__ in caplog.text
    assert not (tmp_path / "out").exists()


def test_cut_orbax_checkpoint(tree, tmp_path, caplog):
    """A download that stopped: metadata there, data not."""
    source = write_jax(tmp_path / "source", tree)
    for file in (source / "params").rglob("d/*"):
        file.unlink()
    assert convert(source, tmp_path / "out") == 1
    assert CorruptCheckpointError.__name__ in caplog.text
    (source / "params" / "_METADATA").write_text("{")
    assert convert(source, tmp_path / "out") == 1


async def read_and_stop() -> None:
    """As Orbax ends when several reads fail: the loop stops at the first error, nobody retrieves the others."""

    async def fail() -> None:
        raise ValueError

    asyncio.ensure_future(fail())  # noqa: RUF006 - nobody keeps it
    await asyncio.sleep(0)


def test_no_traceback_follows_a_failed_read(jax_source, tmp_path, caplog):
    """Python would print it when the task is freed, which may be long after our own message."""
    assert convert(jax_source, tmp_path / "out") == 0
    loop = asyncio.new_event_loop()
    loop.run_until_complete(read_and_stop())
    loop.close()
    gc.collect()
    assert "Traceback" not in caplog.text


def test_statistics_are_refused(jax_source, tmp_path, caplog):
    """Actions without the statistics of training have another scale; a choice among several must be made."""
    assert convert(jax_source, tmp_path / "out", "--asset_id=trossen") == 1
    assert "--asset_id=me/my_robot" in caplog.text
    assert convert(jax_source, tmp_path / "out", "--state_dim=9") == 1
    assert "only 6" in caplog.text
    state = '{"norm_stats": {"state": {"mean": %s, "std": [1, 2]}}}'
    for content in ("{", "{}", '{"norm_stats": {"state": {}}}', state % "[1]", state % "[1, NaN]", state % '["a"]'):
        (tmp_path / "norm_stats.json").write_text(content)
        assert convert(jax_source, tmp_path / "out", f"--norm_stats={tmp_path}") == 1
    openpi_pytorch(tmp_path / "openpi")
    (tmp_path / "openpi" / "assets" / "trossen" / "norm_stats.json").unlink()
    assert convert(tmp_path / "openpi", tmp_path / "out") == 1
    assert "--norm_stats=" in caplog.text
    assert not (tmp_path / "out").exists()


def test_without_jax(jax_source, tmp_path, caplog, monkeypatch):
    """The extra is optional: its absence says what to install."""
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    assert convert(jax_source, tmp_path / "out") == 1
    assert "lerobot_policy_pi0[jax]" in caplog.text


def test_command_line(capsys):
    """Help is there, and a typing error is not a traceback."""
    assert main([]) == 0
    assert "convert" in capsys.readouterr().out
    assert main(["convrt"]) == 2
    assert main(["convert"]) == 2
    assert "source" in capsys.readouterr().err
    assert main(["convert", "--help"]) == 0
    help_text = capsys.readouterr().out
    fields = [f.name for f in dataclasses.fields(sys.modules["lerobot_pi0.tools.convert"].Options)]
    assert all(f"--{name} " in help_text for name in fields)
    assert issubclass(PI0Config, BuiltinPI0Config)
