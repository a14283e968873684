"""Parts of the GPU benchmark (`gpu.py`): each is a generator of lines; the most informative parts come first."""

import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from gpu_bench import GIB, Bench, LeftOutError, Row, relative
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from presets import presets
from subjects import CHUNK, DIMS, Builtin, Ours, Transformers, batch_for
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lerobot_pi0 import PI0Policy
from lerobot_pi0.kernels import rounding
from lerobot_pi0.kernels.cuda_attention import ORDER
from lerobot_pi0.tools.memory import Counter, Load

BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
KINDS = ("int8", "fp8", "nf4")
GUIDES = ("identity", "vjp", "trained")
SOLVERS = ("midpoint", "heun", "adaptive")


def card(bench: Bench) -> Iterator[Row]:
    """The device's own rates: a copy, and products as wide as the VLM's."""
    if bench.on_card:
        properties = torch.cuda.get_device_properties(bench.device)
        yield {
            "name": properties.name,
            "gib": properties.total_memory / GIB,
            "capability": torch.cuda.get_device_capability(),
        }
    yield {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    x = torch.empty(2**30 if bench.full else 2**20, dtype=torch.uint8, device=bench.device)
    other = torch.empty_like(x)
    copied = bench.milliseconds(lambda: other.copy_(x))
    yield {"what": "copy", **copied, "gb_per_s": 2 * x.nbytes / copied["ms"] / 1e6}
    width, wide = bench.size.vlm.gemma.width, bench.size.vlm.gemma.mlp_dim
    weight = torch.randn(wide, width, device=bench.device, dtype=torch.bfloat16)
    for rows in (8192, 816, 50):
        tokens = torch.randn(rows, width, device=bench.device, dtype=torch.bfloat16)
        found = bench.milliseconds(lambda tokens=tokens: F.linear(tokens, weight))
        yield {"what": f"product, {rows} rows", **found, "tflop_per_s": 2 * rows * width * wide / found["ms"] / 1e9}


def right(bench: Bench) -> Iterator[Row]:
    """Results of the device against those of the CPU, in float32 at the small size, within the limits of rounding."""
    small = Bench(str(bench.device), "small", 1)
    tf32 = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield from bench.lines(_right_cases(small))
    finally:
        torch.set_float32_matmul_precision(tf32)
    if bench.full:
        yield from bench.lines(
            [({"what": "bfloat16, full size, graph beside kernels"}, partial(_graph_is_same, bench))]
        )


def _right_cases(small: Bench) -> Iterator[tuple[Row, Callable[[], Row]]]:
    noise = torch.randn(1, CHUNK, 32, generator=torch.Generator().manual_seed(2))
    for options in _settings():
        yield {"what": "chunk", "options": _short(options)}, partial(_right_chunk, small, options, noise)
    for frozen in (True, False):
        for samples in (1, 4):
            row = {"what": "loss and gradients", "frozen": frozen, "flow_samples": samples}
            yield row, partial(_right_gradients, small, frozen, samples)
    for kind in ("bfloat16", *KINDS):
        yield {"what": kind}, partial(_right_rounding, small, kind, noise)


def _settings() -> Iterator[Row]:
    yield {}
    yield {"cuda_graphs": False}
    for solver in SOLVERS:
        yield {"solver": solver}
    for mode in GUIDES:
        delays = {"rtc_training_max_delay": 9} if mode == "trained" else {}
        yield {"rtc_config": RTCConfig(), "rtc_guidance": mode, **delays}


def _short(options: Row) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items() if key != "rtc_config") or "defaults"


def _left_over(device: torch.device) -> Row:
    left = torch.randn(10, DIMS, generator=torch.Generator().manual_seed(1))
    return {"inference_delay": 4, "prev_chunk_left_over": left.to(device)}


def _right_chunk(small: Bench, options: Row, noise: Tensor) -> Row:
    chunks = []
    for device in (small.device, torch.device("cpu")):
        policy = small.build(Ours, "float32", device, **options)
        how = _left_over(device) if "rtc_config" in options else {}
        for _ in range(2):  # the second is replayed where the first was captured
            found = policy.predict_action_chunk(batch_for(small.size), noise=noise.to(device), **how)
        chunks.append(found)
    off = relative(*chunks)
    return {"off": off, "good": off < 1e-4}


def _right_gradients(small: Bench, frozen: bool, samples: int) -> Row:
    draw = torch.Generator().manual_seed(3)
    noise, times = torch.randn(2, samples, CHUNK, 32, generator=draw), torch.rand(2, samples, generator=draw)
    losses, grads = [], []
    for device in (small.device, torch.device("cpu")):
        policy = small.build(Ours, "float32", device, frozen=frozen, training=True, flow_samples=samples)
        batch = batch_for(small.size, batch_size=2)
        losses.append(policy.forward(batch, noise=noise.to(device), time=times.to(device))[0])
        losses[-1].backward()
        grads.append([p.grad.cpu() for p in policy.parameters() if p.grad is not None])
    off = max(relative(a, b) for a, b in zip(*grads, strict=True) if b.norm() > 0)
    far = relative(*losses)
    return {"off": far, "gradients_off": off, "good": far < 1e-4 and off < 1e-3}


def _right_rounding(small: Bench, kind: str, noise: Tensor) -> Row:
    policy = small.build(Ours) if kind == "bfloat16" else small.rounded(kind, emulate=True)
    exact = small.build(Ours, "float32", torch.device("cpu")).predict_action_chunk(batch_for(small.size), noise=noise)
    off = relative(policy.predict_action_chunk(batch_for(small.size), noise=noise.to(small.device)), exact)
    return {"off": off, "good": off < (0.03 if kind == "bfloat16" else 0.3)}


def _graph_is_same(bench: Bench) -> Row:
    batch, noise = bench.batch(), torch.randn(1, CHUNK, 32, device=bench.device)
    chunks = [bench.build(Ours, cuda_graphs=on).predict_action_chunk(batch, noise=noise) for on in (True, False)]
    off = relative(*chunks)
    return {"off": off, "good": off < 0.03}


def chunk(bench: Bench) -> Iterator[Row]:
    """Chunks: ours as one CUDA graph, kernel by kernel, rounded and in float32; the built-in's; transformers'."""
    subjects: dict[str, Callable[[], Any]] = {
        "ours, one graph": lambda: bench.build(Ours),
        "ours, kernel by kernel": lambda: bench.build(Ours, cuda_graphs=False),
        "built-in": lambda: bench.build(Builtin),
        "transformers": partial(_transformers, bench),
        **{f"ours, {kind}": partial(bench.rounded, kind) for kind in KINDS},
        "ours, float32": lambda: bench.build(Ours, "float32"),
        "built-in, float32": lambda: bench.build(Builtin, "float32"),
    }
    for name, make in subjects.items():
        built: list[Any] = []
        for cameras, prompt in ((3, 48), (1, 10)):
            row = {"what": name, "cameras": cameras, "prompt": prompt}
            yield from bench.lines([(row, partial(_chunk, bench, make, built, cameras, prompt))])


def _transformers(bench: Bench) -> Any:
    """transformers' model under autocast; without autocast it fails, because it mixes dtypes."""
    model = bench.build(Transformers)
    plain = model.predict_action_chunk

    def chunk(batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast(bench.device.type, torch.bfloat16):
            return plain(batch)

    model.predict_action_chunk = chunk
    return model


def _chunk(bench: Bench, make: Callable[[], Any], built: list[Any], cameras: int, prompt: int) -> Row:
    if not built:
        built.append(make())
    batch, row = bench.batch(cameras, prompt), Row()
    with torch.inference_mode(), bench.peak(row):
        found = bench.milliseconds(lambda: built[0].predict_action_chunk(batch))
    return found | row


def modes(bench: Bench) -> Iterator[Row]:
    """Our chunk with each solver and in each mode of real-time chunking."""
    policy, batch = bench.build(Ours), bench.batch()
    cfg, left = policy.config, _left_over(bench.device)

    def with_solver(solver: str) -> Row:
        cfg.solver = solver
        return bench.milliseconds(lambda: policy.predict_action_chunk(batch))

    def guided(mode: str) -> Row:
        cfg.solver, cfg.rtc_config, cfg.rtc_guidance = "euler", RTCConfig(), mode
        cfg.rtc_training_max_delay = 9 if mode == "trained" else 0
        policy.init_rtc_processor()
        return bench.milliseconds(lambda: policy.predict_action_chunk(batch, **left))

    yield from bench.lines([({"what": name}, partial(with_solver, name)) for name in SOLVERS])
    yield from bench.lines([({"what": name}, partial(guided, name)) for name in GUIDES])


def attention(bench: Bench) -> Iterator[Row]:
    """Backends of attention at our shapes, with and without a mask; the first call shows the cost of planning. Also the
    case in which a backward pass with a mask has returned NaN (pytorch issue 196678)."""
    dim = bench.size.vlm.gemma.head_dim
    shapes = ((8 * 816, 816), (8 * 50, 867)) if bench.full else ((8 * 10, 64),)
    for queries, keys in shapes:
        for masked in (False, True):
            for backend in BACKENDS:
                row = {"what": backend.lower(), "queries": queries, "keys": keys, "mask": masked}
                yield from bench.lines([(row, partial(_attend, bench, backend, queries, keys, dim, masked))])
    for backend in BACKENDS:
        row = {"what": f"{backend.lower()}, backward of very low scores", "keys": 832, "mask": True}
        yield from bench.lines([(row, partial(_low_scores, bench, backend, dim))])


def _attend(bench: Bench, backend: str, queries: int, keys: int, dim: int, masked: bool) -> Row:
    q, kv = (torch.randn(1, 1, n, dim, device=bench.device, dtype=torch.bfloat16) for n in (queries, keys))
    mask = torch.zeros(1, 1, 1, keys, device=bench.device, dtype=torch.bfloat16) if masked else None
    with _left_out_without_kernel(), sdpa_kernel(getattr(SDPBackend, backend)), torch.no_grad():
        return bench.milliseconds(lambda: F.scaled_dot_product_attention(q, kv, kv, mask))


def _low_scores(bench: Bench, backend: str, dim: int) -> Row:
    """Gradients where each score is about -130, and keys % 128 == 64."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, dim, generator=draw) * 0.1 for n in (64, 832, 832))
    q, k = q - (130 / dim**0.5) ** 0.5, k + (130 / dim**0.5) ** 0.5
    mask = torch.zeros(1, 1, 1, 832)
    mask[..., -13:] = float("-inf")
    q, k, v, mask = (x.to(bench.device, torch.bfloat16) for x in (q, k, v, mask))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    with _left_out_without_kernel(), sdpa_kernel(getattr(SDPBackend, backend)):
        F.scaled_dot_product_attention(*inputs, mask.expand(1, 1, 64, 832)).float().square().sum().backward()
    finite = all(bool(x.grad.isfinite().all()) for x in inputs)
    return {"finite": finite} | ({"good": finite} if getattr(SDPBackend, backend) in ORDER else {})


@contextmanager
def _left_out_without_kernel() -> Iterator[None]:
    """Treat PyTorch's error that a backend cannot do this as left out, not as an error of ours."""
    try:
        yield
    except RuntimeError as error:
        if "kernel" in str(error).lower():
            raise LeftOutError(str(error).splitlines()[0]) from error
        raise


def products(bench: Bench) -> Iterator[Row]:
    """A matrix product of the VLM's MLP with each kind of layer: time with the rounding of its inputs, and error."""
    width, wide = bench.size.vlm.gemma.width, bench.size.vlm.gemma.mlp_dim
    layer = nn.Linear(width, wide, bias=False, device=bench.device, dtype=torch.bfloat16).requires_grad_(False)
    for rows in (816, 8 * 816) if bench.full else (64,):
        x = torch.randn(rows, width, device=bench.device, dtype=torch.bfloat16)
        for kind in ("bfloat16", *KINDS):
            row = {"what": kind, "rows": rows}
            yield from bench.lines([(row, partial(_product, bench, kind, layer, x))])


def _product(bench: Bench, kind: str, layer: nn.Linear, x: Tensor) -> Row:
    used: Any = layer
    if kind != "bfloat16":
        try:
            rounding.check(kind, bench.device)
        except (ImportError, ValueError) as error:
            raise LeftOutError(str(error)) from error
        used = rounding.LAYERS[kind](layer)
        used.put(layer.weight)
    with torch.no_grad():
        off = relative(used(x), x.float() @ layer.weight.float().t())
        return bench.milliseconds(lambda: used(x)) | {"off": off}


def step(bench: Bench) -> Iterator[Row]:
    """Training steps, and their peak memory compared with the count of `lerobot-pi0 plan`."""
    batches = (1, 8, 32, 64) if bench.full else (1, 2)
    cases = [(True, "bfloat16", n) for n in batches] + [(False, "bfloat16", batches[0]), (True, "float32", batches[1])]
    for frozen, dtype, batch_size in cases:
        for name, subject in (("ours", Ours), ("built-in", Builtin)):
            row = {"what": name, "frozen": frozen, "dtype": dtype, "batch": batch_size}
            yield from bench.lines([(row, partial(_step, bench, subject, frozen, dtype, batch_size))])


def _step(bench: Bench, subject: Any, frozen: bool, dtype: str, batch_size: int) -> Row:
    row = Row()
    with bench.peak(row):
        found = _one_step(bench, subject, frozen, dtype, batch_size)
    row |= found | {"samples_per_s": batch_size / found["ms"] * 1e3}
    if subject is Ours:
        row["plan_gib"] = _planned(bench, frozen, dtype, batch_size) / GIB
    return row


def _one_step(bench: Bench, subject: Any, frozen: bool, dtype: str, batch_size: int) -> Row:
    policy = bench.build(subject, dtype, frozen=frozen, training=True)
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
    batch = bench.batch(batch_size=batch_size)
    ours = isinstance(policy, PI0Policy)

    def run() -> None:
        mixed = nullcontext() if ours or dtype == "float32" else torch.autocast(bench.device.type, torch.bfloat16)
        with mixed:
            loss, _ = policy.forward(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if ours:
            policy.update()

    return bench.milliseconds(run, max(3, bench.repeats // 4))


def _planned(bench: Bench, frozen: bool, dtype: str, batch_size: int) -> int:
    with presets(bench.size):
        config = Ours.config(bench.size, dtype, frozen)
        counter = Counter(config, as_on_gpu=bench.on_card)
        side = bench.size.vlm.vision.image_size
        return counter.count(batch_size, Load(((side, side),) * 3, 48)).peak


def load(bench: Bench) -> Iterator[Row]:
    """Saving and loading a checkpoint; a published one is in float32."""
    for stored in ("bfloat16", "float32"):
        with TemporaryDirectory() as folder, presets(bench.size):
            policy = bench.build(Ours, stored)
            policy.config.save_tokenizer = False
            save = partial(policy.save_pretrained, folder)
            yield from bench.lines([({"what": f"save {stored}"}, partial(bench.milliseconds, save, 1))])
            config, policy, save = policy.config, None, None
            config.dtype = "bfloat16"
            bench.free()
            read = partial(PI0Policy.from_pretrained, folder, config=config)
            yield from bench.lines([({"what": f"load {stored}"}, partial(bench.milliseconds, read, 1))])


def threads(bench: Bench) -> Iterator[Row]:
    """Two threads that use the same policy: their chunks have to be those of a single thread."""
    policy, batch = bench.build(Ours), bench.batch()
    noise = torch.randn(2, 1, CHUNK, 32, device=bench.device)
    alone = [policy.predict_action_chunk(batch, noise=x) for x in noise]
    together: list[list[Tensor]] = [[], []]

    def ask(i: int) -> None:
        together[i] += [policy.predict_action_chunk(batch, noise=noise[i]) for _ in range(5)]

    running = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    off = [relative(x, alone[i]) for i in range(2) for x in together[i]]
    yield {
        "what": "two threads",
        "chunks": len(off),
        "off": max(off, default=None),
        "good": len(off) == 10 and max(off) < 1e-3,
    }


def compilation(bench: Bench) -> Iterator[Row]:
    """torch.compile, ours and the built-in: the time until the first chunk, and of later chunks."""
    if not bench.on_card:
        yield {"what": "compile_model", "left out": "takes minutes, and says nothing about a GPU"}
        return
    ours = {
        "ours, layers in one graph, default": {"compile_mode": "default"},
        "ours, layers in one graph, max-autotune": {"compile_mode": "max-autotune"},
        "ours, whole calls": {"compile_mode": "max-autotune-no-cudagraphs", "cuda_graphs": False},
    }
    cases = [({"what": name}, partial(_compiled, bench, options)) for name, options in ours.items()]
    yield from bench.lines([*cases, ({"what": "built-in"}, partial(_compiled_builtin, bench))])


def _compiled(bench: Bench, options: Row) -> Row:
    policy, batch = bench.build(Ours, compile_model=True, **options), bench.batch()
    return bench.milliseconds(lambda: policy.predict_action_chunk(batch))


def _compiled_builtin(bench: Bench) -> Row:
    policy, batch = bench.build(Builtin), bench.batch()
    policy.model.sample_actions = torch.compile(policy.model.sample_actions, mode="max-autotune")
    torch.set_float32_matmul_precision("high")
    with torch.inference_mode():
        return bench.milliseconds(lambda: policy.predict_action_chunk(batch))


PARTS: dict[str, tuple[Callable[[Bench], Iterator[Row]], float]] = {
    "card": (card, 10),
    "right": (right, 60),
    "chunk": (chunk, 120),
    "attention": (attention, 30),
    "products": (products, 20),
    "step": (step, 180),
    "modes": (modes, 40),
    "load": (load, 60),
    "threads": (threads, 30),
    "compile": (compilation, 600),
}
"""Each part, and the seconds that it probably needs at full size."""
